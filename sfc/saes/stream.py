"""A shuffled, endless stream of activations for training, whose memory is bounded.

A `RowSource` has the rows in blocks, which are read from a store or made by running the model again. Both have the same
blocks, so that training sees the same batches either way.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from sfc.core.errors import UserError
from sfc.models.loading import Model
from sfc.saes.collect import activations_of
from sfc.saes.plan import PlannedBatch
from sfc.saes.store import Store

BLOCKS_PER_BUFFER = 16


@dataclass(frozen=True)
class RowSource:
    """Rows in blocks: how many there are, and how to get those of one block."""

    starts: Int[np.ndarray, " blocks+1"]
    """first row of each block, and the number of rows"""
    read: Callable[[int], Float[Tensor, "sites block d"]]
    """the rows of a block, in float32"""

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])


def stored_source(store: Store, sites: Sequence[str], block_rows: int) -> RowSource:
    """The rows of a store, in blocks of whole batches."""
    starts = _block_starts(np.append(store.batch_starts, store.n_tokens), block_rows)

    def read(block: int) -> Tensor:
        ranges = store.ranges(int(starts[block]), int(starts[block + 1]))
        return torch.stack([torch.cat([store.read(site, *rows) for rows in ranges]) for site in sites])

    return RowSource(starts, read)


def live_source(
    model: Model, batches: Sequence[PlannedBatch], sites: Sequence[str], dtype: torch.dtype, block_rows: int
) -> RowSource:
    """The rows that a store of these batches would hold, made by running the model whenever they are asked for."""
    first_rows = np.cumsum([0, *(batch.n_rows for batch in batches)])
    starts = _block_starts(first_rows, block_rows)

    def read(block: int) -> Tensor:
        first, last = np.searchsorted(first_rows, [starts[block], starts[block + 1]])
        runs = [activations_of(model, batch, sites, dtype) for batch in batches[first:last]]
        return torch.stack([torch.cat([run[site] for run in runs]).float().cpu() for site in sites])

    return RowSource(starts, read)


def shuffled_batches(
    source: RowSource,
    wanted: Real[np.ndarray, " rows"] | Bool[np.ndarray, " rows"],
    batch_size: int,
    seed: int,
    buffer_rows: int,
    first_step: int = 0,
) -> Iterator[Float[Tensor, "sites batch d"]]:
    """Random batches of the wanted rows, each as often as it is wanted, epoch after epoch, without end.

    An epoch goes through the blocks in random order, `buffer_rows` rows at a time, and shuffles each such buffer: with
    blocks of a sixteenth of it, batches mix many prompts. What does not fill a batch is left out of that epoch. Memory,
    in float32: two buffers (the next is read while one is used) and a few copies of a block. Where there are n buffers
    in an epoch, each has up to 1 + 1/n times `buffer_rows` rows and a block.

    Args:
        wanted: how often each row comes in an epoch: 1 is once, 0 never, and 2.5 twice or three times.
        first_step: the stream begins with this batch of it, as if those before had been taken.

    Raises:
        UserError: there are fewer wanted rows than a batch has.
    """
    if np.floor(wanted).sum() < batch_size:
        raise UserError(
            f"{int(wanted.sum())} rows to train on are fewer than a batch of {batch_size}: --set saes.batch_size=…"
        )
    buffers = _from_step(_endless_buffers(source, wanted, batch_size, seed, buffer_rows), first_step)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(_read, source, wanted, *next(buffers))
        while True:
            buffer, order = ahead.result()
            ahead = reader.submit(_read, source, wanted, *next(buffers))
            for rows in order:
                yield buffer[:, rows]
            del buffer


def _endless_buffers(
    source: RowSource, wanted: np.ndarray, batch_size: int, seed: int, buffer_rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each buffer its blocks, and the rows of each batch from it: a function of the arguments alone."""
    borders, is_wanted = source.starts[1:-1], wanted > 0
    for epoch in range(np.iinfo(np.int64).max):
        random, chances = np.random.default_rng([seed, epoch]), np.random.default_rng([seed, epoch, 1])
        times = np.floor(wanted + chances.random(len(wanted))).astype(np.int64)
        often = [
            rows[kept] for rows, kept in zip(*(np.split(each, borders) for each in (times, is_wanted)), strict=True)
        ]
        counts = np.array([rows.sum() for rows in often])
        for blocks in _groups(random.permutation(len(counts)), counts, batch_size, buffer_rows):
            in_buffer = np.concatenate([often[block] for block in blocks])
            rows = np.repeat(np.arange(len(in_buffer)), in_buffer)[random.permutation(counts[blocks].sum())]
            whole = rows[: len(rows) - len(rows) % batch_size]
            yield blocks, rearrange(whole, "(batches rows) -> batches rows", rows=batch_size)


def _groups(order: np.ndarray, counts: np.ndarray, batch_size: int, buffer_rows: int) -> list[np.ndarray]:
    """Consecutive blocks in as many groups as buffers are needed, each with about as many wanted rows as the others."""
    total = int(counts.sum())
    size = total / max(total // max(buffer_rows, batch_size), 1)
    ends, rows, left = [], 0, total
    for end, count in enumerate(counts[order], start=1):
        rows += count
        if rows >= size and left - rows >= batch_size:
            ends.append(end)
            left -= rows
            rows = 0
    return np.split(order, ends)


def _from_step(buffers: Iterator[tuple[np.ndarray, np.ndarray]], step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for blocks, batches in buffers:
        if step < len(batches):
            yield blocks, batches[step:]
        step = max(step - len(batches), 0)


def _read(source: RowSource, wanted: np.ndarray, blocks: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
    """The wanted rows of the blocks in one tensor, which is filled block by block so that none is held twice."""
    keep = [torch.from_numpy(wanted[source.starts[block] : source.starts[block + 1]] > 0) for block in blocks]
    ends = np.cumsum([int(rows.sum()) for rows in keep])
    buffer = torch.empty(0)
    for block, rows, end in zip(blocks, keep, ends, strict=True):
        read = source.read(int(block))[:, rows]
        if not buffer.numel():
            buffer = torch.empty(read.shape[0], int(ends[-1]), read.shape[2])
        buffer[:, end - read.shape[1] : end] = read
    return buffer, torch.from_numpy(order)


def _block_starts(first_rows: Int[np.ndarray, " batches+1"], block_rows: int) -> Int[np.ndarray, " blocks+1"]:
    """Where blocks of consecutive batches begin, each of at least `block_rows` rows but for the last."""
    starts = [0]
    for row in first_rows[1:-1]:
        if row - starts[-1] >= block_rows:
            starts.append(int(row))
    return np.array([*starts, int(first_rows[-1])])
