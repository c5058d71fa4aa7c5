"""Behaviour beside scores: refusal rates under ablation, at a few sizes of the curve."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from sfc.circuits.methods import METHODS
from sfc.circuits.options import EvaluationOptions
from sfc.circuits.problem import Problem
from sfc.circuits.replies import COLUMNS, ablated_replies, with_replies
from sfc.stats import wilson

SIZES = [1, 2, 4, 8, 16, 32, 64]


def config(**values: object) -> EvaluationOptions:
    return EvaluationOptions(sizes=SIZES, replies=4, reply_tokens=5).model_copy(update=values)


def test_rates_are_those_of_a_loop_over_circuits(problem: Problem) -> None:
    """The tiny model never refuses: replies of oddly many letters are taken for refusals, so that rates differ."""
    problem = replace(problem, judge=lambda reply: len(reply) % 2 == 1)
    ranking = METHODS["attribution"].rank(problem).ranking
    n_nodes = problem.ablation.nodes.n_nodes
    curve = pd.DataFrame({"size": [*SIZES, n_nodes]})
    figures = with_replies(curve, problem, problem.runs, ranking, 16, config(), seed=0)
    answered = figures.dropna()
    assert answered["size"].tolist() == [1, 4, 16, 32, n_nodes]
    assert figures.loc[~figures.index.isin(answered.index), list(COLUMNS)].isna().all(axis=None)
    some = problem.runs.sample(4, 0)
    for row in answered.to_dict("records"):
        kept = np.isin(np.arange(n_nodes), ranking[: int(row["size"])])
        for part, mask in (("circuit", kept), ("complement", ~kept), ("model", kept | True), ("empty", kept & False)):
            (said,) = ablated_replies(problem.model, problem.score, problem.ablation, some, mask[None], 5)
            refusals = sum(len(reply) % 2 for reply in said)
            assert row[f"refused_{part}"] == refusals / 4
            if part in ("circuit", "complement"):
                ends = row[f"refused_{part}_low"], row[f"refused_{part}_high"]
                assert ends == pytest.approx(wilson(refusals, 4))
    everything = answered.iloc[-1]
    assert everything["refused_circuit"] == everything["refused_model"]
    assert everything["refused_complement"] == everything["refused_empty"]


def test_no_replies_are_generated_where_none_are_wanted(problem: Problem) -> None:
    curve, ranking = pd.DataFrame({"size": SIZES}), np.arange(64)
    figures = with_replies(curve, problem, problem.runs, ranking, 4, config(replies=0), seed=0)
    assert figures[list(COLUMNS)].isna().all(axis=None)
    without_judge = replace(problem, judge=None)
    assert (
        with_replies(curve, without_judge, problem.runs, ranking, 4, config(), 0)[list(COLUMNS)].isna().all(axis=None)
    )
