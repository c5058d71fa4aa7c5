"""Stability of circuits: cases known by hand, and the bootstrap against one that goes draw by draw."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfc.circuits import stability
from sfc.circuits.methods import METHODS, Effects
from sfc.circuits.problem import Problem
from sfc.circuits.stability import (
    agreement_of_halves,
    chance_overlap,
    resampled_node_sets,
    with_intervals,
    with_stability,
)
from sfc.core.errors import UserError
from sfc.stats import bootstrap_means, resampled_counts
from sfc.studies.compare.overlap import jaccard


def _ranked(by_prompt: np.ndarray) -> np.ndarray:
    return np.argsort(-np.abs(by_prompt.mean(0)), kind="stable")


def test_two_prompts_by_hand() -> None:
    """Node 0 has 1 on both prompts and node 1 has 3 on the first alone: it leads unless only the second is drawn."""
    by_prompt = np.array([[1.0, -3.0, 0.1], [1.0, 0.0, 0.1]])
    sets = resampled_node_sets(by_prompt, _ranked(by_prompt), [1], seed=0, draws=20_000)
    assert sets.share == pytest.approx([0.75], abs=0.01)
    assert sets.jaccard == pytest.approx(0.75, abs=0.01)
    both = resampled_node_sets(by_prompt, _ranked(by_prompt), [1, 0], seed=0, draws=20_000)
    assert both.share == pytest.approx([0.75, 1], abs=0.01)
    assert both.jaccard == pytest.approx(0.75 + 0.25 / 3, abs=0.01)


@given(st.integers(1, 9), st.integers(1, 12), st.data())
def test_the_bootstrap_is_what_a_loop_over_draws_says(n_prompts: int, n_nodes: int, data: st.DataObject) -> None:
    """Whole numbers, so that ties are frequent; some nodes are not ranked, and have no effects."""
    values = st.lists(st.integers(-3, 3), min_size=n_nodes, max_size=n_nodes)
    by_prompt = np.array([data.draw(values) for _ in range(n_prompts)], dtype=np.float32)
    ranking = _ranked(by_prompt)[: data.draw(st.integers(1, n_nodes))]
    by_prompt[:, np.setdiff1d(np.arange(n_nodes), ranking)] = np.nan
    members = ranking[: data.draw(st.integers(1, len(ranking)))].tolist()
    sets = resampled_node_sets(by_prompt, ranking, members, seed=3, draws=15)

    kept, overlaps = dict.fromkeys(members, 0), []
    for counts in resampled_counts(n_prompts, 15, np.random.default_rng(3)):
        drawn = np.repeat(by_prompt, counts, axis=0)
        best = sorted(ranking.tolist(), key=lambda node: -abs(drawn[:, node].sum()))[: len(members)]
        overlaps.append(jaccard(dict.fromkeys(best, 1), dict.fromkeys(members, 1)))
        for node in set(best) & set(members):
            kept[node] += 1
    np.testing.assert_allclose(sets.share, [kept[node] / 15 for node in members])
    assert sets.jaccard == pytest.approx(np.mean(overlaps))


def test_blocks_of_draws_and_of_nodes_change_nothing(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = METHODS["attribution"].rank(problem)
    members = effects.ranking[:20].tolist()

    def stable() -> tuple[Effects, dict]:
        return with_stability(with_intervals(effects, members, 0), members, "attribution", 0)

    at_once, figures = stable()
    monkeypatch.setattr(stability, "_ENTRIES", 3000)
    in_blocks, same = stable()
    assert figures == pytest.approx(same)
    assert 0 < figures["stability_jaccard"] <= figures["stability"] <= 1
    for name in ("effect_low", "effect_high", "stability"):
        np.testing.assert_allclose(at_once.attributes[name], in_blocks.attributes[name], rtol=1e-5)


@pytest.mark.parametrize("method", ["attribution", "integrated-gradients", "exact", "learned-mask"])
def test_the_effects_are_the_means_of_those_of_the_prompts(problem: Problem, method: str) -> None:
    few = {"learned_mask": {"steps": 2}, "exact": {"nodes": 10}, "integrated_gradients": {"steps": 2}}
    effects = METHODS[method].rank(problem.with_settings(**few))
    assert effects.by_prompt is not None and effects.by_prompt.shape[0] == problem.runs.n_prompts
    np.testing.assert_allclose(effects.by_prompt.mean(0), effects.effect, atol=1e-6)
    members = effects.ranking[:8].tolist()
    low, high = (with_intervals(effects, members, 5).attributes[f"effect_{end}"] for end in ("low", "high"))
    expected = bootstrap_means(effects.by_prompt[:, members], 5, draws=1000)
    np.testing.assert_array_equal(low[members], expected.low)
    assert (low[members] <= effects.effect[members]).all() and (effects.effect[members] <= high[members]).all()
    assert np.isnan(np.delete(low, members)).all()


def test_node_sets_that_effects_alone_do_not_make_are_not_resampled(problem: Problem) -> None:
    effects = METHODS["attribution"].rank(problem)
    nothing = {"stability": None, "stability_jaccard": None}
    best = effects.ranking[:8].tolist()
    for left, figures in (
        with_stability(effects, best, "learned-mask", 0),
        with_stability(effects, [*best[:-1], int(effects.ranking[9])], "attribution", 0),
        with_stability(effects._replace(by_prompt=None), best, "correlation", 0),
    ):
        assert "stability" not in left.attributes and figures == nothing


def test_halves_agree_as_far_as_two_discoveries_do(problem: Problem) -> None:
    attributed = problem.with_settings(discovery={"method": "attribution"})
    halves, nodes = agreement_of_halves(attributed, 10, seed=2), problem.ablation.nodes
    found = []
    for half in problem.runs.halves(2):
        found.append(METHODS["attribution"].rank(replace(problem, runs=half)).ranking[:10].tolist())
    assert halves.jaccard == jaccard(*(dict.fromkeys(nodes, 1) for nodes in found))
    at_site = [np.mean([sum(nodes.site_numbers[n] == site for n in half) for half in found]) for site in range(2)]
    assert halves.chance == pytest.approx(chance_overlap(np.array(at_site), np.array(nodes.sizes)))
    everything = agreement_of_halves(attributed, nodes.n_nodes, seed=2)
    assert everything.jaccard == everything.chance == 1
    with pytest.raises(UserError, match="no halves"):
        agreement_of_halves(replace(attributed, runs=problem.runs.sample(1, 0)), 10, seed=2)
