"""Counterfactual ablation against a slow, obvious oracle, and its three laws, on five architectures."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from paired_prompts import (
    COUNTERFACTUAL,
    POSITIVE,
    PROMPT,
    SPACES,
    alone,
    components,
    counterfactual_scores,
    features,
    oracle,
    paired_problem,
    pieces,
    random_architecture,
    scores_of,
    transcoders,
)

from sfc.circuits.faithfulness import full_scores
from sfc.circuits.gradients import score_gradients
from sfc.circuits.methods.attribution import attributed_effects
from sfc.models.loading import Model


@pytest.fixture(scope="module", params=["Llama", "GPT2", "GPTNeoX", "Qwen2", "Gemma2"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_architecture(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("spaces", "mode"),
    [
        *((SPACES["features"], mode) for mode in ("ablate", "node", "keep-current", "keep-clean")),
        *((SPACES["transcoders"], mode) for mode in ("node", "keep-clean")),
    ],
)
def test_packed_circuits_agree_with_the_oracle(network: Model, mode: str, spaces: Callable) -> None:
    problem, prompts = paired_problem(network, spaces(network), mode)
    keep = np.random.default_rng(0).random((2, problem.ablation.nodes.n_nodes)) < 0.5
    for fast, kept in zip(scores_of(problem, keep), keep, strict=True):
        np.testing.assert_allclose(fast, oracle(problem, prompts, torch.from_numpy(kept).float()), atol=1e-4)


@pytest.mark.parametrize("spaces", [*SPACES.values(), components], ids=[*SPACES, "components"])
@pytest.mark.parametrize("mode", ["ablate", "node"])
def test_law_nothing_kept_is_the_counterfactual_and_everything_kept_is_the_model(
    network: Model, mode: str, spaces: Callable
) -> None:
    problem, prompts = paired_problem(network, spaces(network), mode)
    keep = np.array([[False], [True]]).repeat(problem.ablation.nodes.n_nodes, axis=1)
    nothing, everything = scores_of(problem, keep)
    full = full_scores(network, problem.score, problem.runs)
    of_counterfactuals = counterfactual_scores(problem, prompts)
    np.testing.assert_allclose(nothing, of_counterfactuals, atol=1e-5)
    assert np.abs(full - of_counterfactuals).max() > 0.01, "the two sides of a pair differ"
    if mode == "node" or not problem.ablation.nodes.is_error.any():
        np.testing.assert_allclose(everything, full, atol=1e-4)


@pytest.mark.parametrize("spaces", SPACES.values(), ids=SPACES)
def test_law_a_circuit_that_cannot_hear_the_prompt_scores_as_the_counterfactual(
    network: Model, spaces: Callable
) -> None:
    problem, prompts = paired_problem(network, spaces(network), "ablate")
    nodes = problem.ablation.nodes
    keep = np.random.default_rng(1).random((4, nodes.n_nodes)) < 0.5
    heard = scores_of(problem, keep)
    keep[:, nodes.site_numbers == 0] = False
    deaf, of_counterfactuals = scores_of(problem, keep), counterfactual_scores(problem, prompts)
    np.testing.assert_allclose(deaf, np.broadcast_to(of_counterfactuals, deaf.shape), atol=1e-5)
    assert np.abs(heard - of_counterfactuals).max() > 0.01


def test_some_components_kept_agree_with_the_oracle(network: Model) -> None:
    problem, prompts = paired_problem(network, components(network), "node")
    keep = np.random.default_rng(2).random((2, problem.ablation.nodes.n_nodes)) < 0.5
    for fast, kept in zip(scores_of(problem, keep), keep, strict=True):
        np.testing.assert_allclose(fast, oracle(problem, prompts, torch.from_numpy(kept).float()), atol=1e-4)


def test_law_attributions_of_a_site_sum_to_what_the_difference_does_and_are_signed_by_the_side(network: Model) -> None:
    for spaces in (features(), transcoders(), components(network)):
        problem, prompts = paired_problem(network, spaces, "node")
        nodes, baseline = problem.ablation.nodes, problem.ablation.baseline
        for batch, prefix in problem.runs:
            effects = attributed_effects(problem, batch, prefix)
            undirected = score_gradients(replace(problem, score=problem.score.score), batch, prefix)  # pyright: ignore
            for site, (x, g, _) in undirected.items():
                of_site = effects.by_prompt[:, nodes.site_numbers == nodes.sites.index(site)].sum(1)
                for row, pair in enumerate(batch.pair.tolist()):
                    own = slice(1, int(batch.lengths[row]))
                    x_c = alone(network, prompts[COUNTERFACTUAL[pair]], baseline.layout, (site,))[site][0, 1:]
                    sign = 1 if PROMPT[pair] < len(POSITIVE) else -1
                    expected = sign * (g[row, own] * (x[row, own] - x_c)).sum()
                    assert float(of_site[row]) == pytest.approx(float(expected), abs=1e-4, rel=1e-3)
            torch.testing.assert_close(effects.by_position.sum(0), effects.by_prompt.sum(0), atol=1e-4, rtol=1e-3)


def test_attribution_of_single_features_is_that_of_dense_ones(network: Model) -> None:
    for problem, prompts in (paired_problem(network, spaces, "node") for spaces in (features(), transcoders())):
        site, layout = problem.ablation.nodes.sites[-1], problem.ablation.baseline.layout
        space = problem.ablation.dictionaries[site]
        for batch, prefix in problem.runs:
            fast = problem.ablation.nodes.split(attributed_effects(problem, batch, prefix).by_prompt)[site]
            x, g, read = score_gradients(problem, batch, prefix)[site]
            for row, pair in enumerate(batch.pair.tolist()):
                own = slice(1, int(batch.lengths[row]))
                of_c = alone(network, prompts[COUNTERFACTUAL[pair]], layout, (site, space.reads))
                read_c, x_c = of_c[space.reads][0, 1:], of_c[site][0, 1:]
                moved = space.encode(read[row, own]) - space.encode(read_c)
                slow = [*((g[row, own] @ space.W_dec.T) * moved).sum(0)]
                for part in range(space.n_parts):
                    of_tokens = zip(g[row, own], read[row, own], x[row, own], read_c, x_c, strict=True)
                    slow.append(
                        sum(
                            g @ (pieces(space, r, x)[part] - pieces(space, r_c, x_c)[part])
                            for g, r, x, r_c, x_c in of_tokens
                        )
                    )
                torch.testing.assert_close(fast[row], torch.stack(slow), atol=1e-4, rtol=1e-3)
