"""Patch many pairs, in one direction and at one set of positions: exactly, and to first order beside it."""

from collections.abc import Sequence

import numpy as np

from sfc.models.loading import Model
from sfc.models.score import RefusalScore
from sfc.patching.activation_patching import Progress, make_transplant, patched_scores
from sfc.patching.components import Patch
from sfc.patching.first_order import first_order_changes
from sfc.patching.ranking import PatchRuns
from sfc.patching.selection import TokenizedPair, unaligned


def patch_pairs(
    model: Model,
    pairs: Sequence[TokenizedPair],
    direction: str,
    positions: str,
    patches: Sequence[Patch],
    batch_tokens: int,
    progress: Progress = lambda runs: None,
) -> PatchRuns:
    """Patch the clean runs into the corrupted ones (`denoise`) or the other way round (`noise`).

    A pair that cannot be aligned at these positions is left out; the result names the pairs that were not.

    Args:
        batch_tokens: tokens per run, padding included.
        progress: called with the number of patched runs done since the last call, one per patch and pair.
    """
    score = RefusalScore.of(model)
    usable = [number for number, pair in enumerate(pairs) if unaligned(positions, pair) is None]
    order = sorted(usable, key=lambda number: max(len(prompt.ids) for prompt in pairs[number]))
    sites = list(dict.fromkeys(site for patch in patches for site in patch.sites))
    base, source = np.empty(len(order)), np.empty(len(order))
    patched, first_order = np.empty((len(patches), len(order))), np.empty((len(patches), len(order)))
    done = 0
    for group in _groups([pairs[number] for number in order], batch_tokens):
        both = [pair if direction == "noise" else (pair.corrupted, pair.clean) for pair in group]
        transplant = make_transplant(model, score, both, positions, sites)
        columns = slice(done, done := done + len(group))
        base[columns] = transplant.base_score.cpu().numpy()
        source[columns] = transplant.source_score.cpu().numpy()
        patched[:, columns] = patched_scores(model, score, transplant, patches, batch_tokens, progress)
        first_order[:, columns] = first_order_changes(model, score, transplant, patches)
    return PatchRuns(direction, positions, patches, order, base, source, patched, first_order)


def _groups(pairs: Sequence[TokenizedPair], batch_tokens: int) -> list[list[TokenizedPair]]:
    """Pairs, sorted by length, in batches of at most `batch_tokens` tokens; a longer pair is a batch of its own."""
    groups: list[list[TokenizedPair]] = []
    for pair in pairs:
        longest = max(len(prompt.ids) for prompt in pair)
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups
