"""The last tokens of prompts, to be run again and again, with the keys and values of everything before them.

Where only late positions are changed, those before them stay what they were, at every layer: attention is causal. A run
then costs the suffix alone, which for a chat template's suffix is a fifth of a prompt.
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
from sfc.models.batches import NO_POSITION, Batch, TemplateLayout, pad
from sfc.models.loading import Model


@dataclass(frozen=True)
class KVCachedSuffix(Batch):
    """A batch of the last `pos` tokens of each prompt, flush right: the last column is every prompt's last token.

    Wherever a `Batch` is run, suffixes can be: `last_logits`, `cached_residual_after`, `score_batch` give for them what
    they give for the whole prompts, at these positions.
    """

    mask: Int[Tensor, "batch width"]
    """1 for a real token, 0 for padding, which stands on the left; what stands before the suffix included"""
    positions: Int[Tensor, "batch pos"]
    cache: Any
    """keys and values of every layer before the suffix (a `transformers` cache)"""

    @property
    def touchable(self) -> Bool[Tensor, "batch pos"]:
        """Tokens of the suffix that are neither padding nor a prompt's first token (which has position 0)."""
        return (self.positions > 0) & (self.template_positions != NO_POSITION)

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
def cache_suffixes(model: Model, prompts: Sequence[TokenizedPrompt], n_suffix: int) -> KVCachedSuffix:
    """Run all but the last `n_suffix` tokens of the prompts, as one batch, and keep the keys and values.

    A prompt of at most `n_suffix` tokens is all suffix.
    """
    whole = flush_right(pad(prompts, TemplateLayout.of(prompts), model.device, n_suffix))
    if whole.ids.shape[1] == n_suffix:
        return whole
    before = model.hf.base_model(
        input_ids=whole.ids[:, :-n_suffix],
        attention_mask=whole.mask[:, :-n_suffix],
        position_ids=whole.positions[:, :-n_suffix],
        use_cache=True,
    )
    suffix = {name: getattr(whole, name)[:, -n_suffix:] for name in ("ids", "template_positions", "roles", "positions")}
    return replace(whole, **suffix, lengths=torch.full_like(whole.lengths, n_suffix), cache=before.past_key_values)


def flush_right(batch: Batch) -> KVCachedSuffix:
    """The same prompts whole, padded on the left, with nothing run before them: generation can go on from there.

    Cached suffixes stay as they are.
    """
    if isinstance(batch, KVCachedSuffix):
        return batch
    width = batch.ids.shape[1]
    columns = (torch.arange(width, device=batch.ids.device) + batch.lengths[:, None]) % width
    ids, template_positions, roles = (
        values.gather(1, columns) for values in (batch.ids, batch.template_positions, batch.roles)
    )
    mask = (template_positions != NO_POSITION).long()
    return KVCachedSuffix(
        prompts=batch.prompts,
        ids=ids,
        lengths=torch.full_like(batch.lengths, width),
        template_positions=template_positions,
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
