"""Run a model: from the start, up to a layer, or from a cached residual stream on.

Runs build the logits of the positions that are asked for, and of no others. A `Batch` needs no key-value cache and no
attention mask, because it pads on the right and attention is causal; `KVCachedSuffix`, the last tokens of prompts
alone, brings both along.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.core.errors import UserError
from sfc.core.sites import layer_of
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention, intervening, recorder
from sfc.models.model import Model


@dataclass(frozen=True)
class CachedResidual:
    """The residual stream after block `layer`, at all positions, in the model's own dtype: a run stopped half-way.

    Layer -1 caches nothing: the run starts with the tokens.
    """

    layer: int
    residual: Float[Tensor, "batch pos d_model"]
    outputs: int = 0
    """what this model's blocks return: a tuple of so many, of which the first is the residual stream; 0 is no tuple"""

    def select(self, rows: Int[Tensor, " rows"]) -> "CachedResidual":
        """The cached residual stream of `batch.select(rows)`."""
        return replace(self, residual=self.residual[rows])

    def repeat(self, times: int) -> "CachedResidual":
        """The cached residual stream of `batch.repeat(times)`."""
        return replace(self, residual=repeat(self.residual, "batch ... -> (times batch) ...", times=times))


class _Stop(Exception):
    """Ends a forward pass whose rest nobody wants."""


