"""When features fire: their strongest contexts, how strongly, and on which prompts, in one pass over the store.

Rows are read block by block, and what is kept does not grow with the store: per feature a histogram, sums over groups
of prompts, the strongest prompts with the values around the strongest token, and the values at rows that are asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sfc.saes.dictionary import Dictionary
from sfc.saes.store import Store

BEFORE, AFTER = 15, 8
"""tokens of a context before and after its strongest one"""
_BLOCK_ROWS = 4096
_BINS_PER_OCTAVE, _SMALLEST, _OCTAVES = 2, 2.0**-20, 60
BIN_EDGES = _SMALLEST * 2.0 ** (np.arange(_BINS_PER_OCTAVE * _OCTAVES + 1) / _BINS_PER_OCTAVE)
"""two bins per octave, so that the range need not be known beforehand; what lies outside is in the outermost ones"""


class Activity(NamedTuple):
    """What one pass finds of some features of a dictionary. Entries of no context have the row -1 and values 0."""

    peak_rows: Int[np.ndarray, "features contexts"]
    """rows of the store at which each feature is strongest, each in another prompt, strongest first"""
    windows: Float[np.ndarray, "features contexts window"]
    """values at the rows `peak - BEFORE` to `peak + AFTER`; 0 outside of the prompt"""
    counts: Int[np.ndarray, "features bins"]
    """tokens at which the feature is active, by its value, in the bins of `BIN_EDGES`"""
    firing: Float[np.ndarray, "features groups"]
    """the share of a group's prompts in which the feature is active at some token"""
    mean_peak: Float[np.ndarray, "features groups"]
    """the feature's largest value in a prompt, averaged over the group's prompts"""
    kept: Float[np.ndarray, "kept features"]
    """values at the rows that are kept, in their order"""


@torch.no_grad()
def activity(
    store: Store,
    dictionary: Dictionary,
    features: Sequence[int],
    group_of_prompt: Int[np.ndarray, " prompts"],
    is_kept: Bool[np.ndarray, " rows"],
    n_contexts: int = 8,
    block_rows: int = _BLOCK_ROWS,
) -> Activity:
    """Stream a site of the store through its dictionary, and keep what `Activity` says of these features.

    Args:
        group_of_prompt: for each prompt of the store the number of its group; groups are numbered from 0.
        is_kept: for each row of the store whether its values are kept.
        block_rows: rows that are in memory at once; a longer prompt is read whole.
    """
    n_groups = int(group_of_prompt.max()) + 1
    strongest = _Strongest(len(features), n_contexts)
    counts = np.zeros((len(features), len(BIN_EDGES) - 1), dtype=np.int64)
    fired, peak_sums = np.zeros((2, len(features), n_groups))
    prompts_seen = np.zeros(n_groups)
    kept: list[np.ndarray] = []
    for start, stop in prompt_blocks(store, block_rows):
        values = _values(store, dictionary, features, start, stop)
        prompt_of_row = store.tokens.prompt[start:stop]
        starts = _prompt_starts(prompt_of_row)
        groups = group_of_prompt[prompt_of_row[starts]]
        peaks = np.maximum.reduceat(values, starts)
        strongest.update(values, starts, start)
        _count(values, counts)
        kept.append(values[is_kept[start:stop]])
        prompts_seen += np.bincount(groups, minlength=n_groups)
        for group in np.unique(groups):
            fired[:, group] += (peaks[groups == group] > 0).sum(0)
            peak_sums[:, group] += peaks[groups == group].sum(0, dtype=np.float64)
    seen = np.maximum(prompts_seen, 1)
    of_groups = (fired / seen, peak_sums / seen)
    return Activity(strongest.rows, strongest.windows, counts, *of_groups, np.concatenate(kept))


def prompt_blocks(store: Store, block_rows: int) -> list[tuple[int, int]]:
    """Row ranges of whole prompts, none across two shards, each of at most `block_rows` rows or of a single prompt."""
    blocks: list[tuple[int, int]] = []
    for first, last in store.ranges(0, store.n_tokens):
        borders = [first + int(start) for start in _prompt_starts(store.tokens.prompt[first:last])] + [last]
        start = first
        for border, following in zip(borders[1:], [*borders[2:], None], strict=True):
            if following is None or following - start > block_rows:
                blocks.append((start, border))
                start = border
    return blocks


