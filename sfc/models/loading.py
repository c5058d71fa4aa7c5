"""Load any causal language model as a `Model`: a TransformerLens bridge with its tokenizer and its template."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sfc.core.config import ModelConfig
from sfc.core.errors import CannotLoadModel, UserError, one_line
from sfc.core.ranks import local_rank
from sfc.models.bridging import bridged
from sfc.models.lora import merge_adapter
from sfc.models.model import Model, n_positions, not_finite
from sfc.models.sources import embedded_model_folder, tiny_model_folder

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Outline(NamedTuple):
    """What can be said of a model without its weights."""

    tokenizer: Any
    n_layers: int
    d_model: int
    heads_width: int
    """of the heads' outputs side by side"""
    n_positions: int | None
    """as `Model.n_positions`"""
    config: Any
    """as transformers has it"""

    def width(self, site: str) -> int:
        """Dimensions of the activation at a site, as `Model.width`."""
        return self.heads_width if site.endswith("hook_z") else self.d_model


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; started by `torchrun`, each process has a GPU of its own.

    Raises:
        UserError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for other devices, whose memory is the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def load_model(config: ModelConfig, device: torch.device | str = "cpu") -> Model:
    """Load the weights, merge the adapter if one is named, and wrap the model for hooks.

    Raises:
        CannotLoadModel: the model cannot be found, read, put on the device or wrapped.
        UserError: its adapter cannot be merged, weights or logits are not finite, or the wrapped model computes
            something else than the plain one.
    """
    hf, tokenizer = load_weights(config)
    if config.adapter:
        hf = merge_adapter(hf, config.adapter)
    _check_weights(hf, config)
    try:
        hf.to(device)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise CannotLoadModel(f"model {config.source!r} cannot be put on {device} ({one_line(error)})") from None
    return bridged(hf.eval(), tokenizer, config)


def _check_weights(hf: Any, config: ModelConfig) -> None:
    """Raise a `UserError` if weights are quantised or not finite; all are asked about before one is waited for."""
    extremes = {}
    for name, weight in hf.named_parameters():
        if weight.dtype not in _DTYPES:
            raise CannotLoadModel(
                f"model {config.source!r} has quantised weights ({name} is {str(weight.dtype).removeprefix('torch.')}):"
                " use one with float32, bfloat16 or float16 weights"
            )
        if weight.numel():
            extremes[name] = torch.stack(weight.detach().aminmax())
    finite = torch.stack([each.float() for each in extremes.values()]).isfinite().all(1).tolist()
    for name, is_finite in zip(extremes, finite, strict=True):
        if not is_finite:
            whose = f"{config.source!r} with adapter {config.adapter!r}" if config.adapter else repr(config.source)
            raise not_finite(f"the weights {name} of model {whose}", hf.dtype)


def load_outline(config: ModelConfig) -> Outline:
    """Load the tokenizer and the sizes, not the weights.

    Raises:
        CannotLoadModel: they cannot be found or read.
    """
    folder = _folder(config)
    tokenizer = _load_tokenizer(config, folder)
    try:
        whole = AutoConfig.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
        sizes = whole.get_text_config()
        head = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
        heads_width = head * sizes.num_attention_heads
        return Outline(tokenizer, sizes.num_hidden_layers, sizes.hidden_size, heads_width, n_positions(whole), whole)
    except Exception as error:  # of whatever the file makes transformers run
        raise _cannot_load(config, error) from None


def _folder(config: ModelConfig) -> str | Path:
    own = {"embedded": embedded_model_folder, "tiny": tiny_model_folder}
    return own[config.source]() if config.source in own else config.source


def _cannot_load(config: ModelConfig, error: Exception) -> CannotLoadModel:
    where = "the folder" if Path(config.source).exists() else "no such folder, nor a model the hub gives"
    return CannotLoadModel(f"cannot load model {config.source!r} ({where}): {one_line(error)}")


def load_weights(config: ModelConfig) -> tuple[Any, Any]:
    """The plain model on the CPU, as transformers has it, and its tokenizer.

    Raises:
        CannotLoadModel: they cannot be found or read.
    """
    dtype = cast(torch.dtype, getattr(torch, config.dtype))
    folder = _folder(config)
    tokenizer = _load_tokenizer(config, folder)
    try:
        model, report = cast(
            tuple[Any, dict[str, set[str]]],
            AutoModelForCausalLM.from_pretrained(
                folder,
                revision=config.revision,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
            ),
        )
        if report["missing_keys"]:  # they would be random
            raise ValueError(f"its files lack weights, among them {min(report['missing_keys'])}")
        if beyond := _of_further_layers(report["unexpected_keys"], model):
            raise ValueError(f"its config.json has fewer layers than its files, which have {beyond}")
        if report["unexpected_keys"] and getattr(model.config, "quantization_config", None):  # scales without a use
            raise ValueError(f"its weights are quantised in a way that is not known ({min(report['unexpected_keys'])})")
    except Exception as error:  # of whatever the files make transformers and its quantisers import and run
        raise _cannot_load(config, error) from None
    return model, tokenizer


def _of_further_layers(unexpected: Iterable[str], model: Any) -> str | None:
    """A weight without a place in the model, where the same one of the first layer has one."""
    placed = set(model.state_dict())
    return next((name for name in sorted(unexpected) if re.sub(r"\.\d+\.", ".0.", name, count=1) in placed), None)


def _load_tokenizer(config: ModelConfig, folder: str | Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
    except Exception as error:  # as above
        raise _cannot_load(config, error) from None
    if not tokenizer.is_fast:  # slow ones cannot say which characters a token is of
        raise CannotLoadModel(
            f"the tokenizer of model {config.source!r} is written in Python: give one with a tokenizer.json"
        )
    return tokenizer
