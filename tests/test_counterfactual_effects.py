"""What is measured against counterfactuals beside circuits: effects, edges, masks, replies; their laws and oracles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_dictionary, random_transcoder
from paired_prompts import COUNTERFACTUAL, PROMPT, SITES, SPACES, oracle, paired_problem, random_architecture, scores_of
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.counterfactuals import Counterfactuals, Pairs
from sfc.circuits.edge_kinds import attribution_weights
from sfc.circuits.faithfulness import Ablations, full_scores, prepared
from sfc.circuits.methods import METHODS
from sfc.circuits.methods.attribution import integrated_effects
from sfc.circuits.methods.exact import exact_effects
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.data.render import TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import make_batches
from sfc.models.running import last_logits


@pytest.fixture(scope="module", params=SPACES.values(), ids=SPACES)
def paired(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Problem, list[TokenizedPrompt]]:
    model = random_architecture("Llama", tmp_path_factory.mktemp("model"))
    return paired_problem(model, request.param(model), "node")


def test_exact_effects_are_what_setting_one_node_to_the_counterfactual_does(
    paired: tuple[Problem, list[TokenizedPrompt]],
) -> None:
    """At the last site, where a node's own ablation leaves all others as they are."""
    problem, prompts = paired
    nodes = problem.ablation.nodes
    chosen = np.flatnonzero(nodes.site_numbers == len(nodes.sites) - 1)[[0, 7, 20, 48, -1]]
    full = full_scores(problem.model, problem.score, problem.runs)
    for node, exact in zip(chosen, exact_effects(problem, chosen.tolist()), strict=True):
        mask = torch.ones(nodes.n_nodes).index_fill(0, torch.tensor([node]), 0.0)
        np.testing.assert_allclose(exact, full - oracle(problem, prompts, mask), atol=1e-4)


def test_law_integrated_gradients_sum_to_what_the_site_of_the_counterfactual_does(
    paired: tuple[Problem, list[TokenizedPrompt]],
) -> None:
    problem, _ = paired
    nodes = problem.ablation.nodes
    effects = np.zeros((len(PROMPT), nodes.n_nodes))
    for batch, prefix in problem.runs:
        effects[batch.prompts] = integrated_effects(problem, batch, prefix, steps=40).by_prompt
    for number, site in enumerate(nodes.sites):
        here = nodes.site_numbers == number
        one = {site: problem.ablation.dictionaries[site]}
        only = replace(problem.ablation, nodes=Nodes.of_spaces(one), dictionaries=one)
        ablated = scores_of(replace(problem, ablation=only), np.zeros((1, here.sum()), dtype=bool))[0]
        lost = full_scores(problem.model, problem.score, problem.runs) - ablated
        np.testing.assert_allclose(effects[:, here].sum(1), lost, atol=2e-3)


def test_law_out_edges_of_a_node_sum_to_its_effect(paired: tuple[Problem, list[TokenizedPrompt]]) -> None:
    problem, _ = paired
    nodes = problem.ablation.nodes
    effects = METHODS["attribution"].rank(problem).effect
    out = np.zeros(nodes.n_nodes)
    for between in attribution_weights(problem, range(nodes.n_nodes)):
        out[between.sources] += between.weight.sum(1)
    # From an MLP to what comes after it, and from the stream to that, nodes are also heard around all sites.
    heard = nodes.site_numbers < (1 if nodes.sites[-1] == SITES[1] else 0)
    np.testing.assert_allclose(out[heard], effects[heard], atol=1e-4)