class _Strongest:
    """The strongest prompts of each feature so far; of equal ones those that came first."""

    def __init__(self, n_features: int, n_contexts: int) -> None:
        self.rows = np.full((n_features, n_contexts), -1)
        self.windows = np.zeros((n_features, n_contexts, BEFORE + 1 + AFTER), dtype=np.float32)
        self._peaks = np.zeros((n_features, n_contexts), dtype=np.float32)

    def update(
        self, values: Float[np.ndarray, "rows features"], starts: Int[np.ndarray, " prompts"], first_row: int
    ) -> None:
        n_contexts = self.rows.shape[1]
        stops = [*starts[1:], len(values)]
        tops = np.array([start + values[start:stop].argmax(0) for start, stop in zip(starts, stops, strict=True)])
        peaks = np.take_along_axis(values, tops, axis=0)
        best = np.argsort(-peaks, axis=0, kind="stable")[:n_contexts].T
        rows = np.take_along_axis(tops.T, best, axis=1)
        windows = self._windows(values, rows, np.asarray(starts)[best], np.asarray(stops)[best])
        all_peaks = np.concatenate([self._peaks, np.take_along_axis(peaks.T, best, axis=1)], axis=1)
        order = np.argsort(-all_peaks, axis=1, kind="stable")[:, :n_contexts]
        self._peaks = np.take_along_axis(all_peaks, order, axis=1)
        self.rows = np.take_along_axis(np.concatenate([self.rows, rows + first_row], axis=1), order, axis=1)
        self.rows[self._peaks <= 0] = -1
        both = np.concatenate([self.windows, windows], axis=1)
        self.windows = np.take_along_axis(both, order[..., None], axis=1)
        self.windows[self._peaks <= 0] = 0

    @staticmethod
    def _windows(
        values: Float[np.ndarray, "rows features"],
        peaks: Int[np.ndarray, "features best"],
        starts: Int[np.ndarray, "features best"],
        stops: Int[np.ndarray, "features best"],
    ) -> Float[np.ndarray, "features best window"]:
        rows = peaks[..., None] + np.arange(-BEFORE, AFTER + 1)
        inside: Bool[np.ndarray, "features best window"] = (rows >= starts[..., None]) & (rows < stops[..., None])
        features = np.arange(values.shape[1])[:, None, None]
        return np.where(inside, values[np.clip(rows, 0, len(values) - 1), features], 0)


def _values(
    store: Store, dictionary: Dictionary, features: Sequence[int], start: int, stop: int
) -> Float[np.ndarray, "rows features"]:
    """The values of these features at these rows."""
    sparse = dictionary.encode_sparse(store.read(dictionary.reads, start, stop).to(dictionary.W_dec.device))
    entry_values, indices = sparse.values.cpu().numpy(), sparse.indices.cpu().numpy()
    column = np.full(dictionary.d_sae, -1)
    column[list(features)] = np.arange(len(features))
    rows, entries = np.nonzero((column[indices] >= 0) & (entry_values > 0))
    values = np.zeros((stop - start, len(features)), dtype=np.float32)
    values[rows, column[indices[rows, entries]]] = entry_values[rows, entries]
    return values


def _count(values: Float[np.ndarray, "rows features"], counts: Int[np.ndarray, "features bins"]) -> None:
    """Add the values that are not 0 to the histograms."""
    rows, features = np.nonzero(values)
    bins = np.searchsorted(BIN_EDGES, values[rows, features], side="right") - 1
    np.add.at(counts, (features, np.clip(bins, 0, counts.shape[1] - 1)), 1)


def _prompt_starts(prompt_of_row: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " prompts"]:
    """Where prompts begin; the rows of a prompt stand together."""
    return np.flatnonzero(np.diff(prompt_of_row, prepend=-1))
