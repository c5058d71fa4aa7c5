"""Minimal sets of features near a refusal direction: against brute force, on planted circuits, and what is refused."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_problems import plant

from sfc.circuits.methods import METHODS
from sfc.circuits.methods.refusal_direction import cosines, last_tokens, nearest_features, refusal_direction
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem
from sfc.circuits.spaces import Components
from sfc.core.errors import UserError
from sfc.core.sites import site_of
from sfc.models.interventions import recorder
from sfc.models.running import last_logits
from sfc.models.score import score_batch

BOTH = ["refusal-direction", "greedy-filtering"]


@torch.no_grad()
def _mean_score(problem: Problem, ablated: Iterable[int]) -> float:
    """The mean score with these nodes ablated, by one run for each prompt."""
    keep = torch.ones(1, problem.ablation.nodes.n_nodes)
    keep[0, list(ablated)] = 0
    ablation, scores = replace(problem.ablation, error_mode="node"), []
    for batch, _ in problem.runs:
        for row in range(len(batch.lengths)):
            one = batch.select(torch.tensor([row]))
            acting = ablation.interventions(keep, torch.zeros_like(one.lengths), one)
            scores.append(float(score_batch(problem.model, problem.score, one, acting)))
    return float(np.mean(scores))


def test_the_direction_is_the_difference_of_means_whose_projection_hurts_most(problem: Problem) -> None:
    labels, falls, directions = torch.tensor(problem.labels), [], []
    plain = _mean_score(problem, [])
    for site in problem.ablation.nodes.sites:
        seen, rows = {}, torch.zeros(len(labels), 32)
        for batch, _ in problem.runs:
            with torch.no_grad():
                last_logits(problem.model, batch, {site: recorder(seen, site)})
            rows[batch.prompts] = seen[site][torch.arange(len(batch.lengths)), batch.lengths - 1]
        torch.testing.assert_close(last_tokens(problem, site), rows, atol=1e-4, rtol=1e-4)
        directions.append(rows[labels].mean(0) - rows[~labels].mean(0))
        unit, scores = directions[-1] / directions[-1].norm(), []
        for batch, _ in problem.runs:

            def out(x: torch.Tensor, touchable: torch.Tensor = batch.touchable, unit: torch.Tensor = unit):
                return torch.where(touchable[..., None], x - (x @ unit)[..., None] * unit, x)

            with torch.no_grad():
                acting = dict.fromkeys(problem.ablation.nodes.sites, out)
                scores += score_batch(problem.model, problem.score, batch, acting).tolist()
        falls.append(plain - np.mean(scores))
    torch.testing.assert_close(refusal_direction(problem), directions[int(np.argmax(falls))], atol=1e-4, rtol=1e-4)


def test_candidates_are_the_features_of_largest_cosine_at_each_site(problem: Problem) -> None:
    nodes, direction = problem.ablation.nodes, torch.randn(32, generator=torch.Generator().manual_seed(5))
    cosine = cosines(problem, direction)
    for number in (3, 47, 49, 96):
        row = problem.ablation.dictionaries[nodes.sites[nodes.site_numbers[number]]].W_dec[number % 49]
        assert cosine[number] == pytest.approx(float(torch.cosine_similarity(row, direction, dim=0)), abs=1e-6)
    assert (cosine[nodes.is_error] == 0).all()
    chosen = nearest_features(problem, cosine, 4)
    assert np.bincount(nodes.site_numbers[chosen]).tolist() == [4, 4] and nodes.is_feature[chosen].all()
    for site in (0, 1):
        here = np.flatnonzero((nodes.site_numbers == site) & nodes.is_feature)
        assert cosine[chosen[nodes.site_numbers[chosen] == site]].min() >= np.sort(cosine[here])[-4]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_minimal_set_is_the_fewest_best_that_take_away_enough(problem: Problem, share: float) -> None:
    problem = problem.with_settings(refusal_direction={"per_site": 6, "share": share})
    effects = METHODS["refusal-direction"].rank(problem)
    integrated = METHODS["integrated-gradients"].rank(problem).effect
    np.testing.assert_allclose(effects.effect, integrated)
    candidates = nearest_features(problem, cosines(problem, refusal_direction(problem)), 6)
    by_effect = candidates[np.argsort(-np.abs(integrated[candidates]), kind="stable")]
    plain = _mean_score(problem, [])
    taken = np.array([plain - _mean_score(problem, by_effect[:size]) for size in range(1, 13)])
    enough = 1 + int(np.argmax(taken >= share * taken[-1] - 1e-6))
    assert effects.ranking.tolist() == by_effect[:enough].tolist()


def test_greedy_filtering_is_the_loop_it_says(problem: Problem) -> None:
    problem = problem.with_settings(greedy_filtering={"per_site": 5, "share": 0.8})
    effects = METHODS["greedy-filtering"].rank(problem)
    attributed = METHODS["attribution"].rank(problem).effect
    candidates = nearest_features(problem, cosines(problem, refusal_direction(problem)), 5)
    left, plain = set(candidates.tolist()), _mean_score(problem, [])
    of_all, missed = plain - _mean_score(problem, left), {}
    for node in sorted(left, key=lambda node: abs(attributed[node])):
        of_rest = plain - _mean_score(problem, left - {node})
        if len(left) > 1 and of_rest >= 0.8 * of_all:
            left.remove(node)
        else:
            missed[node] = plain - _mean_score(problem, left) - of_rest
    assert effects.ranking.tolist() == sorted(missed, key=lambda node: -missed[node])
    assert plain - _mean_score(problem, left) >= 0.8 * of_all - 1e-6


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("kind", ["chain", "and"])
def test_on_planted_circuits_only_planted_nodes_are_left_and_nothing_works_without_them(
    kind: str, method: str, tmp_path: Path
) -> None:
    planted = plant(kind, 0, tmp_path)
    ranking = METHODS[method].rank(planted.problem).ranking.tolist()
    assert set(ranking) <= planted.nodes and 1 <= len(ranking) < len(planted.nodes)
    plain, ends = _mean_score(planted.problem, []), _mean_score(planted.problem, planted.nodes)
    assert _mean_score(planted.problem, ranking) < ends + 0.11 * (plain - ends)
    assert METHODS[method].rank(planted.problem).ranking.tolist() == ranking


@pytest.mark.parametrize("method", BOTH)
def test_what_has_no_direction_or_no_features_is_refused_in_one_line(problem: Problem, method: str) -> None:
    one_sided = replace(problem, prompts=problem.prompts.assign(refusal_label=True))
    with pytest.raises(UserError, match="prompts of both sides"):
        METHODS[method].rank(one_sided)
    mlps = {
        site_of("mlp_out", layer): Components(site_of("mlp_out", layer), [f"mlp.{layer}"], "mlp", problem.model)
        for layer in (0, 1)
    }
    ablation = replace(problem.ablation, nodes=Nodes.of_spaces(mlps), dictionaries=mlps)
    with pytest.raises(UserError, match="nodes of this kind have none"):
        METHODS[method].rank(replace(problem, ablation=ablation))
