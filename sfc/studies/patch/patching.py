"""Activation patching: put activations of one run into another and see how far the score follows (Vig et al. 2020).

Denoising puts activations of the clean run into the corrupted one: what suffices to bring the refusal back? Noising
puts those of the corrupted run into the clean one: what is needed for it? One is the other with the prompts swapped, so
that here a *base* run is patched with activations of a *source* run, and the effect is

    (s_patched - s_base) / (s_source - s_base)

which is 0 where nothing changes and 1 where the score becomes the source's (Heimersheim and Nanda 2024).

Only the tokens from the first patched one on are run (`KVCachedSuffix`), and patches are packed as all edits are
(`sfc.models.engine`).

Attribution patching estimates every patch's effect from one backward pass (Nanda 2023; Kramár et al. 2024). With
g = ds/dx at the base run, replacing x by the source's x' moves the score by about `sum g . (x' - x)` over the replaced
positions. That costs one run forwards and one backwards for all patches together, and is right as far as the score is
linear between the two runs; `sfc patch` shows it beside the exact effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.data.render import TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import cache_suffixes
from sfc.models.edits import Replacement, Replacements
from sfc.models.engine import PreparedPrompts, Progress
from sfc.models.interventions import leaf_recorder, recorder
from sfc.models.loading import Model
from sfc.models.score import Score, score_batch
from sfc.studies.patch.alignment import align
from sfc.studies.patch.components import Patch
from sfc.studies.patch.ranking import PatchRuns
from sfc.studies.patch.selection import TokenizedPair, unaligned


@dataclass(frozen=True)
class Transplant:
    """Runs ready to be patched at one set of positions, and the activations to put there."""

    base: PreparedPrompts
    """one batch of suffixes"""
    replaced: Bool[Tensor, "pair pos"]
    """the positions of the base suffixes where activations are replaced"""
    values: Mapping[str, Float[Tensor, "pair pos width"]]
    """for each site, what stands at the corresponding positions of the source runs; elsewhere it means nothing"""
    base_score: Float[Tensor, " pair"]
    source_score: Float[Tensor, " pair"]


@torch.no_grad()
def make_transplant(
    model: Model,
    score: Score,
    pairs: Sequence[tuple[TokenizedPrompt, TokenizedPrompt]],
    positions: str,
    sites: Sequence[str],
) -> Transplant:
    """Run base and source prompts once each, and keep what patching at these sites and positions needs.

    Args:
        pairs: base and source prompt of each pair.
        positions: name of a position set (see `sfc.studies.patch.alignment`).

    Raises:
        Unalignable: a pair cannot be aligned at these positions.
    """
    aligned = [align(positions, *pair) for pair in pairs]
    n_suffix = max(
        len(prompt.ids) - int(where.min())
        for pair, both in zip(pairs, aligned, strict=True)
        for prompt, where in zip(pair, both, strict=True)
    )
    base, source = (cache_suffixes(model, prompts, n_suffix) for prompts in zip(*pairs, strict=True))
    replaced = torch.zeros(base.ids.shape, dtype=torch.bool)
    read = torch.zeros(base.ids.shape, dtype=torch.long)
    for row, (pair, both) in enumerate(zip(pairs, aligned, strict=True)):
        into, out_of = (where + n_suffix - len(prompt.ids) for prompt, where in zip(pair, both, strict=True))
        replaced[row, into] = True
        read[row, into] = torch.from_numpy(out_of)
    activations: dict[str, Tensor] = {}
    source_score = score_batch(model, score, source, {site: recorder(activations, site) for site in sites})
    rows, read = torch.arange(len(pairs), device=model.device)[:, None], read.to(model.device)
    return Transplant(
        base=PreparedPrompts.of(model, [base]),
        replaced=replaced.to(model.device),
        values={site: activation[rows, read] for site, activation in activations.items()},
        base_score=score_batch(model, score, base),
        source_score=source_score,
    )


def patched_scores(
    model: Model,
    score: Score,
    transplant: Transplant,
    patches: Sequence[Patch],
    batch_tokens: int,
    progress: Progress = lambda runs: None,
) -> Float[np.ndarray, "patches pairs"]:
    """The score of every base run under every patch, in nats.

    Args:
        batch_tokens: tokens per packed run, padding included; at least one patch goes through at a time.
        progress: called with the number of patched runs done since the last call, one per patch and pair.
    """
    replacements = [
        Replacement(patch.sites, part_of(model, patch, transplant.values[patch.sites[0]].shape[-1]))
        for patch in patches
    ]
    edits = Replacements(replacements, transplant.replaced, transplant.values)
    return engine.scores(transplant.base, score, edits, progress, batch_tokens)


def part_of(model: Model, patch: Patch, width: int) -> slice:
    """The part of an activation of this width that a patch replaces: one head's share of all heads', or all of it."""
    if patch.head is None:
        return slice(None)
    d_head = width // model.bridge.cfg.n_heads
    return slice(patch.head * d_head, (patch.head + 1) * d_head)


def attribution_patching(
    model: Model, score: Score, transplant: Transplant, patches: Sequence[Patch]
) -> Float[np.ndarray, "patches pairs"]:
    """By how much each patch should change the score of each base run, in nats; NaN for ranges of layers.

    Effects of a range do not add up: its later layers replace what its earlier ones changed.
    """
    seen: dict[str, Tensor] = {}
    sites = dict.fromkeys(patch.sites[0] for patch in patches if not patch.is_range)
    with torch.enable_grad():
        interventions = {site: leaf_recorder(seen, site) for site in sites}
        score_batch(model, score, transplant.base.batches[0], interventions).sum().backward()
    products = {site: _product(transplant, site, x) for site, x in seen.items()}
    changes = np.full((len(patches), len(transplant.base_score)), np.nan)
    for row, patch in enumerate(patches):
        if not patch.is_range:
            product = products[patch.sites[0]]
            changes[row] = product[:, part_of(model, patch, product.shape[1])].sum(1).cpu().numpy()
    return changes


@torch.no_grad()
def _product(transplant: Transplant, site: str, x: Tensor) -> Float[Tensor, "pair width"]:
    """g . (x' - x) per dimension, summed over the replaced positions."""
    assert x.grad is not None
    difference = (transplant.values[site] - x).float() * transplant.replaced[..., None]
    return (x.grad.float() * difference).sum(1)


def patch_pairs(
    model: Model,
    score: Score,
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
    usable = [number for number, pair in enumerate(pairs) if unaligned(positions, pair) is None]
    order = sorted(usable, key=lambda number: max(len(prompt.ids) for prompt in pairs[number]))
    sites = list(dict.fromkeys(site for patch in patches for site in patch.sites))
    base, source = np.empty(len(order)), np.empty(len(order))
    patched, attribution = np.empty((len(patches), len(order))), np.empty((len(patches), len(order)))
    done = 0
    for group in _groups([pairs[number] for number in order], batch_tokens):
        both = [pair if direction == "noise" else (pair.corrupted, pair.clean) for pair in group]
        transplant = make_transplant(model, score, both, positions, sites)
        columns = slice(done, done := done + len(group))
        base[columns] = transplant.base_score.cpu().numpy()
        source[columns] = transplant.source_score.cpu().numpy()
        patched[:, columns] = patched_scores(model, score, transplant, patches, batch_tokens, progress)
        attribution[:, columns] = attribution_patching(model, score, transplant, patches)
    return PatchRuns(direction, positions, patches, order, base, source, patched, attribution)


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
