"""Batches of tokenized prompts, padded on the right, with what aligns them: slots.

A *slot* is a position that means the same in every prompt: each token of the template's prefix (counted from the
start) and of its suffix (counted from its end) has its own, and all content and reply tokens share one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sfc.data.render import Role, TokenizedPrompt

PAD_SLOT = -1
PACKED_TOKENS = 2048
"""tokens, padding included, of a batch that is repeated to carry several interventions at once"""


@dataclass(frozen=True)
class SlotLayout:
    """How many slots a template makes."""

    n_prefix: int
    n_suffix: int

    @classmethod
    def of(cls, prompts: Sequence[TokenizedPrompt]) -> "SlotLayout":
        """The layout that holds all these prompts."""
        return cls(
            max(int((prompt.roles == Role.PREFIX).sum()) for prompt in prompts),
            max(int((prompt.roles == Role.SUFFIX).sum()) for prompt in prompts),
        )

    @property
    def n_slots(self) -> int:
        return self.n_prefix + 1 + self.n_suffix

    def slots(self, prompt: TokenizedPrompt) -> Int[np.ndarray, " pos"]:
        """The slot of each token of a prompt."""
        positions = np.arange(len(prompt.ids))
        end = int((prompt.roles != Role.REPLY).sum())
        from_the_end = self.n_slots - end + positions
        slots = np.full(len(prompt.ids), self.n_prefix)
        slots[prompt.roles == Role.PREFIX] = positions[prompt.roles == Role.PREFIX]
        slots[prompt.roles == Role.SUFFIX] = from_the_end[prompt.roles == Role.SUFFIX]
        return slots


@dataclass(frozen=True)
class Batch:
    """Prompts of similar length. Padding is on the right, so that causal attention never sees it from a real token."""

    prompts: Int[Tensor, " batch"]
    """index of each row's prompt in the list that was batched"""
    ids: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    slots: Int[Tensor, "batch pos"]
    """slot of each token, which is its row in the reference's tables; `PAD_SLOT` for padding"""

    @property
    def touchable(self) -> Bool[Tensor, "batch pos"]:
        """Tokens that may be ablated or learned from: neither padding nor the attention sink (the first token)."""
        real = self.slots != PAD_SLOT
        real[:, 0] = False
        return real

    @property
    def run_arguments(self) -> dict[str, Any]:
        """What the model's forward pass must be told beside the tokens."""
        return {"use_cache": False}

    def select(self, rows: Int[Tensor, " rows"]) -> "Batch":
        """Some rows of the batch, with its padding."""
        return Batch(self.prompts[rows], self.ids[rows], self.lengths[rows], self.slots[rows])

    def with_tables(self, tables: Int[Tensor, " batch"], layout: SlotLayout) -> "Batch":
        """The same prompts with slots of their own: those of the n-th of several tables, one below the other."""
        shifted = self.slots + tables[:, None] * layout.n_slots
        return replace(self, slots=torch.where(self.slots == PAD_SLOT, PAD_SLOT, shifted))

    def without_tables(self, layout: SlotLayout) -> "Batch":
        """The same prompts with the slots of the layout, as they were before `with_tables`."""
        return replace(self, slots=torch.where(self.slots == PAD_SLOT, PAD_SLOT, self.slots % layout.n_slots))

    def tables(self, layout: SlotLayout) -> Int[Tensor, " batch"]:
        """Which table each row's slots are of, as `with_tables` was told. The first token is never padding."""
        return self.slots[:, 0] // layout.n_slots

    def copies_in(self, tokens: int) -> int:
        """How many times the batch can be repeated within so many tokens, at least once."""
        return max(1, tokens // self.ids.numel())

    def repeat(self, times: int) -> "Batch":
        """The batch stacked on itself, first all rows once, then all again."""
        return Batch(
            self.prompts.repeat(times),
            self.ids.repeat(times, 1),
            self.lengths.repeat(times),
            self.slots.repeat(times, 1),
        )


def make_batches(
    prompts: Sequence[TokenizedPrompt], layout: SlotLayout, batch_tokens: int, device: torch.device
) -> list[Batch]:
    """Group prompts, sorted by length, into batches of at most `batch_tokens` tokens, padding included.

    A prompt longer than the budget gets a batch of its own. Every prompt is in exactly one batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    groups: list[list[int]] = []
    for i in order:
        if groups and len(prompts[i].ids) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_pad(group, prompts, layout, device) for group in groups]


def _pad(group: list[int], prompts: Sequence[TokenizedPrompt], layout: SlotLayout, device: torch.device) -> Batch:
    longest = max(len(prompts[i].ids) for i in group)
    ids = np.zeros((len(group), longest), dtype=np.int64)
    slots = np.full((len(group), longest), PAD_SLOT, dtype=np.int64)
    for row, i in enumerate(group):
        length = len(prompts[i].ids)
        ids[row, :length] = prompts[i].ids
        slots[row, :length] = layout.slots(prompts[i])
    lengths = torch.tensor([len(prompts[i].ids) for i in group], device=device)
    return Batch(
        torch.tensor(group, device=device),
        torch.from_numpy(ids).to(device),
        lengths,
        torch.from_numpy(slots).to(device),
    )
