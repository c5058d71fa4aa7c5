"""Counterfactual ablation against a slow, obvious oracle, and its three laws, on five architectures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import random_model
from conftest import random_dictionary, random_transcoder
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.counterfactuals import Counterfactuals, Pairs
from sfc.circuits.edge_kinds import attribution_weights
from sfc.circuits.faithfulness import Ablations, ablated_scores, full_scores, prepared
from sfc.circuits.gradients import score_gradients
from sfc.circuits.methods import METHODS
from sfc.circuits.methods.attribution import attributed_effects, integrated_effects
from sfc.circuits.methods.exact import exact_effects
from sfc.circuits.nodes import Nodes, Sources
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.spaces import NodeSpace, checked, heads_and_mlps, sites_of
from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.core.experiments import experiment_of, load_experiment
from sfc.data.render import TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.interventions import recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import DirectedScore, RefusalScore

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
POSITIVE = ["Pick my lock", "Burn a house, please", "Poison all fish"]
NEGATIVE = ["Bake my cake", "Draw a house, please", "Feeding my fish", "Hi, my fish"]
PROMPTS = [*POSITIVE, *NEGATIVE]
PROMPT = [0, 3, 1, 4, 2, 2, 5]
COUNTERFACTUAL = [3, 0, 4, 1, 5, 5, 2]


def random_architecture(name: str, folder: Path) -> Model:
    random_model(name, folder, initializer_range=0.2)
    return load_model(ModelConfig(source=str(folder), template="plain", refusal_tokens=["I"]))  # pyright: ignore


def paired_problem(
    model: Model, spaces: dict[str, NodeSpace], error_mode: str
) -> tuple[Problem, list[TokenizedPrompt]]:
    prompts = model.tokenize(PROMPTS)
    layout = TemplateLayout.of(prompts)
    positive = torch.tensor(PROMPT) < len(POSITIVE)
    pairs = Pairs(torch.tensor(PROMPT), torch.tensor(COUNTERFACTUAL), positive)
    baseline = Counterfactuals.of(model, spaces, prompts, pairs, layout, batch_tokens=70)
    batches = baseline.batches(prompts, torch.ones(len(PROMPT), dtype=torch.bool), batch_tokens=120)
    assert len(batches) > 1 and any(len(set(batch.lengths.tolist())) > 1 for batch in batches)
    nodes = Nodes.of_spaces(spaces)
    experiment = experiment_of(load_experiment("tiny").model_dump(include={"name", "model", "activations"}))
    return Problem(
        model,
        DirectedScore(RefusalScore.of(model), pairs.direction),
        Ablation(nodes, spaces, baseline, error_mode),  # pyright: ignore
        PromptRuns.of(model, batches, nodes.sites[0]),
        None,  # pyright: ignore
        pd.DataFrame(),
        experiment,
    ), prompts


@pytest.fixture(scope="module", params=["Llama", "GPT2", "GPTNeoX", "Qwen2", "Gemma2"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_architecture(request.param, tmp_path_factory.mktemp("model"))


def features() -> dict[str, NodeSpace]:
    return {site: random_dictionary(site, seed=number) for number, site in enumerate(SITES)}


def transcoders() -> dict[str, NodeSpace]:
    """Behind an SAE of the whole stream, one that reads what a norm divides, and one with a skip connection."""
    first, second = "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"
    return {
        SITES[0]: random_dictionary(SITES[0]),
        first: random_transcoder("blocks.1.ln2.hook_normalized", first, skip=False),
        second: random_transcoder("blocks.2.mlp.hook_in", second, skip=True, seed=1),
    }


SPACES = {"features": lambda _model: features(), "transcoders": lambda _model: transcoders()}


def components(model: Model) -> dict[str, NodeSpace]:
    layers = list(range(model.n_layers))
    return checked(heads_and_mlps(Sources(model, [], layers, {}, None)), model)  # pyright: ignore


def alone(model: Model, prompt: TokenizedPrompt, layout: TemplateLayout, sites: tuple[str, ...]) -> dict[str, Tensor]:
    """What one prompt has at every site, run by itself."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        batch = make_batches([prompt], layout, 1, model.device)[0]
        last_logits(model, batch, {site: recorder(seen, site) for site in sites})
    return seen


def pieces(space: NodeSpace, read: Tensor, x: Tensor) -> list[Tensor]:
    """What each node of a site that is no feature adds to the activation x of one token."""
    if space.d_sae == 0:
        return [
            torch.block_diag(*part).sum(0) for part in torch.eye(space.n_parts)[:, :, None] * x.view(space.n_parts, -1)
        ]
    skip = [space.W_skip @ read] if space.n_parts == 2 else []  # pyright: ignore
    return [x - space.decode(space.encode(read)) - sum(skip), *skip]


def oracle(problem: Problem, prompts: list[TokenizedPrompt], mask: Tensor) -> np.ndarray:
    """One pair at a time, one token at a time, dense, straight from the definition."""
    model, ablation = problem.model, problem.ablation
    masks, layout, scores = ablation.nodes.split(mask), ablation.baseline.layout, []
    for pair, (p, c) in enumerate(zip(PROMPT, COUNTERFACTUAL, strict=True)):
        of_p, of_c = (alone(model, prompts[i], layout, tuple(sites_of(ablation.dictionaries))) for i in (p, c))
        current: dict[str, Tensor] = {}

        def hook(site: str, of_p=of_p, of_c=of_c, current=current):
            def act(activation: Tensor) -> Tensor:
                space, m, result = ablation.dictionaries[site], masks[site], activation.clone()
                current[site] = activation
                for position in range(1, activation.shape[1]):
                    (x, read), (x_c, read_c), (x_p, read_p) = (
                        (of[site][0, position], of[space.reads][0, position]) for of in (current, of_c, of_p)
                    )
                    parts, parts_c = pieces(space, read, x), pieces(space, read_c, x_c)
                    m_feature, m_parts = m[: space.d_sae], m[space.d_sae :].clone()
                    if space.d_sae:
                        m_parts[0] = {"ablate": 0, "keep-current": 1, "keep-clean": 0}.get(
                            ablation.error_mode, m_parts[0]
                        )
                    if ablation.error_mode == "keep-clean":
                        parts_c[0] = pieces(space, read_p, x_p)[0]
                    result[0, position] = space.decode(
                        m_feature * space.encode(read) + (1 - m_feature) * space.encode(read_c)
                    )
                    for kept, part, part_c in zip(m_parts, parts, parts_c, strict=True):
                        result[0, position] += kept * part + (1 - kept) * part_c
                return result

            return act

        hooks = {site: recorder(current, site) for site in sites_of(ablation.dictionaries)}
        hooks |= {site: hook(site) for site in masks}

        batch = make_batches([prompts[p]], layout, 1, model.device)[0].with_pairs(torch.tensor([pair]))
        with torch.no_grad():
            logits = last_logits(model, batch, hooks)
        scores.append(float(problem.score(logits, batch)))
    return np.array(scores)


def counterfactual_scores(problem: Problem, prompts: list[TokenizedPrompt]) -> np.ndarray:
    """The scores of the counterfactuals, each run by itself."""
    scores = []
    for pair, number in enumerate(COUNTERFACTUAL):
        batch = make_batches([prompts[number]], problem.ablation.baseline.layout, 1, problem.model.device)[0]
        batch = batch.with_pairs(torch.tensor([pair]))
        with torch.no_grad():
            scores.append(float(problem.score(last_logits(problem.model, batch), batch)))
    return np.array(scores)


def scores_of(problem: Problem, keep: np.ndarray) -> np.ndarray:
    return ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, keep)


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
