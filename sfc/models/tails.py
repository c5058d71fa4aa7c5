"""The last tokens of prompts, to be run again and again, with the keys and values of everything before them.

Where only late positions are changed, those before them stay what they were, at every layer: attention is causal. A run
then costs the tail alone, which for a chat template's suffix is a fifth of a prompt.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache

from sfc.data.render import TokenizedPrompt
from sfc.models.batches import PAD_SLOT, Batch, SlotLayout, pad
from sfc.models.loading import Model


@dataclass(frozen=True)
class Tails(Batch):
    """A batch of the last `pos` tokens of each prompt, flush right: the last column is every prompt's last token.

    Wherever a `Batch` is run, tails can be: `last_logits`, `prefix_after`, `score_batch` give for them what they give
    for the whole prompts, at these positions.
    """

    mask: Int[Tensor, "batch width"]
    """1 for a real token, 0 for padding, which stands on the left; what stands before the tail included"""
    positions: Int[Tensor, "batch pos"]
    cache: Any
    """keys and values of every layer before the tail (a `transformers` cache)"""

    @property
    def touchable(self) -> Bool[Tensor, "batch pos"]:
        """Tokens of the tail that are neither padding nor a prompt's first token (which has position 0)."""
        return (self.positions > 0) & (self.slots != PAD_SLOT)

    @property
    def run_arguments(self) -> dict[str, Any]:
        """Mask, positions, and the cache, to which a run may add without changing this one."""
        return {
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "past_key_values": _own_copy(self.cache),
            "use_cache": True,
        }

    def select(self, rows: Int[Tensor, " rows"]) -> Self:
        """Some rows, in the order given; a row may come more than once."""
        cache = _own_copy(self.cache)
        cache.batch_select_indices(rows)
        return replace(super().select(rows), cache=cache)


@torch.no_grad()
def make_tails(model: Model, prompts: Sequence[TokenizedPrompt], n_tail: int) -> Tails:
    """Run all but the last `n_tail` tokens of the prompts, as one batch, and keep the keys and values.

    A prompt of at most `n_tail` tokens is all tail.
    """
    whole = flush_right(pad(prompts, SlotLayout.of(prompts), model.device, n_tail))
    if whole.ids.shape[1] == n_tail:
        return whole
    before = model.hf.base_model(
        input_ids=whole.ids[:, :-n_tail],
        attention_mask=whole.mask[:, :-n_tail],
        position_ids=whole.positions[:, :-n_tail],
        use_cache=True,
    )
    tail = {name: getattr(whole, name)[:, -n_tail:] for name in ("ids", "slots", "roles", "positions")}
    return replace(whole, **tail, lengths=torch.full_like(whole.lengths, n_tail), cache=before.past_key_values)


def flush_right(batch: Batch) -> Tails:
    """The same prompts whole, padded on the left, with nothing run before them: generation can go on from there.

    Tails stay as they are.
    """
    if isinstance(batch, Tails):
        return batch
    width = batch.ids.shape[1]
    columns = (torch.arange(width, device=batch.ids.device) + batch.lengths[:, None]) % width
    ids, slots, roles = (values.gather(1, columns) for values in (batch.ids, batch.slots, batch.roles))
    mask = (slots != PAD_SLOT).long()
    return Tails(
        prompts=batch.prompts,
        ids=ids,
        lengths=torch.full_like(batch.lengths, width),
        slots=slots,
        roles=roles,
        mask=mask,
        positions=(mask.cumsum(-1) - 1).clamp_min(0),
        cache=DynamicCache(),
        pair=batch.pair,
    )


def _own_copy(cache: Any) -> Any:
    """A cache of its own with the same tensors: layers that grow or select rows make new ones and leave these alone."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
