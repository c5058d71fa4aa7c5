"""Activation patching: put activations of one run into another and see how far the score follows (Vig et al. 2020).

A data set's labels say what a model should do, not what it does. So both prompts of a pair are answered, the replies
are judged, and a pair is used only if its prompts can be aligned, and the clean one is refused and the corrupted one
complied with (or whatever the behavior is). A model that never refuses has no such pairs; for it there is the
requirement `score`, which asks only that the score is higher on the clean side. What is found that way is a mechanism
of the score, not of a behaviour, and must be called so.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.behaviors.behavior import BEHAVIORS, Words
from sfc.core.config import Experiment
from sfc.data.render import TokenizedPrompt
from sfc.data.schema import prompt_ids
from sfc.models import engine
from sfc.models.batches import TemplateLayout, cache_suffixes, make_batches, similar_lengths
from sfc.models.edits import Replacement, Replacements
from sfc.models.engine import PreparedPrompts, Progress
from sfc.models.generation import generate_replies
from sfc.models.interventions import leaf_recorder, recorder
from sfc.models.judge import judged_somewhere
from sfc.models.loading import Model
from sfc.models.score import Score, score_batch, score_prompts
from sfc.studies.patch import Candidates, Pair, PatchingOptions
from sfc.studies.patch.alignment import Unalignable, align, expand
from sfc.studies.patch.ranking import Patch, PatchRuns


class TokenizedPair(NamedTuple):
    """A pair as the model reads it."""

    clean: TokenizedPrompt
    corrupted: TokenizedPrompt


class Conduct(NamedTuple):
    """What the model does with a prompt."""

    score: float
    """in nats"""
    reply: str | None = None
    """what it says, without the words put into its mouth; None where it was not asked"""
    refused: bool | None = None
    """whether the reply shows the behavior"""
    complied: bool | None = None
    """that no sentence of the reply shows it; a reply may be neither, refused only after it began to comply"""


def objection(clean: Conduct, corrupted: Conduct, words: Words) -> str | None:
    """Why a pair cannot be used, or None: by the replies where the model was asked for them, else by the score."""
    if clean.refused is None:
        return None if clean.score > corrupted.score else "the clean prompt has no higher score"
    if not clean.refused:
        return f"the clean prompt was not {words.acted}"
    if corrupted.refused:
        return f"the corrupted prompt was {words.acted}"
    return None if corrupted.complied else f"the corrupted prompt was {words.acted} after all"


_NOT_ASKED = Conduct(math.nan)


class Selection(NamedTuple):
    """What became of the candidates."""

    pairs: list[TokenizedPair]
    """those used, in the order of the table"""
    table: pd.DataFrame
    """one row per clean prompt: `category, wrapper, clean, corrupted, prefill, clean_id, corrupted_id, used, lost` (why
    it was lost, else blank), and for either side, as `clean_…` and `corrupted_…`, `refused, complied, score, reply`
    (missing where the model was not asked)"""


@dataclass
class _Case:
    """One clean prompt and the pairs it is in, while a pair that serves is looked for."""

    left: list[tuple[Pair, TokenizedPair]]
    """pairs that were not tried yet"""
    pair: Pair
    """the pair that was tried last"""
    tokens: TokenizedPair
    lost: str | None
    """why that pair does not serve"""
    clean: Conduct = _NOT_ASKED
    corrupted: Conduct = _NOT_ASKED

    def row(self) -> dict[str, object]:
        """The case's row of `Selection.table`."""
        pair, sides = self.pair, {"clean": self.clean, "corrupted": self.corrupted}
        clean_id, corrupted_id = prompt_ids([pair.clean, pair.corrupted])
        conduct = {
            f"{side}_{field}": getattr(conduct, field) for field in Conduct._fields for side, conduct in sides.items()
        }
        return {
            "category": pair.category,
            "wrapper": pair.wrapper,
            "clean": pair.clean,
            "corrupted": pair.corrupted,
            "prefill": pair.prefill,
            "clean_id": clean_id,
            "corrupted_id": corrupted_id,
            "used": self.lost is None,
            "lost": self.lost or "",
            **conduct,
        }


def select_pairs(model: Model, candidates: Sequence[Candidates], experiment: Experiment) -> Selection:
    """For each clean prompt the first of its pairs that can be aligned, is short enough and meets the requirement."""
    words = BEHAVIORS[experiment.behavior].words
    cases = [_case(model, group, experiment) for group in candidates]
    trying = [case for case in cases if case.left]
    prompts = [case.tokens.clean for case in trying]
    for case, conduct in zip(trying, _conduct(model, prompts, [""] * len(trying), experiment), strict=True):
        case.clean = conduct
    while trying:
        for case in trying:
            case.pair, case.tokens = case.left.pop(0)
        prompts, prefills = [case.tokens.corrupted for case in trying], [case.pair.prefill for case in trying]
        for case, conduct in zip(trying, _conduct(model, prompts, prefills, experiment), strict=True):
            case.corrupted, case.lost = conduct, objection(case.clean, conduct, words)
        trying = [case for case in trying if case.lost and case.left]
    used = [case.tokens for case in cases if case.lost is None]
    return Selection(used, pd.DataFrame([case.row() for case in cases]))