def last_logits(
    model: Model,
    batch: Batch,
    interventions: Mapping[str, Intervention] | None = None,
    cached: CachedResidual | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Logits at the last position of each prompt, in float32.

    Args:
        interventions: act at their sites during the run.
        cached: if given, blocks up to `cached.layer` are not run; interventions at earlier sites never act.
    """
    rows = torch.arange(len(batch.lengths), device=batch.lengths.device)
    return _logits(model, batch, interventions, cached, lambda hidden: hidden[rows, batch.lengths - 1])


def losses_and_last_logits(
    model: Model,
    batch: Batch,
    interventions: Mapping[str, Intervention] | None = None,
    cached: CachedResidual | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "batch vocab"]]:
    """One run for two results; arguments as `last_logits`.

    Returns:
        The cross-entropy, in nats, of each prompt token given those before it (the first one and padding are left
        out), and the logits at the last position of each prompt, in float32.
    """
    predicts = batch.touchable[:, 1:]
    rows = torch.arange(len(batch.lengths), device=batch.lengths.device)

    def wanted(hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :-1][predicts], hidden[rows, batch.lengths - 1]])

    logits = _logits(model, batch, interventions, cached, wanted)
    losses = torch.nn.functional.cross_entropy(logits[: -len(rows)], batch.ids[:, 1:][predicts], reduction="none")
    return losses, logits[-len(rows) :]


def logits_at(
    model: Model,
    batch: Batch,
    where: Bool[Tensor, "batch pos"],
    interventions: Mapping[str, Intervention] | None = None,
    cached: CachedResidual | None = None,
) -> Float[Tensor, "positions vocab"]:
    """Logits at the positions that are True, prompt by prompt, in float32; other arguments as `last_logits`."""
    return _logits(model, batch, interventions, cached, lambda hidden: hidden[where])


def _logits(
    model: Model,
    batch: Batch,
    interventions: Mapping[str, Intervention] | None,
    cached: CachedResidual | None,
    select: Callable[[Tensor], Tensor],
) -> Float[Tensor, "rows vocab"]:
    """Logits, in float32, of the positions that `select` takes from the last hidden state [batch, pos, d_model].

    The model's own forward pass makes them, since some models scale or cap their logits after the unembedding.
    """
    unembedding = {"unembed.hook_in": lambda hidden: select(hidden)[None]}
    with (
        intervening(model, interventions or {}),
        intervening(model, unembedding),
        _starting_from(model, batch, cached) as inputs,
    ):
        return model.hf(**inputs).logits[0].float()


def run_to(
    model: Model,
    batch: Batch,
    interventions: Mapping[str, Intervention],
    last_site: str,
    cached: CachedResidual | None = None,
) -> None:
    """Run a batch for the sake of its interventions, no further than `last_site`.

    Args:
        cached: if given, blocks up to `cached.layer` are not run; interventions at earlier sites never act.
    """

    def stop(_activation: Tensor) -> None:
        raise _Stop

    with (
        suppress(_Stop),
        intervening(model, interventions),
        intervening(model, {last_site: stop}),
        _starting_from(model, batch, cached) as inputs,
    ):
        model.hf.base_model(**inputs)


def activations_at(
    model: Model, batch: Batch, sites: Sequence[str], cached: CachedResidual | None = None
) -> dict[str, Tensor]:
    """The activations [batch, pos, …] at sites that come in the order of the run, which goes no further than the last.

    Args:
        cached: as for `last_logits`.

    Raises:
        UserError: the model never passes one of the sites.
    """
    seen: dict[str, Tensor] = {}
    run_to(model, batch, {site: recorder(seen, site) for site in sites}, sites[-1], cached)
    if missed := [site for site in sites if site not in seen]:
        raise UserError(f"this model has the site {missed[0]!r} by name, but never passes it: take another one")
    return seen


def layer_before(site: str) -> int:
    """The last block whose output the activation at `site` depends on, or is: runs that change it may start there."""
    return layer_of(site) if site.endswith("resid_post") else layer_of(site) - 1


@torch.no_grad()
def cached_residual_after(
    model: Model, batch: Batch, layer: int, start: CachedResidual | None = None
) -> CachedResidual:
    """Run a batch up to and with block `layer`, and keep the residual stream there; layer -1 runs nothing.

    Args:
        start: a cached residual stream of this batch, to go on from.

    Raises:
        ValueError: `start` lies behind `layer`.
    """
    if start is not None and start.layer >= layer:
        if start.layer > layer:
            raise ValueError(f"a run that starts after block {start.layer} does not pass block {layer}")
        return start
    if layer < 0:
        return CachedResidual(
            layer, torch.empty(len(batch.lengths), 0, model.d_model, device=model.device, dtype=model.dtype)
        )
    block = model.bridge.blocks[layer]
    kept: list[Tensor | tuple[Tensor, ...]] = []

    def forward(*args: Any, **kwargs: Any) -> None:
        kept.append(type(block).forward(block, *args, **kwargs))
        raise _Stop

    with suppress(_Stop), _starting_from(model, batch, start) as inputs, _forwards({block: forward}):
        model.hf.base_model(**inputs)
    if isinstance(kept[0], tuple):
        return CachedResidual(layer, kept[0][0], len(kept[0]))
    return CachedResidual(layer, kept[0])


@contextmanager
def _starting_from(model: Model, batch: Batch, cached: CachedResidual | None) -> Iterator[dict[str, Any]]:
    """Let blocks before the cached one pass their input on, and its own return the cached residual stream.

    Gives the inputs to call the model with.

    Raises:
        UserError: the model has no positions for so many tokens.
    """
    model.check_room(batch.width)
    if cached is None or cached.layer < 0:
        yield {"input_ids": batch.ids, **batch.run_arguments}
        return
    *earlier, last = [model.bridge.blocks[i] for i in range(cached.layer + 1)]

    def returned(residual: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        return (residual, *[None] * (cached.outputs - 1)) if cached.outputs else residual

    # The last one's output hook still acts, so that an intervention at this very site is possible.
    forwards = dict.fromkeys(earlier, lambda hidden_states, *_args, **_kwargs: returned(hidden_states))
    with _forwards({**forwards, last: lambda *_args, **_kwargs: returned(last.hook_out(cached.residual))}):
        yield {"inputs_embeds": cached.residual, **batch.run_arguments}


@contextmanager
def _forwards(forwards: Mapping[Any, Callable]) -> Iterator[None]:
    """Let these modules run other functions than their own `forward`."""
    try:
        for module, forward in forwards.items():
            # Set in the instance: the bridge's own attribute setting would reach through to the wrapped module.
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
