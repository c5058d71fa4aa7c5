"""Which candidate pairs serve: those that can be aligned, and on which the model really behaves differently.

A data set's labels say what a model should do, not what it does. So both prompts are answered, the replies are judged,
and a pair is used only if the clean prompt is refused and the corrupted one complied with (or whatever the behavior
is). A model that never refuses has no such pairs; for it there is the requirement `score`, which asks only that the
score is higher on the clean side. What is found that way is a mechanism of the score, not of a behaviour, and must be
called so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.behaviors.behavior import BEHAVIORS, Words
from sfc.core.config import Experiment
from sfc.data.render import TokenizedPrompt
from sfc.data.schema import prompt_ids
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.generation import generate_replies
from sfc.models.judge import judged_somewhere
from sfc.models.loading import Model
from sfc.models.score import score_prompts
from sfc.studies.patch.alignment import Unalignable, align, expand
from sfc.studies.patch.options import PatchingOptions
from sfc.studies.patch.pairs import Candidates, Pair


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