def _case(model: Model, group: Candidates, experiment: Experiment) -> _Case:
    """A case with those pairs left to try that may serve, as far as can be said without running the model."""
    pairs = list(zip(group, tokenize_pairs(model, group), strict=True))
    limits = PatchingOptions.of(experiment).position_sets, experiment.prompts.max_tokens
    objections = [_static_objection(tokens, *limits) for _, tokens in pairs]
    left = [pair for pair, reason in zip(pairs, objections, strict=True) if reason is None]
    return _Case(left, *pairs[0], lost=objections[0])


def tokenize_pairs(model: Model, pairs: Sequence[Pair]) -> list[TokenizedPair]:
    """Render both prompts of each pair, the corrupted one with the reply that is begun for the model."""
    clean = model.tokenize([pair.clean for pair in pairs])
    corrupted = [model.tokenize([pair.corrupted], pair.prefill)[0] for pair in pairs]
    return [TokenizedPair(*both) for both in zip(clean, corrupted, strict=True)]


def _static_objection(pair: TokenizedPair, positions: Sequence[str], max_tokens: int) -> str | None:
    """Why a pair cannot be used, whatever the model does with it."""
    longest = max(len(prompt.ids) for prompt in pair)
    if longest > max_tokens:
        return f"longer than {max_tokens} tokens"
    if np.array_equal(pair.clean.ids, pair.corrupted.ids):
        return "the two prompts are the same"
    problems = [unaligned(name, pair) for name in expand(positions, [pair])]
    return None if None in problems else f"cannot be aligned ({'; '.join(filter(None, problems))})"


def unaligned(name: str, pair: TokenizedPair) -> str | None:
    """Why a pair cannot be aligned at a set of positions, or None."""
    try:
        align(name, *pair)
    except Unalignable as problem:
        return str(problem)
    return None


def _conduct(
    model: Model, prompts: Sequence[TokenizedPrompt], prefills: Sequence[str], experiment: Experiment
) -> list[Conduct]:
    """What the model does with each prompt, whose reply begins with its prefill."""
    if not prompts:
        return []
    options, behavior = PatchingOptions.of(experiment), BEHAVIORS[experiment.behavior]
    batch_tokens, judge = experiment.activations.batch_tokens, behavior.judge()
    batches = make_batches(prompts, TemplateLayout.of(prompts), batch_tokens, model.device)
    scores = score_prompts(model, behavior.metric(model, experiment), batches).tolist()
    if options.require == "score" or judge is None:
        return [Conduct(score) for score in scores]
    replies = generate_replies(model, prompts, options.reply_tokens, batch_tokens)
    whole = [before + reply for before, reply in zip(prefills, replies, strict=True)]
    # "Sure," + "I can't help with that." is a refusal, although its first words are not the model's own.
    refused = [judge(reply) or judge(text) for reply, text in zip(replies, whole, strict=True)]
    complied = [not (no or judged_somewhere(judge, text)) for no, text in zip(refused, whole, strict=True)]
    return [Conduct(*row) for row in zip(scores, replies, refused, complied, strict=True)]


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
    longer = [max(pairs[number], key=lambda prompt: len(prompt.ids)) for number in usable]
    groups = [[usable[place] for place in group] for group in similar_lengths(longer, batch_tokens)]
    order = [number for group in groups for number in group]
    sites = list(dict.fromkeys(site for patch in patches for site in patch.sites))
    base, source = np.empty(len(order)), np.empty(len(order))
    patched, attribution = np.empty((len(patches), len(order))), np.empty((len(patches), len(order)))
    done = 0
    for group in groups:
        some = [pairs[number] for number in group]
        both = [pair if direction == "noise" else (pair.corrupted, pair.clean) for pair in some]
        transplant = make_transplant(model, score, both, positions, sites)
        columns = slice(done, done := done + len(group))
        base[columns] = transplant.base_score.cpu().numpy()
        source[columns] = transplant.source_score.cpu().numpy()
        patched[:, columns] = patched_scores(model, score, transplant, patches, batch_tokens, progress)
        attribution[:, columns] = attribution_patching(model, score, transplant, patches)
    return PatchRuns(direction, positions, patches, order, base, source, patched, attribution)