def test_the_mask_is_differentiable(paired: tuple[Problem, list[TokenizedPrompt]]) -> None:
    problem, _ = paired
    batch = problem.runs.batches[0]

    def scored(mask: Tensor) -> Tensor:
        acting = problem.ablation.interventions(mask[None], torch.zeros_like(batch.lengths), batch)
        return problem.score(last_logits(problem.model, batch, acting), batch).sum()

    mask = torch.full((problem.ablation.nodes.n_nodes,), 0.6, requires_grad=True)
    (gradient,) = torch.autograd.grad(scored(mask), mask)
    step = 1e-3 * torch.randn(len(mask), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        difference = (scored(mask + step) - scored(mask - step)).item()
    assert difference == pytest.approx(2 * (gradient @ step).item(), rel=0.05, abs=1e-4)


def test_replies_to_a_prompt_of_which_nothing_is_kept_are_those_to_its_counterfactual(
    paired: tuple[Problem, list[TokenizedPrompt]],
) -> None:
    """At the first token, which comes from the prompt alone, in a batch that is padded on the other side."""
    problem, prompts = paired
    nothing = np.zeros((1, problem.ablation.nodes.n_nodes), dtype=bool)
    runs = prepared(problem.model, problem.runs)
    [replies] = engine.replies(runs, problem.score, Ablations(problem.ablation, nothing), 1).texts
    layout = problem.ablation.baseline.layout
    for pair, reply in enumerate(replies):
        batch = make_batches([prompts[COUNTERFACTUAL[pair]]], layout, 1, problem.model.device)[0]
        with torch.no_grad():
            token = last_logits(problem.model, batch).argmax(-1)
        assert reply == problem.model.tokenizer.batch_decode(token[:, None], skip_special_tokens=True)[0]


def test_subsets_of_runs_keep_their_counterfactuals(paired: tuple[Problem, list[TokenizedPrompt]]) -> None:
    problem, _ = paired
    keep = np.random.default_rng(3).random((1, problem.ablation.nodes.n_nodes)) < 0.5
    chosen = np.array([1, 4, 6])
    some = replace(problem, runs=problem.runs.subset(chosen))
    pairs = np.concatenate([batch.pair for batch in some.runs.batches])
    assert sorted(pairs.tolist()) == chosen.tolist()
    np.testing.assert_allclose(scores_of(some, keep)[0], scores_of(problem, keep)[0][pairs], atol=1e-5)


def test_prompts_that_do_not_correspond_and_batches_without_pairs_are_refused(
    paired: tuple[Problem, list[TokenizedPrompt]],
) -> None:
    problem, prompts = paired
    model, layout = problem.model, problem.ablation.baseline.layout
    unlike = Pairs(torch.tensor([0]), torch.tensor([4]), torch.tensor([True]))
    with pytest.raises(UserError, match="equally many tokens"):
        Counterfactuals.of(model, problem.ablation.dictionaries, prompts, unlike, layout, 100)
    batch = make_batches(prompts[:1], layout, 100, model.device)[0]
    nothing = torch.zeros(1, problem.ablation.nodes.n_nodes)
    with pytest.raises(ValueError, match="of pairs"):
        problem.ablation.interventions(nothing, torch.zeros_like(batch.lengths), batch)
    with pytest.raises(ValueError, match="of pairs"):
        problem.score(torch.zeros(1, 260), batch)


def agreement(problem: Problem, keep: np.ndarray) -> float:
    full = full_scores(problem.model, problem.score, problem.runs)
    empty, *circuits = scores_of(problem, np.stack([np.zeros_like(keep), keep]))
    return 1 - np.square(circuits[0] - full).sum() / np.square(empty - full).sum()


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_a_learned_mask_agrees_on_both_sides_better_than_random_circuits_do(
    paired: tuple[Problem, list[TokenizedPrompt]], kl_weight: float
) -> None:
    problem, _ = paired
    settings = {"steps": 120, "pairs": 4, "price": 5e-3, "last_price": 3e-2, "kl_weight": kl_weight}
    problem = problem.with_settings(learned_mask=settings)
    ranking, n_nodes = METHODS["learned-mask"].rank(problem).ranking, problem.ablation.nodes.n_nodes
    learned = np.isin(np.arange(n_nodes), ranking[:30])
    random = [np.isin(np.arange(n_nodes), np.random.default_rng(i).permutation(n_nodes)[:30]) for i in range(5)]
    assert agreement(problem, learned) > max(agreement(problem, keep) for keep in random) + 0.05


def test_what_a_mask_learns_depends_on_the_weight_of_the_divergence(
    paired: tuple[Problem, list[TokenizedPrompt]],
) -> None:
    problem = paired[0].with_settings(learned_mask={"steps": 5, "pairs": 4})
    masks = [
        METHODS["learned-mask"].rank(problem.with_settings(learned_mask={"kl_weight": w})).attributes["mask"]
        for w in (0.0, 0.0, 1.0)
    ]
    assert (masks[0] == masks[1]).all() and not np.allclose(masks[0], masks[2])


def test_a_mask_learns_from_pooled_pairs_as_often_as_it_is_told(
    paired: tuple[Problem, list[TokenizedPrompt]],
) -> None:
    whole = paired[0].with_settings(learned_mask={"steps": 8, "pairs": 4})
    few = replace(whole, runs=whole.runs.subset(np.array([0, 1])))
    asked = []

    def pooled() -> Problem:
        asked.append(True)
        return whole

    def mask(problem: Problem, share: float) -> np.ndarray:
        problem = problem.with_settings(learned_mask={"pooled": share})
        return METHODS["learned-mask"].rank(problem).attributes["mask"]

    alone = mask(few, 0.5)
    assert (mask(replace(few, pooled=pooled), 0.0) == alone).all() and not asked
    assert (mask(replace(whole, pooled=pooled), 1.0) == mask(whole, 0.0)).all() and asked
    masks = [alone, *(mask(replace(few, pooled=pooled), share) for share in (0.25, 0.5, 1.0))]
    assert all(not np.allclose(a, b) for number, a in enumerate(masks) for b in masks[:number])


def test_other_dictionaries_need_no_other_runs(paired: tuple[Problem, list[TokenizedPrompt]]) -> None:
    """Those of a null, say."""
    problem, _ = paired
    others = {
        site: random_dictionary(site, d_sae=40, k=5, seed=7 + number)
        if space.reads == site
        else random_transcoder(space.reads, site, skip=False, seed=7 + number, d_sae=40)
        for number, (site, space) in enumerate(problem.ablation.dictionaries.items())
    }
    again, _ = paired_problem(problem.model, others, "ablate")
    baseline = problem.ablation.baseline.with_spaces(others)
    ablation = Ablation(Nodes.of_spaces(others), others, baseline, "ablate")
    keep = np.random.default_rng(5).random((2, ablation.nodes.n_nodes)) < 0.5
    np.testing.assert_allclose(scores_of(replace(problem, ablation=ablation), keep), scores_of(again, keep), atol=1e-5)
