"""Node effects and edges: each against a slow oracle, a library, or a case known by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor

from sfc.circuits import gradients
from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.edge_kinds import correlation_edges
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.gradients import score_gradients
from sfc.circuits.methods import METHODS, CorrelationOptions, LearnedMaskOptions
from sfc.circuits.methods.attribution import attributed_effects
from sfc.circuits.methods.correlation import permutation_test
from sfc.circuits.methods.learned_mask import price
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.errors import UserError
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout
from sfc.models.running import last_logits
from sfc.models.score import score_batch
from sfc.saes.dictionary import TopKDictionary
from sfc.stats import pearson


def _gradients(problem: Problem, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """x and ds/dx at each site, from one run of the whole plain model."""
    kept: dict[str, Tensor] = {}

    def keep(site: str):
        def act(activation: Tensor) -> Tensor:
            x = activation.clone() if activation.requires_grad else activation.detach().requires_grad_()
            x.retain_grad()
            kept[site] = x
            return x

        return act

    sites = problem.ablation.nodes.sites
    problem.score(last_logits(problem.model, batch, {site: keep(site) for site in sites})).sum().backward()
    return {site: (x.detach(), x.grad) for site, x in kept.items()}  # pyright: ignore[reportReturnType]


def test_attribution_is_the_definition_summed_token_by_token(problem: Problem) -> None:
    baseline = problem.ablation.baseline
    for batch, prefix in problem.runs:
        fast = attributed_effects(problem, batch, prefix).by_prompt
        slow = []
        for site, (x, g) in _gradients(problem, batch).items():
            dictionary = problem.ablation.dictionaries[site]
            effects = torch.zeros(len(batch.prompts), dictionary.d_sae + 1)
            for row in range(len(batch.prompts)):
                for position in range(1, int(batch.lengths[row])):
                    place = batch.template_positions[row, position]
                    f = dictionary.encode(x[row, position])
                    error = x[row, position] - dictionary.decode(f)
                    difference = f - baseline.features[site][place]
                    effects[row, :-1] += (dictionary.W_dec @ g[row, position]) * difference
                    effects[row, -1] += g[row, position] @ (error - baseline.errors[site][place])
            slow.append(effects)
        torch.testing.assert_close(fast, torch.cat(slow, dim=1), atol=1e-5, rtol=1e-3)


def test_law_effects_of_a_site_sum_to_the_first_order_effect_of_its_activation(problem: Problem) -> None:
    nodes, baseline = problem.ablation.nodes, problem.ablation.baseline
    for batch, prefix in problem.runs:
        per_site = nodes.split(attributed_effects(problem, batch, prefix).by_prompt)
        for site, (x, g) in _gradients(problem, batch).items():
            x_ref = problem.ablation.dictionaries[site].decode(baseline.features[site]) + baseline.errors[site]
            moved = (g * (x - x_ref[batch.template_positions.clamp(min=0)])).sum(-1) * batch.touchable
            torch.testing.assert_close(per_site[site].sum(1), moved.sum(1), atol=1e-5, rtol=1e-3)


@pytest.fixture(params=["attn_out", "mlp_out", "resid_mid"])
def elsewhere(
    request: pytest.FixtureRequest, problem: Problem, batches: list[Batch], layout: TemplateLayout
) -> Problem:
    """The problem with its dictionaries at other sites, from the very first layer on."""
    dictionaries = {
        (site := f"blocks.{layer}.hook_{request.param}"): TopKDictionary(dictionary.state_dict(), k=6, site=site)
        for layer, dictionary in enumerate(problem.ablation.dictionaries.values())
    }
    baseline = mean_baseline(problem.model, dictionaries, batches[:2], layout)
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()})
    runs = PromptRuns.of(problem.model, batches, nodes.sites[0])
    return replace(problem, ablation=Ablation(nodes, dictionaries, baseline, "node"), runs=runs)


def test_the_law_holds_at_sites_before_which_no_block_has_run(elsewhere: Problem) -> None:
    test_law_effects_of_a_site_sum_to_the_first_order_effect_of_its_activation(elsewhere)
    everything = np.ones((1, elsewhere.ablation.nodes.n_nodes), dtype=bool)
    kept = ablated_scores(elsewhere.model, elsewhere.score, elsewhere.ablation, elsewhere.runs, everything)[0]
    np.testing.assert_allclose(kept, full_scores(elsewhere.model, elsewhere.score, elsewhere.runs), atol=1e-4)


def test_gradients_are_of_what_an_intervention_at_the_site_changes(elsewhere: Problem) -> None:
    """Finite differences. What the MLP reads is no part of the stream around it, which must not count."""
    batch, prefix = next(iter(elsewhere.runs))
    for site, (x, g, _) in score_gradients(elsewhere, batch, prefix).items():
        step = 1e-3 * x.norm() * g / g.norm()
        moved = [{site: lambda _, x=x + d: x} for d in (step, -step)]
        above, below = (score_batch(elsewhere.model, elsewhere.score, batch, act, prefix).sum() for act in moved)
        assert float(above - below) / 2 == pytest.approx(float((g * step).sum()), rel=0.02)


def test_gradients_do_not_depend_on_how_many_prompts_go_through_at_once(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, prefix = next(iter(problem.runs))
    together = score_gradients(problem, batch, prefix)
    monkeypatch.setattr(gradients, "GRADIENT_TOKENS", 2 * batch.width)
    for site, (x, g, read) in score_gradients(problem, batch, prefix).items():
        torch.testing.assert_close((x, g), together[site][:2], atol=1e-6, rtol=1e-4)
        assert read is x


@pytest.mark.parametrize("mode", ["keep-current", "ablate"])
@pytest.mark.parametrize("method", ["attribution", "learned-mask"])
def test_errors_that_no_circuit_decides_on_are_not_ranked(problem: Problem, mode: str, method: str) -> None:
    problem = problem.with_settings(learned_mask={"steps": 2})
    decided = replace(problem, ablation=replace(problem.ablation, error_mode=mode))
    features = np.flatnonzero(~problem.ablation.nodes.is_error)
    assert sorted(METHODS[method].rank(decided).ranking) == features.tolist()
    assert len(METHODS[method].rank(problem).ranking) == problem.ablation.nodes.n_nodes


def test_attribution_means_over_prompts_and_ranks_by_size(problem: Problem) -> None:
    effects = METHODS["attribution"].rank(problem)
    per_prompt = torch.cat([attributed_effects(problem, *run).by_prompt for run in problem.runs]).double().numpy()
    np.testing.assert_allclose(effects.effect, per_prompt.mean(0), atol=1e-6)
    np.testing.assert_allclose(effects.absolute, np.abs(per_prompt).mean(0), atol=1e-6)
    sizes = np.abs(effects.effect)[effects.ranking]
    assert (np.diff(sizes) <= 0).all() and sorted(effects.ranking) == list(range(len(effects.effect)))


def test_attribution_agrees_with_exact_ablation_where_the_step_is_small(problem: Problem) -> None:
    """First order: one node at the last site moves the residual stream a little, and the score nearly linearly."""
    effects = METHODS["attribution"].rank(problem).effect
    nodes = problem.ablation.nodes
    candidates = np.flatnonzero((nodes.site_numbers == 1) & ~nodes.is_error)
    keep = ~np.eye(nodes.n_nodes, dtype=bool)[candidates]
    everything = np.ones((1, nodes.n_nodes), dtype=bool)
    scores = ablated_scores(
        problem.model, problem.score, problem.ablation, problem.runs, np.concatenate([everything, keep])
    )
    exact = scores[0].mean() - scores[1:].mean(1)
    assert np.corrcoef(exact, effects[candidates])[0, 1] > 0.9


def test_a_learned_mask_beats_chance_on_its_own_prompts(problem: Problem) -> None:
    settings = {"steps": 200, "prompts": 3, "price": 1e-2, "last_price": 3e-2}
    effects = METHODS["learned-mask"].rank(problem.with_settings(learned_mask=settings))
    nodes = problem.ablation.nodes
    keep = np.zeros((6, nodes.n_nodes), dtype=bool)
    keep[0, effects.ranking[:50]] = True
    for draw in range(1, 6):
        keep[draw, np.random.default_rng(draw).permutation(nodes.n_nodes)[:50]] = True
    scores = ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, keep)
    everything = np.ones((1, nodes.n_nodes), dtype=bool)
    full = ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, everything)
    distance = np.abs(scores - full).mean(1)
    assert distance[0] < distance[1:].min()
    mask, held = effects.attributes["mask"], effects.attributes["held"]
    assert ((mask > 0) & (mask < 1)).all() and ((held > 0) & (held < 201)).all()
    assert (np.diff(held[effects.ranking]) <= 0).all()
    assert (np.floor(held) == 200).sum() == (mask > 0.5).sum() < nodes.n_nodes


def test_the_price_of_a_node_rises_to_the_first_price_and_on_to_the_last() -> None:
    options = LearnedMaskOptions(steps=100, price=1e-3, last_price=4e-3)
    prices = [price(step, options) for step in range(1, 101)]
    assert (np.diff(prices) > 0).all()
    np.testing.assert_allclose([prices[i] for i in (0, 39, 69, 99)], [2.5e-5, 1e-3, 2e-3, 4e-3])


def test_prompts_are_drawn_by_the_mask_seed(problem: Problem) -> None:
    settings = {"steps": 10, "prompts": 2}
    seeded = [problem.with_settings(learned_mask=settings | {"seed": seed}) for seed in (0, 0, 1)]
    masks = [METHODS["learned-mask"].rank(same).attributes["mask"] for same in seeded]
    assert (masks[0] == masks[1]).all() and not np.allclose(masks[0], masks[2])


def test_aggregated_features_are_those_of_the_stored_tokens(problem: Problem, prompts: list[TokenizedPrompt]) -> None:
    table, store = problem.store.tokens, problem.store
    site = problem.ablation.nodes.sites[0]
    features = problem.ablation.dictionaries[site].encode(store.read(site, 0, store.n_tokens)).numpy()
    functions = {"mean": lambda f: f.mean(0), "max": lambda f: f.max(0), "last": lambda f: f[-1]}
    for how, function in functions.items():
        fast = problem.with_settings(discovery={"aggregation": how}).features[site]
        for prompt in range(len(prompts)):
            rows = np.flatnonzero(table.prompt == prompt)
            rows = rows[np.argsort(table.position[rows])]
            np.testing.assert_allclose(fast[prompt], function(features[rows]), atol=1e-5)


def test_correlation_is_scipys_for_every_feature(problem: Problem) -> None:
    effects = METHODS["correlation"].rank(problem)
    features = np.concatenate([np.pad(f, ((0, 0), (0, 1))) for f in problem.features.values()], axis=1)
    for node in range(problem.ablation.nodes.n_nodes):
        if features[:, node].std() == 0:
            assert effects.effect[node] == 0
            continue
        expected = pearsonr(features[:, node], problem.labels.astype(float))
        assert effects.effect[node] == pytest.approx(expected.statistic, abs=1e-6)
    assert (np.abs(effects.effect[effects.ranking]) >= CorrelationOptions().threshold).all()
    is_error = problem.ablation.nodes.is_error
    assert not is_error[effects.ranking].any()
    options = CorrelationOptions()
    test = permutation_test(features, problem.labels, problem.pairs, options.permutations, options.min_firing, 0)
    np.testing.assert_array_equal(effects.attributes["p_value"][~is_error], test.p_value[~is_error])
    assert (effects.attributes["p_value"][is_error] == 1).all() and (effects.attributes["q_value"][is_error] == 1).all()
    assert (effects.attributes["p_value"] < 1).any()


def test_correlation_takes_the_strongest_of_each_layer(problem: Problem) -> None:
    effects = METHODS["correlation"].rank(problem.with_settings(correlation={"top_per_layer": 3}))
    chosen = problem.ablation.nodes.site_numbers[effects.ranking]
    assert np.bincount(chosen).tolist() == [3, 3]
    for site in (0, 1):
        at_site = np.abs(effects.effect[problem.ablation.nodes.site_numbers == site])
        assert np.abs(effects.effect[effects.ranking[chosen == site]]).min() == pytest.approx(np.sort(at_site)[-3])


def test_correlation_needs_two_labels_and_magnitude_does_not(problem: Problem) -> None:
    same = replace(problem, prompts=problem.prompts.assign(refusal_label=True))
    with pytest.raises(UserError, match="magnitude"):
        METHODS["correlation"].rank(same)
    effects = METHODS["magnitude"].rank(same)
    features = np.concatenate([np.pad(f, ((0, 0), (0, 1))) for f in same.features.values()], axis=1)
    np.testing.assert_allclose(effects.effect, 0.7 * np.abs(features).mean(0) + 0.3 * features.var(0), rtol=1e-5)
    ranked = effects.effect[effects.ranking]
    assert (np.diff(ranked) <= 0).all() and len(ranked) == (effects.effect > 0).sum() > 0


def test_magnitude_is_that_of_the_population_alone(problem: Problem) -> None:
    effects = METHODS["magnitude"].rank(problem.with_settings(discovery={"population": "safe"}))
    features = np.concatenate([np.pad(f, ((0, 0), (0, 1))) for f in problem.features.values()], axis=1)[~problem.labels]
    np.testing.assert_allclose(effects.effect, 0.7 * features.mean(0) + 0.3 * features.var(0), rtol=1e-5, atol=1e-7)


def test_correlation_edges_join_neighbouring_layers_by_pearsons_r(problem: Problem) -> None:
    nodes = problem.ablation.nodes
    members = [node for node in range(nodes.n_nodes) if node % 3 == 0 or nodes.is_error[node]]
    edges = correlation_edges(problem, members)
    upstream, downstream = (problem.features[site] for site in nodes.sites)
    expected = {}
    for d in (node - nodes.sizes[0] for node in members if nodes.site_numbers[node] == 1 and not nodes.is_error[node]):
        candidates = [u for u in members if nodes.site_numbers[u] == 0 and not nodes.is_error[u]]
        r = {u: float(pearson(upstream[:, [u]], downstream[:, [d]])[0, 0]) for u in candidates}
        best = sorted(r, key=lambda u: -abs(r[u]))[: problem.config.edges_per_node]
        expected |= {(u, d + nodes.sizes[0]): r[u] for u in best if abs(r[u]) >= problem.config.edge_threshold}
    assert {(u, d): pytest.approx(w, abs=1e-9) for u, d, w, *_ in edges} == expected and expected


def test_constant_and_perfect_features() -> None:
    label = np.array([0.0, 0, 1, 1])
    features = np.stack([np.full(4, 0.1), label * 3 + 5, -label], axis=1)
    np.testing.assert_allclose(pearson(features, label[:, None])[:, 0], [0, 1, -1])


def test_magnitude_by_hand(problem: Problem) -> None:
    class ByHand(Problem):
        features = {  # noqa: RUF012
            site: np.array([[1.0, 0, 0], [3, 0, 0], [9, 9, 0], [5, 2, 0], [9, 9, 9], [9, 9, 9]])
            for site in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
        }

    by_hand = ByHand(**{name: getattr(problem, name) for name in problem.__dataclass_fields__})
    effects = METHODS["magnitude"].rank(by_hand)
    # Prompts 0, 1 and 3 are toxic: values 1, 3, 5 and 0, 0, 2, so means 3 and 2/3, variances 8/3 and 8/9.
    assert effects.effect[:4] == pytest.approx([0.7 * 3 + 0.3 * 8 / 3, 0.7 * 2 / 3 + 0.3 * 8 / 9, 0, 0])
    assert effects.ranking.tolist() == [0, 4, 1, 5]
