"""Batches of tokenized prompts: whole, padded on the right, or their last tokens alone, with a cache of the rest.

A *template position* is a position that means the same in every prompt: each token of the template's prefix
(counted from the start) and of its suffix (counted from its end) has its own; all content and reply tokens share one.

Where only late positions are changed, those before them stay what they were, at every layer: attention is causal. A
`KVCachedSuffix` holds the last tokens of prompts, to be run again and again, with the keys and values of everything
before them: a run then costs the suffix alone, which for a chat template's suffix is a fifth of a prompt.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache

from sfc.data.render import Role, TokenizedPrompt
from sfc.models.model import Model

NO_POSITION = -1
PAD_ROLE = -1
PACKED_TOKENS = 2048
"""tokens, padding included, of a batch that is repeated to carry several interventions at once"""


@dataclass(frozen=True)
class TemplateLayout:
    """How many template positions a template has."""

    n_prefix: int
    n_suffix: int

    @classmethod
    def of(cls, prompts: Sequence[TokenizedPrompt]) -> "TemplateLayout":
        """The layout that holds all these prompts."""
        return cls(
            max(int((prompt.roles == Role.PREFIX).sum()) for prompt in prompts),
            max(int((prompt.roles == Role.SUFFIX).sum()) for prompt in prompts),
        )

    @property
    def n_template_positions(self) -> int:
        return self.n_prefix + 1 + self.n_suffix

    @property
    def roles(self) -> list[str]:
        """What effects and edges are told apart by: all of the prefix, the content, and each token of the suffix."""
        return ["prefix", "content", *(f"suffix_{number}" for number in range(self.n_suffix))]

    def template_positions(self, prompt: TokenizedPrompt) -> Int[np.ndarray, " pos"]:
        """The template position of each token of a prompt."""
        positions = np.arange(len(prompt.ids))
        end = int((prompt.roles != Role.REPLY).sum())
        from_the_end = self.n_template_positions - end + positions
        template_positions = np.full(len(prompt.ids), self.n_prefix)
        template_positions[prompt.roles == Role.PREFIX] = positions[prompt.roles == Role.PREFIX]
        template_positions[prompt.roles == Role.SUFFIX] = from_the_end[prompt.roles == Role.SUFFIX]
        return template_positions


@dataclass(frozen=True)
class Batch:
    """Prompts of similar length. Padding is on the right, so that causal attention never sees it from a real token."""

    prompts: Int[Tensor, " batch"]
    """index of each row's prompt in the list that was batched"""
    ids: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    template_positions: Int[Tensor, "batch pos"]
    """template position of each token, which is its row in the baseline's tables; `NO_POSITION` for padding"""
    roles: Int[Tensor, "batch pos"]
    """`Role` of each token; `PAD_ROLE` for padding"""
    pair: Int[Tensor, " batch"] | None = field(default=None, kw_only=True)
    """number of each row's pair, where every row is a prompt with a counterfactual (`sfc.circuits.counterfactuals`)"""

    @property
    def width(self) -> int:
        """Tokens of the longest prompt, what was run of it before included."""
        return self.ids.shape[1]

    @property
    def touchable(self) -> Bool[Tensor, "batch pos"]:
        """Tokens that may be ablated or learned from: neither padding nor the attention sink (the first token)."""
        real = self.template_positions != NO_POSITION
        real[:, 0] = False
        return real

    @property
    def run_arguments(self) -> dict[str, Any]:
        """What the model's forward pass must be told beside the tokens."""
        return {"use_cache": False}

    def select(self, rows: Int[Tensor, " rows"]) -> Self:
        """Some rows, in the order given, with their padding; a row may come more than once."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if isinstance(value, Tensor)})

    def repeat(self, times: int) -> Self:
        """The batch stacked on itself, first all rows once, then all again."""
        if times == 1:
            return self
        return self.select(torch.arange(len(self.lengths), device=self.lengths.device).repeat(times))

    def with_tables(self, tables: Int[Tensor, " batch"], layout: TemplateLayout) -> "Batch":
        """The same prompts with template positions of their own: those of the n-th of several tables."""
        own, first = self.template_positions, tables[:, None] * layout.n_template_positions
        return replace(self, template_positions=torch.where(own == NO_POSITION, NO_POSITION, own + first))

    def without_tables(self, layout: TemplateLayout) -> "Batch":
        """The same prompts with the template positions of the layout, as they were before `with_tables`."""
        own, n = self.template_positions, layout.n_template_positions
        return replace(self, template_positions=torch.where(own == NO_POSITION, NO_POSITION, own % n))

    def with_pairs(self, pair: Int[Tensor, " batch"]) -> Self:
        """The same prompts, each of them that of a pair."""
        return replace(self, pair=pair)

    def tables(self, layout: TemplateLayout) -> Int[Tensor, " batch"]:
        """Which table each row's template positions are of, as `with_tables` was told."""
        return self.template_positions.amax(1) // layout.n_template_positions

    def copies_in(self, tokens: int) -> int:
        """How many times the batch can be repeated within so many tokens, at least once."""
        return max(1, tokens // self.ids.numel())


def make_batches(
    prompts: Sequence[TokenizedPrompt], layout: TemplateLayout, batch_tokens: int, device: torch.device
) -> list[Batch]:
    """Group prompts, sorted by length, into batches of at most `batch_tokens` tokens, padding included.

    A prompt longer than the budget gets a batch of its own. Every prompt is in exactly one batch.
    """
    return [
        replace(pad([prompts[i] for i in group], layout, device), prompts=torch.tensor(group, device=device))
        for group in similar_lengths(prompts, batch_tokens)
    ]


def similar_lengths(prompts: Sequence[TokenizedPrompt], batch_tokens: int, new_tokens: int = 0) -> list[list[int]]:
    """Places of prompts, sorted by length, in groups of at most `batch_tokens` tokens, padding included.

    Args:
        new_tokens: what is generated after each prompt, and counts too.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(prompts[i].ids) + new_tokens) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad(prompts: Sequence[TokenizedPrompt], layout: TemplateLayout, device: torch.device, width: int = 0) -> Batch:
    """All prompts in one batch, in the order given, as wide as the longest or as `width`."""
    shape = len(prompts), max(width, *(len(prompt.ids) for prompt in prompts))
    ids, template_positions, roles = (np.full(shape, empty) for empty in (0, NO_POSITION, PAD_ROLE))
    for row, prompt in enumerate(prompts):
        of_prompt = (prompt.ids, layout.template_positions(prompt), prompt.roles)
        for values, given in zip((ids, template_positions, roles), of_prompt, strict=True):
            values[row, : len(prompt.ids)] = given
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    rows = (np.arange(len(prompts)), ids, lengths, template_positions, roles)
    return Batch(*(torch.from_numpy(values).to(device) for values in rows))


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
    def width(self) -> int:
        """As `Batch.width`."""
        return self.mask.shape[1]

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

    Raises:
        UserError: the model has no positions for so many tokens.
    """
    whole = flush_right(pad(prompts, TemplateLayout.of(prompts), model.device, n_suffix))
    model.check_room(whole.width)
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
