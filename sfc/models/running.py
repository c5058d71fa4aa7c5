"""Run a model: from the start, up to a layer, or from a cached residual stream on.

Runs never build the logits of more than the last position. A `Batch` needs no key-value cache and no attention mask,
because it pads on the right and attention is causal; `Tails`, the last tokens of prompts alone, bring both along.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfc.models.batches import Batch
from sfc.models.interventions import Intervention, intervening, recorder
from sfc.models.loading import Model


@dataclass(frozen=True)
class Prefix:
    """The residual stream after block `layer`, at all positions, in the model's own dtype: a run stopped half-way.

    Layer -1 caches nothing: the run starts with the tokens.
    """

    layer: int
    residual: Float[Tensor, "batch pos d_model"]
    outputs: int = 0
    """what this model's blocks return: a tuple of so many, of which the first is the residual stream; 0 is no tuple"""

    def select(self, rows: Int[Tensor, " rows"]) -> "Prefix":
        """The prefix of `batch.select(rows)`."""
        return replace(self, residual=self.residual[rows])

    def repeat(self, times: int) -> "Prefix":
        """The prefix of `batch.repeat(times)`."""
        return replace(self, residual=self.residual.repeat(times, 1, 1))


class _Stop(Exception):
    """Ends a forward pass whose rest nobody wants."""


def last_logits(
    model: Model,
    batch: Batch,
    interventions: Mapping[str, Intervention] | None = None,
    prefix: Prefix | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Logits at the last position of each prompt, in float32.

    Args:
        interventions: act at their sites during the run.
        prefix: if given, blocks up to `prefix.layer` are not run; interventions at earlier sites never act.
    """
    if prefix is not None and prefix.layer < 0:
        prefix = None
    start = {"input_ids": batch.ids} if prefix is None else {"inputs_embeds": prefix.residual}
    inputs = {**start, **batch.run_arguments}
    rows = torch.arange(len(batch.lengths), device=batch.lengths.device)
    with intervening(model, interventions or {}), _starting_from(model, prefix):
        return _logits(model, inputs, lambda hidden: hidden[rows, batch.lengths - 1])


def next_token_losses(
    model: Model, batch: Batch, interventions: Mapping[str, Intervention] | None = None
) -> Float[Tensor, " tokens"]:
    """Cross-entropy, in nats, of each prompt token given those before it; the first one and padding are left out."""
    predicts = batch.touchable[:, 1:]
    with intervening(model, interventions or {}):
        inputs = {"input_ids": batch.ids, **batch.run_arguments}
        logits = _logits(model, inputs, lambda hidden: hidden[:, :-1][predicts])
    return torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:][predicts], reduction="none")


def _logits(model: Model, inputs: Mapping[str, Any], select: Callable[[Tensor], Tensor]) -> Float[Tensor, "rows vocab"]:
    """Logits, in float32, of the positions that `select` takes from the last hidden state [batch, pos, d_model].

    The model's own forward pass makes them, since some models scale or cap their logits after the unembedding.
    """
    with intervening(model, {"unembed.hook_in": lambda hidden: select(hidden)[None]}):
        return model.hf(**inputs).logits[0].float()


def run_to(model: Model, batch: Batch, interventions: Mapping[str, Intervention], last_site: str) -> None:
    """Run a batch from the start for the sake of its interventions, no further than `last_site`."""

    def stop(_activation: Tensor) -> None:
        raise _Stop

    with suppress(_Stop), intervening(model, interventions), intervening(model, {last_site: stop}):
        model.hf.base_model(input_ids=batch.ids, **batch.run_arguments)


@torch.no_grad()
def prefix_after(model: Model, batch: Batch, layer: int) -> Prefix:
    """Run a batch up to and with block `layer`, and keep the residual stream there; layer -1 runs nothing."""
    if layer < 0:
        return Prefix(layer, torch.empty(len(batch.lengths), 0, model.d_model, device=model.device, dtype=model.dtype))
    block = model.bridge.blocks[layer]
    kept: list[Tensor | tuple[Tensor, ...]] = []

    def forward(*args: Any, **kwargs: Any) -> None:
        kept.append(type(block).forward(block, *args, **kwargs))
        raise _Stop

    with suppress(_Stop), _forwards({block: forward}):
        model.hf.base_model(input_ids=batch.ids, **batch.run_arguments)
    if isinstance(kept[0], tuple):
        return Prefix(layer, kept[0][0], len(kept[0]))
    return Prefix(layer, kept[0])


@torch.no_grad()
def every_prefix(model: Model, batch: Batch) -> dict[int, Prefix]:
    """What `prefix_after` gives for each layer, -1 included, from one run of the whole batch."""
    residuals: dict[str, Tensor] = {}
    sites = {f"blocks.{layer}.hook_resid_post": layer for layer in range(model.n_layers)}
    last_logits(model, batch, {site: recorder(residuals, site) for site in sites})
    outputs = prefix_after(model, batch, 0).outputs
    prefixes = {layer: Prefix(layer, residuals[site], outputs) for site, layer in sites.items()}
    return {-1: prefix_after(model, batch, -1), **prefixes}


@contextmanager
def _starting_from(model: Model, prefix: Prefix | None) -> Iterator[None]:
    """Let blocks before the prefix's pass their input on, and its own return the cached residual stream."""
    if prefix is None:
        yield
        return
    *earlier, last = [model.bridge.blocks[i] for i in range(prefix.layer + 1)]

    def returned(residual: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        return (residual, *[None] * (prefix.outputs - 1)) if prefix.outputs else residual

    # The last one's output hook still acts, so that an intervention at this very site is possible.
    forwards = dict.fromkeys(earlier, lambda hidden_states, *_args, **_kwargs: returned(hidden_states))
    with _forwards({**forwards, last: lambda *_args, **_kwargs: returned(last.hook_out(prefix.residual))}):
        yield


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
