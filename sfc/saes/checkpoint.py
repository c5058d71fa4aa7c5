"""SAEs in training: their state, saved and restored to the bit."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfc.core.contents import check
from sfc.core.errors import UserError, first_problem
from sfc.core.files import replacing


class Parameters(NamedTuple):
    """The weights of one SAE in training, on scaled activations; `encoder` has a row per feature."""

    encoder: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]


@dataclass
class Training:
    """One SAE in training: everything that changes from step to step, its scale, and perhaps where it started."""

    site: str
    scale: float
    parameters: Parameters
    optimizer: torch.optim.Adam
    tokens_since_fired: Int[Tensor, " d_sae"]
    anchors: Float[Tensor, "d_sae d_in"] | None
    """the directions that the features are held near, which `start` makes again whenever it is asked"""


def save(path: Path, trainings: Sequence[Training], step: int) -> float:
    """Write the state after `step` steps, whole or not at all; the seconds it took."""
    began = time.perf_counter()
    tensors = {f"{t.site}/{name}": tensor.cpu() for t in trainings for name, tensor in _state(t)}
    metadata = {"step": str(step)} | {f"{_SCALE}{t.site}": t.scale.hex() for t in trainings}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return time.perf_counter() - began


def steps_done(path: Path) -> int:
    """How many steps a checkpoint saves; 0 where there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not os.path.lexists(path):
        return 0
    with _opened(path) as (header, _):
        return header.step


def restore(path: Path, trainings: Sequence[Training]) -> int:
    """Give fresh trainings of the same sites the state that was saved; the number of steps they had done.

    Raises:
        UserError: the file is damaged, or from a training of other sites.
    """
    with _opened(path) as (header, file):
        for training in trainings:
            training.scale = header.scales[training.site]
            _make_optimizer_state(training)
            with torch.no_grad():
                for name, tensor in _state(training):
                    tensor.copy_(file.get_tensor(f"{training.site}/{name}"))
        return header.step


_SCALE = "scale "


class _Header(BaseModel):
    """What a checkpoint says beside its tensors."""

    step: int = Field(ge=0)
    scales: dict[str, Annotated[float, BeforeValidator(float.fromhex), Field(gt=0, allow_inf_nan=False)]]

    @classmethod
    def of(cls, metadata: dict[str, str]) -> "_Header":
        """From the strings, the only values that safetensors has there."""
        scales = {key.removeprefix(_SCALE): value for key, value in metadata.items() if key.startswith(_SCALE)}
        return cls.model_validate({"scales": scales} | metadata)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Header, Any]]:
    """A checkpoint open for reading; whatever is wrong with it is explained."""
    check(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield _Header.of(file.metadata() or {}), file
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise UserError(f"the checkpoint {path} cannot be used ({reason}); delete it to start over") from None


def _state(training: Training) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a training that changes, by name."""
    for name, parameter in zip(Parameters._fields, training.parameters, strict=True):
        yield name, parameter.detach()
        for key, value in training.optimizer.state[parameter].items():
            yield f"{name}/{key}", value
    yield "tokens_since_fired", training.tokens_since_fired


def _make_optimizer_state(training: Training) -> None:
    """Let Adam make its tensors, which it does at its first step."""
    before: Any = [parameter.detach().clone() for parameter in training.parameters]
    for parameter in training.parameters:
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    training.optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(training.parameters, before, strict=True):
            parameter.copy_(value)
