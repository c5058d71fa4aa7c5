"""Behaviour beside scores: do replies still show it under the ablation?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from sfc.circuits.ablation import Ablation
from sfc.circuits.faithfulness import Ablations, prepared, top_circuits
from sfc.circuits.options import EvaluationOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.models import engine
from sfc.models.batches import PACKED_TOKENS
from sfc.models.loading import Model
from sfc.models.score import Score
from sfc.stats import wilson

_PACKED_TOKENS = 2 * PACKED_TOKENS  # those of the replies count too


def ablated_replies(
    model: Model,
    score: Score,
    ablation: Ablation,
    runs: PromptRuns,
    keep: Bool[np.ndarray, "circuits nodes"],
    reply_tokens: int,
) -> list[list[str]]:
    """For each circuit the greedy replies to all prompts, with everything outside it ablated in the prompt.

    Tokens of the reply are not ablated, since no prompt says what a reply's baseline would be.
    """
    circuits = Ablations(ablation, keep)
    return engine.replies(prepared(model, runs), score, circuits, reply_tokens, batch_tokens=_PACKED_TOKENS).texts


REPLIED_SIZES = 4
"""sizes of a curve at which replies are generated, beside the reported one"""
COLUMNS = (
    "n_replies", "refused_model", "refused_empty",
    "refused_circuit", "refused_circuit_low", "refused_circuit_high",
    "refused_complement", "refused_complement_low", "refused_complement_high",
)  # fmt: skip


class Rate(NamedTuple):
    """The share of replies that show the behavior, with its 95 % interval after Wilson."""

    rate: float
    low: float
    high: float


def judged_replies(
    problem: Problem, runs: PromptRuns, keep: Bool[np.ndarray, "circuits nodes"], reply_tokens: int
) -> list[Rate]:
    """For each circuit, to how many of the prompts the reply shows the behavior with everything outside it ablated.

    The problem has a judge.
    """
    assert problem.judge is not None
    replies = ablated_replies(problem.model, problem.score, problem.ablation, runs, keep, reply_tokens)
    counts = [sum(map(problem.judge, of_circuit)) for of_circuit in replies]
    return [Rate(count / runs.n_prompts, *wilson(count, runs.n_prompts)) for count in counts]


def with_replies(
    curve: pd.DataFrame,
    problem: Problem,
    runs: PromptRuns,
    ranking: Int[np.ndarray, " ranked"],
    reported: int,
    config: EvaluationOptions,
    seed: int,
) -> pd.DataFrame:
    """The curve with `COLUMNS`, at a few sizes and the reported one: how many replies show the behavior.

    As the model is (`refused_model`), with everything ablated (`refused_empty`), all but the circuit
    (`refused_circuit`) and the circuit (`refused_complement`). Missing at other sizes, where no replies are wanted, and
    where there is no judge of replies.
    """
    curve = curve.assign(**dict.fromkeys(COLUMNS, np.nan))
    if config.replies == 0 or problem.judge is None:
        return curve
    rows = _replied_rows(curve["size"].tolist(), reported)
    circuits = top_circuits(ranking, curve["size"].iloc[rows].tolist(), problem.ablation.nodes.n_nodes)
    some = runs.sample(config.replies, seed)
    keep = np.concatenate([np.ones_like(circuits[:1]), np.zeros_like(circuits[:1]), circuits, ~circuits])
    model, empty, *rates = judged_replies(problem, some, keep, config.reply_tokens)
    figures = [
        (some.n_prompts, model.rate, empty.rate, *kept, *ablated)
        for kept, ablated in zip(rates[: len(rows)], rates[len(rows) :], strict=True)
    ]
    curve.loc[curve.index[rows], list(COLUMNS)] = figures
    return curve


def _replied_rows(sizes: Sequence[int], reported: int) -> list[int]:
    """The places of the reported size and of a few others, evenly spread over the curve."""
    spread = np.linspace(0, len(sizes) - 1, min(REPLIED_SIZES, len(sizes))).round().astype(int)
    return sorted({sizes.index(reported), *spread.tolist()})
