"""What a store will hold, known before anything is run: its batches, their rows, and the shards they are in.

Kept are content, suffix and reply tokens: the fixed template prefix is the same in every prompt, the first token is an
attention sink, and padding is nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from sfc.core.config import ActivationsConfig
from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout, make_batches


class TokenTable(NamedTuple):
    """What each row of a store is."""

    prompt: Int[np.ndarray, " rows"]
    """index of the prompt in the store's prompt table"""
    position: Int[np.ndarray, " rows"]
    token: Int[np.ndarray, " rows"]
    role: Int[np.ndarray, " rows"]


class PlannedBatch(NamedTuple):
    """A batch to be run, and the rows it gives."""

    batch: Batch
    tokens: TokenTable

    @property
    def n_rows(self) -> int:
        return len(self.tokens.prompt)

    @property
    def n_tokens(self) -> int:
        """Tokens run, padding not counted."""
        return int(self.batch.lengths.sum())


def plan_batches(
    prompts: Sequence[TokenizedPrompt], config: ActivationsConfig, device: torch.device
) -> list[PlannedBatch]:
    """Batches of similar length within the token budget, in the order in which they are run."""
    batches = make_batches(prompts, TemplateLayout.of(prompts), config.batch_tokens, device)
    return [PlannedBatch(batch, _stored_tokens(batch, prompts)) for batch in batches]


def plan_shards(batches: Sequence[PlannedBatch], shard_tokens: int) -> list[list[PlannedBatch]]:
    """Consecutive batches of at most `shard_tokens` rows together; a larger batch has a shard of its own."""
    shards: list[list[PlannedBatch]] = []
    rows = 0
    for batch in batches:
        if not shards or rows + batch.n_rows > shard_tokens:
            shards.append([])
            rows = 0
        shards[-1].append(batch)
        rows += batch.n_rows
    return shards


def joined(tables: Sequence[TokenTable]) -> TokenTable:
    """The rows of several tables, one after another."""
    return TokenTable(*(np.concatenate(column) for column in zip(*tables, strict=True)))


def _stored_tokens(batch: Batch, prompts: Sequence[TokenizedPrompt]) -> TokenTable:
    tables = []
    for index in batch.prompts.tolist():
        prompt = prompts[index]
        kept = np.flatnonzero(prompt.roles != Role.PREFIX)
        kept = kept[kept > 0]
        tables.append(TokenTable(np.full(len(kept), index), kept, prompt.ids[kept], prompt.roles[kept]))
    return joined(tables)
