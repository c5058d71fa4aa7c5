"""Behaviour beside scores: refusal rates by kind of prompt, in the model and under ablations."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from sfc.circuits.faithfulness import Ablations, prepared
from sfc.circuits.problem import Problem
from sfc.circuits.proof import REPLY_COLUMNS, counts_by_kind, replies_by_kind
from sfc.models import engine
from sfc.models.engine import NO_EDIT
from sfc.stats import wilson


def of_odd_length(reply: str) -> bool:
    """The tiny model never refuses: replies of oddly many letters are taken for refusals, so that rates differ."""
    return len(reply) % 2 == 1


def test_counts_are_those_of_a_loop_over_prompts_and_ablations(problem: Problem) -> None:
    problem = replace(problem, judge=of_odd_length, ablation=replace(problem.ablation, error_mode="ablate"))
    n, n_nodes = problem.runs.n_prompts, problem.ablation.nodes.n_nodes
    prompts = pd.DataFrame({"id": range(n), "kind": np.where(np.arange(n) % 2, "safe", "toxic")})
    circuit = np.arange(n_nodes) % 3 == 0
    table = replies_by_kind(problem, problem.runs, prompts, circuit, n, 5, seed=0)
    assert list(table.columns) == list(REPLY_COLUMNS) and len(table) == 8
    runs = prepared(problem.model, problem.runs)
    ablations = {
        "model": NO_EDIT,
        "everything ablated": Ablations(problem.ablation, np.zeros((1, n_nodes), dtype=bool)),
        "circuit": Ablations(problem.ablation, circuit[None]),
        "without": Ablations(problem.ablation, ~circuit[None]),
    }
    for under, edits in ablations.items():
        [texts] = engine.replies(runs, problem.score, edits, 5).texts
        for kind in ("toxic", "safe"):
            said = [text for text, of in zip(texts, prompts["kind"], strict=True) if of == kind]
            [row] = table[(table["kind"] == kind) & (table["under"] == under)].to_dict("records")
            assert (row["n"], row["refused"]) == (len(said), sum(map(of_odd_length, said)))
            assert (row["low"], row["high"]) == pytest.approx(wilson(row["refused"], row["n"]))
    counts = counts_by_kind(table)["toxic"]
    assert set(counts) == {"n", "model", "circuit", "without"}


def test_a_prompt_in_several_pairs_is_answered_once_and_no_more_of_a_kind_than_wanted(problem: Problem) -> None:
    problem = replace(problem, judge=of_odd_length)
    n = problem.runs.n_prompts
    prompts = pd.DataFrame({"id": np.arange(n) // 2, "kind": "toxic"})
    nothing = np.zeros(problem.ablation.nodes.n_nodes, dtype=bool)
    assert set(replies_by_kind(problem, problem.runs, prompts, nothing, n, 2, 0)["n"]) == {(n + 1) // 2}
    assert set(replies_by_kind(problem, problem.runs, prompts, nothing, 2, 2, 0)["n"]) == {2}


def test_no_replies_are_generated_where_none_are_wanted_or_none_can_be_judged(problem: Problem) -> None:
    prompts = pd.DataFrame({"id": range(problem.runs.n_prompts), "kind": "toxic"})
    nothing = np.zeros(problem.ablation.nodes.n_nodes, dtype=bool)
    assert replies_by_kind(replace(problem, judge=of_odd_length), problem.runs, prompts, nothing, 0, 5, 0).empty
    assert replies_by_kind(replace(problem, judge=None), problem.runs, prompts, nothing, 4, 5, 0).empty
