"""Figures and curves: by hand, and where the answer is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from sfc.circuits.faithfulness import (
    Scores,
    ablated_scores,
    area,
    choose_size,
    circuit_metrics,
    curve_areas,
    curve_sizes,
    evaluation_curve,
    faithfulness_of_sizes,
    full_scores,
    matching_strata,
    metrics_with_intervals,
    random_circuits,
    random_scores,
    single_site_faithfulness,
    top_circuits,
)
from sfc.circuits.nodes import Nodes
from sfc.circuits.options import EvaluationOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import PACKED_TOKENS, TemplateLayout, make_batches
from sfc.stats import mean_of_draws

NODES = Nodes.of({"blocks.0.hook_resid_post": 20, "blocks.1.hook_resid_post": 30})


def test_the_three_ratios_by_hand() -> None:
    metrics = circuit_metrics(f_model=6.0, f_empty=-4.0, f_circuit=4.0, f_complement=-1.0, min_denominator=0.5)
    assert metrics.faithfulness == pytest.approx(0.8)
    assert metrics.completeness == pytest.approx(-1 / 6)
    assert metrics.completeness_normalised == pytest.approx(0.3)


def test_what_cannot_be_measured_is_none_and_never_huge() -> None:
    metrics = circuit_metrics(f_model=2.0, f_empty=1.99, f_circuit=5.0, f_complement=0.0, min_denominator=0.5)
    assert metrics.faithfulness is None and metrics.completeness_normalised is None
    assert metrics.completeness == 0.0
    assert circuit_metrics(0.01, -4.0, 0, 0, 0.5).completeness is None


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10), st.floats(-5, 5))
def test_ratios_but_the_published_completeness_do_not_depend_on_where_zero_lies(
    f_model: float, f_empty: float, f_circuit: float, f_complement: float, shift: float
) -> None:
    if abs(abs(f_model - f_empty) - 0.5) < 1e-6:
        return
    plain = circuit_metrics(f_model, f_empty, f_circuit, f_complement, 0.5)
    moved = circuit_metrics(f_model + shift, f_empty + shift, f_circuit + shift, f_complement + shift, 0.5)
    assert (plain.faithfulness is None) == (moved.faithfulness is None)
    if plain.faithfulness is not None:
        assert moved.faithfulness == pytest.approx(plain.faithfulness, abs=1e-6)
        assert moved.completeness_normalised == pytest.approx(plain.completeness_normalised, abs=1e-6)


def test_sizes_are_those_the_ranking_can_fill_and_the_whole_of_it() -> None:
    assert curve_sizes([5, 10, 100], 40) == [5, 10, 40]
    assert curve_sizes([5, 40], 40) == [5, 40]


def test_top_circuits_hold_the_best_nodes() -> None:
    ranking = np.array([7, 3, 9])
    keep = top_circuits(ranking, [1, 3], 12)
    assert [np.flatnonzero(row).tolist() for row in keep] == [[7], [3, 7, 9]]


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_random_circuits_match_each_site_and_firing_rate_and_keep_the_same_errors(seed: int, share: float) -> None:
    draw_from = np.random.default_rng(seed)
    circuits = draw_from.random((2, NODES.n_nodes)) < share
    often = draw_from.random(NODES.n_nodes) < 0.5
    strata = matching_strata(NODES, np.where(often, 0.3, 0.03))
    random = random_circuits(circuits, strata, draws=3, seed=seed)
    assert (random == random_circuits(circuits, strata, draws=3, seed=seed)).all()
    for draw in random:
        assert (draw[:, NODES.is_error] == circuits[:, NODES.is_error]).all()
        for site in (0, 1):
            for group in (often, ~often):
                members = (NODES.site_numbers == site) & ~NODES.is_error & group
                assert (draw[:, members].sum(1) == circuits[:, members].sum(1)).all()


def test_strata_part_features_by_site_and_firing_rate() -> None:
    nodes = Nodes.of({"blocks.0.hook_resid_post": 7, "blocks.1.hook_resid_post": 1})
    rates = np.array([0.0, 0.01, 0.02, 0.05, 0.2, 0.5, 1.0, 1.0, 0.0, 1.0])
    strata = matching_strata(nodes, rates)
    assert strata.tolist() == [0, 1, 2, 2, 3, 4, 5, -1, 6, -1]
    assert matching_strata(nodes).tolist() == [0] * 7 + [-1, 6, -1]


def test_intervals_of_ratios_by_hand() -> None:
    """Every prompt has the same ratio 0.5, whatever its size: so has every draw. A noisy ratio has a wide interval."""
    full, empty = np.array([4.0, 6.0, 10.0]), np.array([0.0, 2.0, -2.0])
    half = (full + empty) / 2
    figures = metrics_with_intervals(Scores(full, empty, half, empty), 0.5, seed=0)
    ends = [figures[f"faithfulness{end}"] for end in ("_low", "", "_high")]
    assert ends == pytest.approx([0.5, 0.5, 0.5])
    assert figures["completeness_normalised_low"] == pytest.approx(0)
    noisy = metrics_with_intervals(Scores(full, empty, np.array([4.0, -2.0, 10.0]), empty), 0.5, seed=0)
    low, value, high = (noisy[f"faithfulness{end}"] for end in ("_low", "", "_high"))
    assert value == pytest.approx((12 / 3) / (20 / 3)) and low < value - 0.1 and high > value + 0.1


def test_a_denominator_whose_interval_includes_zero_is_not_measurable_although_its_mean_is_large() -> None:
    full, empty = np.array([30.0, -10.0, 4.0]), np.zeros(3)
    figures = metrics_with_intervals(Scores(full, empty, full, empty), 0.5, seed=0)
    assert set(figures.values()) == {None} and len(figures) == 9


def test_areas_by_hand() -> None:
    assert area(np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0])) == pytest.approx(0.75)
    assert area(np.log(np.array([1.0, 10, 100])), np.array([0.0, 0.0, 1.0])) == pytest.approx(0.25)
    assert area(np.array([1.0]), np.array([0.3])) == 0.3


def test_the_reported_size_is_the_smallest_that_reaches_the_target_or_nearly_the_best() -> None:
    sizes, gap = np.array([5, 10, 20, 40]), np.nan
    figure = np.array([0.2, 0.85, 0.99, 1.0])
    assert choose_size(sizes, figure, 0.8) == 10
    assert choose_size(sizes, figure, 2.0) == 20, "0.99 is as good as 1"
    assert choose_size(sizes, np.array([gap, 0.3, gap, 0.1]), 0.8) == 10
    assert choose_size(sizes, np.array([gap, 0.3, gap, 0.1]), 0.2) == 10
    assert choose_size(sizes, np.full(4, gap), 0.8) == 5


CONFIG = EvaluationOptions(sizes=[1], random_draws=3, min_denominator=0.01)  # pyright: ignore


@pytest.fixture(scope="module")
def problem(problem: Problem, prompts: list[TokenizedPrompt], layout: TemplateLayout) -> Problem:
    """The problem on two prompts that ablation moves the same way: over all of them it moves the score by about 0."""
    batches = make_batches(prompts[3:5], layout, 80, problem.model.device)
    return replace(problem, runs=PromptRuns.of(problem.model, batches, problem.ablation.nodes.sites[0]))


@pytest.fixture(scope="module")
def curve(problem: Problem) -> pd.DataFrame:
    ranking = np.random.default_rng(0).permutation(problem.ablation.nodes.n_nodes)
    steps: list[int] = []
    sizes = [5, 20, len(ranking)]
    curve = evaluation_curve(problem, problem.runs, ranking, sizes, CONFIG, 7, steps.append)
    assert sum(steps) == (1 + 3 * len(sizes) + 2 * 3 * len(sizes)) * problem.runs.n_prompts
    return curve


def test_all_nodes_are_faithful_and_nothing_is_left_without_them(curve: pd.DataFrame) -> None:
    whole = curve.iloc[-1]
    assert whole["faithfulness"] == pytest.approx(1, abs=1e-3)
    assert whole["random_faithfulness"] == pytest.approx(1, abs=1e-3)
    assert whole["completeness_normalised"] == pytest.approx(0, abs=1e-3)
    assert whole["f_circuit"] == pytest.approx(whole["f_model"], abs=1e-4)
    assert whole["f_complement"] == pytest.approx(whole["f_empty"], abs=1e-4)


def test_a_curve_is_made_of_the_scores_of_its_circuits_one_at_a_time(problem: Problem, curve: pd.DataFrame) -> None:
    def mean_score(keep: np.ndarray) -> float:
        scores = ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, keep[None])
        return float(scores.mean())

    nodes = problem.ablation.nodes
    ranking = np.random.default_rng(0).permutation(nodes.n_nodes)
    f_model = full_scores(problem.model, problem.score, problem.runs).mean()
    f_empty = mean_score(np.zeros(nodes.n_nodes, dtype=bool))
    circuits = top_circuits(ranking, curve["size"].tolist(), nodes.n_nodes)
    random = random_circuits(circuits, matching_strata(nodes, problem.firing_rates), 3, 7)
    for i, row in curve.iterrows():
        expected = circuit_metrics(f_model, f_empty, mean_score(circuits[i]), mean_score(~circuits[i]), 0.01)
        for name, value in expected._asdict().items():
            assert row[name] == pytest.approx(value, abs=1e-3)
        draws = [(mean_score(draw[i]) - f_empty) / (f_model - f_empty) for draw in random]
        found = row[["random_low", "random_faithfulness", "random_high"]].astype(float).tolist()
        assert found == pytest.approx(mean_of_draws(draws), abs=1e-3)


def test_random_circuits_are_drawn_until_their_mean_is_known_well_enough(problem: Problem) -> None:
    nodes = problem.ablation.nodes
    ranking = np.random.default_rng(0).permutation(nodes.n_nodes)
    circuits = top_circuits(ranking, [20, nodes.n_nodes], nodes.n_nodes)

    def draws(most: int, tolerance: float) -> list[int]:
        found = random_scores(problem, problem.runs, circuits, most, tolerance, seed=7)
        assert all(len(of.alone) == len(of.without) for of in found)
        return [len(of.alone) for of in found]

    assert draws(6, tolerance=1e9) == [3, 3], "three are enough where anything is"
    assert draws(6, tolerance=1e-4) == [6, 3], "of all nodes there is one circuit only, and nothing more to learn"
    assert draws(1, tolerance=1e-4) == [1, 1]


def test_the_interval_of_a_mean_of_draws_is_students() -> None:
    draws = np.random.default_rng(0).normal(2.0, 3.0, size=5).tolist()
    low, mean, high = mean_of_draws(draws)
    assert mean == pytest.approx(np.mean(draws))
    assert (low, high) == pytest.approx(tuple(ttest_1samp(draws, 0).confidence_interval(0.95)))
    assert mean_of_draws([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_faithfulness_for_choosing_is_that_of_the_curve(problem: Problem, curve: pd.DataFrame) -> None:
    ranking = np.random.default_rng(0).permutation(problem.ablation.nodes.n_nodes)
    sizes = curve["size"].tolist()
    chosen_by = faithfulness_of_sizes(problem, problem.runs, ranking, sizes, 0.01, lambda _: None)
    assert chosen_by == pytest.approx(curve["faithfulness"].tolist(), abs=1e-3)


def test_a_curve_whose_ratios_cannot_be_measured_has_scores_and_no_ratios(problem: Problem) -> None:
    strict = CONFIG.model_copy(update={"min_denominator": 100.0})
    curve = evaluation_curve(problem, problem.runs, np.arange(10), [3], strict, 0, lambda _: None)
    ratios = ["faithfulness", "completeness", "completeness_normalised", "random_faithfulness", "random_low"]
    assert curve[ratios].isna().all(axis=None)
    assert np.isfinite(curve[["f_model", "f_circuit", "f_empty"]]).all(axis=None)


def test_many_circuits_score_as_one_at_a_time(problem: Problem) -> None:
    nodes = problem.ablation.nodes
    keep = np.random.default_rng(1).random((90, nodes.n_nodes)) < 0.5
    assert 90 * max(batch.ids.numel() for batch in problem.runs.batches) > 2 * PACKED_TOKENS, "several packs"
    arguments = problem.model, problem.score, problem.ablation, problem.runs
    one_at_a_time = np.concatenate([ablated_scores(*arguments, row[None]) for row in keep])
    np.testing.assert_allclose(ablated_scores(*arguments, keep), one_at_a_time, atol=1e-4)


def test_baselines_of_one_site_are_its_best_nodes(problem: Problem) -> None:
    nodes = problem.ablation.nodes
    ranking = np.random.default_rng(1).permutation(nodes.n_nodes)
    found = single_site_faithfulness(problem, problem.runs, ranking, 8, 0.01, lambda _: None)
    assert list(found) == ["resid_post.0", "resid_post.1"]
    for number, value in enumerate(found.values()):
        best = ranking[nodes.site_numbers[ranking] == number]
        expected = faithfulness_of_sizes(problem, problem.runs, best, [8], 0.01, lambda _: None)[0]
        assert value == pytest.approx(expected)
    too_many = single_site_faithfulness(problem, problem.runs, ranking, 10_000, 0.01, lambda _: None)
    assert set(too_many.values()) == {None}


def test_areas_are_those_of_the_curves_by_signed_effect_and_by_size(problem: Problem) -> None:
    effect = np.random.default_rng(2).normal(size=problem.ablation.nodes.n_nodes)
    sizes = [5, 20, len(effect)]
    areas = curve_areas(problem, problem.runs, effect, sizes, 0.01, lambda _: None)
    by_sign, by_size = (
        np.array(faithfulness_of_sizes(problem, problem.runs, ranking, sizes, 0.01, lambda _: None))
        for ranking in (np.argsort(-effect), np.argsort(-np.abs(effect)))
    )
    shares = np.array([0, *sizes]) / len(effect)
    assert areas["cpr"] == pytest.approx(area(shares, np.array([0, *by_sign])))
    assert areas["cmd"] == pytest.approx(area(shares, np.abs(1 - np.array([0, *by_size]))))
    assert areas["cpr_log"] == pytest.approx(area(np.log(shares[1:]), by_sign))
    unmeasurable = curve_areas(problem, problem.runs, effect, sizes, 1e3, lambda _: None)
    assert set(unmeasurable.values()) == {None}
