"""The approximation check: known answers where effects are exact, spoilt, or in another unit."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from sfc.circuits.methods import Effects
from sfc.circuits.methods.exact import agreement, approximation_check, exact_effects
from sfc.circuits.problem import Problem
from sfc.models.score import score_batch


def configured(problem: Problem, **values: int) -> Problem:
    return problem.with_settings(discovery=values)


@pytest.fixture(scope="module")
def true_effects(problem: Problem) -> Effects:
    per_prompt = exact_effects(problem, range(problem.ablation.nodes.n_nodes))
    effect = per_prompt.mean(1)
    return Effects(effect, np.abs(per_prompt).mean(1), np.argsort(-np.abs(effect)), {})


def test_agreement_by_hand() -> None:
    fast = np.array([3.0, 2.0, 1.0, -1.0, 0.0001])
    exact = np.array([30.0, -5.0, 10.0, -20.0, 0.0002])
    result = agreement(fast, exact)
    assert result.rank_correlation == pytest.approx(spearmanr(fast, exact).statistic, abs=1e-4)
    assert (result.n_nodes, result.n_signed, result.sign_agreement) == (5, 4, 0.75)


def test_what_cannot_be_compared_is_none() -> None:
    assert agreement(np.zeros(0), np.zeros(0)) == (0, None, None, 0)
    assert agreement(np.ones(3), np.array([1.0, 2.0, 3.0])) == (3, None, 1.0, 3)
    assert agreement(np.array([1.0, 2.0]), np.array([1e-5, 2e-5])) == (2, 1.0, None, 0)


def test_exact_effects_pass_the_check_and_a_spoilt_one_is_its_worst_miss(
    problem: Problem, true_effects: Effects
) -> None:
    report = approximation_check(configured(problem, checked_nodes=20), true_effects, seed=0)
    for group in ("top", "random"):
        assert report[group]["n_nodes"] == 20
        assert report[group]["rank_correlation"] > 0.99 and report[group]["sign_agreement"] == 1
    assert max(abs(miss["fast"] - miss["exact"]) for miss in report["worst_misses"]) < 1e-4
    assert report["n_prompts"] == problem.runs.n_prompts

    effect = true_effects.effect.copy()
    strongest = int(true_effects.ranking[0])
    effect[strongest] *= -1
    spoilt = approximation_check(configured(problem, checked_nodes=20), true_effects._replace(effect=effect), seed=0)
    assert spoilt["top"]["sign_agreement"] == pytest.approx(1 - 1 / spoilt["top"]["n_signed"], abs=1e-4)
    assert spoilt["top"]["rank_correlation"] < report["top"]["rank_correlation"]
    worst = spoilt["worst_misses"][0]
    assert worst["node"] == problem.ablation.nodes.name(strongest)
    assert worst["fast"] == pytest.approx(-worst["exact"], abs=1e-4)
    assert spoilt["random"] == report["random"]


def test_the_random_nodes_are_others_that_do_something_and_depend_on_the_seed_alone(
    problem: Problem, true_effects: Effects
) -> None:
    config = configured(problem, checked_nodes=10)
    reports = [approximation_check(config, true_effects, seed) for seed in (1, 1, 2)]
    assert reports[0] == reports[1] != reports[2]
    few = np.zeros_like(true_effects.absolute)
    few[true_effects.ranking[:14]] = true_effects.absolute[true_effects.ranking[:14]]
    report = approximation_check(config, true_effects._replace(absolute=few), seed=0)
    assert (report["top"]["n_nodes"], report["random"]["n_nodes"]) == (10, 4)


def test_nodes_that_the_method_did_not_look_at_are_not_checked(problem: Problem, true_effects: Effects) -> None:
    effect, absolute = np.full((2, len(true_effects.effect)), np.nan)
    seen = true_effects.ranking[:15]
    effect[seen], absolute[seen] = true_effects.effect[seen], true_effects.absolute[seen]
    report = approximation_check(
        configured(problem, checked_nodes=10), true_effects._replace(effect=effect, absolute=absolute), seed=0
    )
    assert (report["top"]["n_nodes"], report["random"]["n_nodes"]) == (10, 5)
    assert report["random"]["rank_correlation"] > 0.99


def test_effects_in_another_unit_have_ranks_and_signs_but_no_misses(problem: Problem, true_effects: Effects) -> None:
    other = true_effects._replace(effect=np.cbrt(true_effects.effect), unit="Pearson's r with the label")
    report = approximation_check(configured(problem, checked_nodes=20), other, seed=0)
    assert report["worst_misses"] == [] and report["top"]["rank_correlation"] > 0.99


def test_a_sample_of_prompts_keeps_their_runs(problem: Problem) -> None:
    sample = problem.runs.sample(4, seed=3)
    assert sample.n_prompts == 4
    assert sorted(int(i) for batch in sample.batches for i in batch.prompts) == [0, 1, 2, 3]
    scores = {
        tuple(ids.tolist()): float(s)
        for batch, cached in problem.runs
        for ids, s in zip(batch.ids, score_batch(problem.model, problem.score, batch, cached=cached), strict=True)
    }
    for batch, cached in sample:
        for ids, s in zip(batch.ids, score_batch(problem.model, problem.score, batch, cached=cached), strict=True):
            assert float(s) == pytest.approx(scores[tuple(ids.tolist())], abs=1e-5)
    assert problem.runs.sample(99, seed=3).n_prompts == problem.runs.n_prompts
    assert approximation_check(configured(problem, checked_prompts=2), _flat(problem), seed=0)["n_prompts"] == 2


def _flat(problem: Problem) -> Effects:
    ones = np.ones(problem.ablation.nodes.n_nodes)
    return Effects(ones, ones, np.arange(len(ones)), {})
