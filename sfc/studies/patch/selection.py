"""Which candidate pairs serve: those that can be aligned, and on which the model really behaves differently.

A data set's labels say what a model should do, not what it does. So both prompts are answered, the replies are judged,
and a pair is used only if the clean prompt is refused and the corrupted one complied with. A model that never refuses
has no such pairs; for it there is the requirement `score`, which asks only that the score is higher on the clean side.
What is found that way is a mechanism of the score, not of a behaviour, and must be called so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.core.config import Experiment
from sfc.data.render import TokenizedPrompt
from sfc.data.schema import prompt_ids
from sfc.models.batches import SlotLayout, make_batches
from sfc.models.generation import generate_replies
from sfc.models.judge import is_refusal, refuses_somewhere
from sfc.models.loading import Model
from sfc.models.score import RefusalScore, score_prompts
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
    """refusal score, in nats"""
    reply: str | None
    """what it says, without the words put into its mouth; None where it was not asked"""
    refused: bool | None
    complied: bool | None
    """that no sentence of the reply refuses; a reply may be neither, refused only after it began to comply"""


_NOT_ASKED = Conduct(math.nan, None, None, None)


class Requirement(NamedTuple):
    """What a pair must show to be used."""

    needs_replies: bool
    objection: Callable[[Conduct, Conduct], str | None]
    """of the clean and the corrupted conduct: why the pair cannot be used, or None"""


def _by_behaviour(clean: Conduct, corrupted: Conduct) -> str | None:
    if not clean.refused:
        return "the clean prompt was not refused"
    if corrupted.refused:
        return "the corrupted prompt was refused"
    return None if corrupted.complied else "the corrupted prompt was refused after all"


def _by_score(clean: Conduct, corrupted: Conduct) -> str | None:
    return None if clean.score > corrupted.score else "the clean prompt has no higher score"


REQUIREMENTS = {"behaviour": Requirement(True, _by_behaviour), "score": Requirement(False, _by_score)}


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

    @classmethod
    def of(cls, model: Model, group: Candidates, experiment: Experiment) -> "_Case":
        """A case whose pairs that serve on no account are already out."""
        pairs = list(zip(group, tokenize_pairs(model, group), strict=True))
        limits = PatchingOptions.of(experiment).position_sets, experiment.prompts.max_tokens
        objections = [_static_objection(tokens, *limits) for _, tokens in pairs]
        left = [pair for pair, objection in zip(pairs, objections, strict=True) if objection is None]
        return cls(left, *pairs[0], lost=objections[0])


def select_pairs(model: Model, candidates: Sequence[Candidates], experiment: Experiment) -> Selection:
    """For each clean prompt the first of its pairs that can be aligned, is short enough and meets the requirement."""
    objection = REQUIREMENTS[PatchingOptions.of(experiment).require].objection
    cases = [_Case.of(model, group, experiment) for group in candidates]
    trying = [case for case in cases if case.left]
    prompts = [case.tokens.clean for case in trying]
    for case, conduct in zip(trying, _conduct(model, prompts, [""] * len(trying), experiment), strict=True):
        case.clean = conduct
    while trying:
        for case in trying:
            case.pair, case.tokens = case.left.pop(0)
        prompts, prefills = [case.tokens.corrupted for case in trying], [case.pair.prefill for case in trying]
        for case, conduct in zip(trying, _conduct(model, prompts, prefills, experiment), strict=True):
            case.corrupted, case.lost = conduct, objection(case.clean, conduct)
        trying = [case for case in trying if case.lost and case.left]
    used = [case.tokens for case in cases if case.lost is None]
    return Selection(used, pd.DataFrame([_row(case) for case in cases]))


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
    if not prompts:
        return []
    config, batch_tokens = PatchingOptions.of(experiment), experiment.activations.batch_tokens
    batches = make_batches(prompts, SlotLayout.of(prompts), batch_tokens, model.device)
    scores = score_prompts(model, RefusalScore.of(model), batches).tolist()
    if not REQUIREMENTS[config.require].needs_replies:
        return [Conduct(score, None, None, None) for score in scores]
    replies = generate_replies(model, prompts, config.reply_tokens, batch_tokens)
    whole = [before + reply for before, reply in zip(prefills, replies, strict=True)]
    # "Sure," + "I can't help with that." is a refusal, although its first words are not the model's own.
    refused = [is_refusal(reply) or is_refusal(text) for reply, text in zip(replies, whole, strict=True)]
    complied = [not (no or refuses_somewhere(text)) for no, text in zip(refused, whole, strict=True)]
    return [Conduct(*row) for row in zip(scores, replies, refused, complied, strict=True)]


def _row(case: _Case) -> dict[str, object]:
    pair, conducts = case.pair, {"clean": case.clean, "corrupted": case.corrupted}
    texts = {"clean": pair.clean, "corrupted": pair.corrupted, "prefill": pair.prefill}
    measured = {
        f"{side}_{field}": getattr(conduct, field) for field in Conduct._fields for side, conduct in conducts.items()
    }
    texts["clean_id"], texts["corrupted_id"] = prompt_ids([pair.clean, pair.corrupted])
    used = {"used": case.lost is None, "lost": case.lost or ""}
    return {"category": pair.category, "wrapper": pair.wrapper, **texts, **used, **measured}
