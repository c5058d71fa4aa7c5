"""Edges: against the definition token by token, their law, finite differences, and rules by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, random_model
from conftest import SITES, random_dictionary
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.edge_kinds import (
    EDGES,
    Edge,
    Weights,
    attribution_edges,
    attribution_weights,
    site_pairs,
    strongest_edges,
    tokens_of_roles,
    without_dead_ends,
)
from sfc.circuits.edges import Pair, edge_effects, edge_parts
from sfc.circuits.methods.attribution import attributed_effects
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.config import ModelConfig
from sfc.core.sites import SiteKind, in_order, site_of
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.interventions import recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore


def at_sites(problem: Problem, model: Model, prompts: list[TokenizedPrompt], sites: tuple[str, ...]) -> Problem:
    """The problem put to a model with random dictionaries at these sites."""
    layout = TemplateLayout.of(prompts)
    batches = make_batches(prompts, layout, 80, model.device)
    dictionaries = {site: random_dictionary(site, seed=number) for number, site in enumerate(sites)}
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()})
    ablation = Ablation(nodes, dictionaries, mean_baseline(model, dictionaries, batches, layout), "node")
    runs = PromptRuns.of(model, batches, sites[0])
    return replace(problem, model=model, score=RefusalScore.of(model), ablation=ablation, runs=runs)


def all_pairs(problem: Problem) -> list[Pair]:
    nodes = problem.ablation.nodes
    numbers = [torch.arange(size) for size in nodes.sizes]
    return [
        Pair(nodes.sites[u], nodes.sites[d], numbers[u], numbers[d], stops)
        for u, d, stops in site_pairs(nodes, problem.model.is_parallel)
    ]


def run_with(problem: Problem, batch: Batch, site: str, x: Tensor, until: str) -> tuple[Tensor, Tensor]:
    """The activation at a later site and the score of a batch of one prompt, run from the tokens, where x [token, d_in]
    stands in for the activation at one site, at all tokens but the first."""
    seen: dict[str, Tensor] = {}
    replaced = {site: lambda activation: torch.cat([activation[:, :1], x[None]], 1)}
    logits = last_logits(
        problem.model, batch, {**replaced, until: recorder(seen, until)} if site != until else replaced
    )
    return seen.get(until, x[None])[0, -len(x) :], problem.score(logits)[0]


def clean_activations(problem: Problem, batch: Batch, sites: tuple[str, ...]) -> list[Tensor]:
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        last_logits(problem.model, batch, {site: recorder(seen, site) for site in sites})
    return [seen[site][0, 1:].clone() for site in sites]


def edges_by_definition(problem: Problem, batch: Batch, upstream: str, downstream: str) -> Tensor:
    """`sum_{s,t} (ds/df_d,t) (df_d,t/df_u,s) (f_u,s - f_ref_u,s)` of one prompt, each factor by itself, and every pair
    of tokens by itself: the Jacobians of functions of features and errors, `x = sum_i f_i d_i + b + e`."""
    jacobian = torch.autograd.functional.jacobian
    above, below = problem.ablation.dictionaries[upstream], problem.ablation.dictionaries[downstream]
    x, x_next = clean_activations(problem, batch, (upstream, downstream))
    f, f_next = above.encode(x), below.encode(x_next)
    e, e_next = x - above.decode(f), x_next - below.decode(f_next)

    def next_values(f: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        x_next, _ = run_with(problem, batch, upstream, above.decode(f) + e, downstream)
        f_next = below.encode(x_next)
        return f_next, x_next - below.decode(f_next)

    def score(f_next: Tensor, e_next: Tensor) -> Tensor:
        return run_with(problem, batch, downstream, below.decode(f_next) + e_next, downstream)[1]

    (ff, fe), (ef, ee) = jacobian(next_values, (f, e))  # [t, d, s, u], by token and by number within the token
    of_features, of_error = jacobian(score, (f_next, e_next))
    template_positions = batch.template_positions[0, 1:]
    df = f - problem.ablation.baseline.features[upstream][template_positions]
    de = e - problem.ablation.baseline.errors[upstream][template_positions]
    edges = torch.zeros(above.d_sae + 1, below.d_sae + 1)
    for t in range(len(x)):
        for s in range(len(x)):
            edges[:-1, :-1] += (of_features[t][:, None] * ff[t, :, s] * df[s]).T
            edges[-1, :-1] += of_features[t] * (fe[t, :, s] @ de[s])
            edges[:-1, -1] += (of_error[t] @ ef[t, :, s]) * df[s]
            edges[-1, -1] += of_error[t] @ ee[t, :, s] @ de[s]
    return edges


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of three layers, so that after the second every token still moves the score."""
    return random_architecture("Qwen2", tmp_path_factory.mktemp("deep"))


def random_architecture(architecture: str, folder: Path) -> Model:
    random_model(architecture, folder, initializer_range=0.2)
    return load_model(ModelConfig(source=str(folder), template="plain", refusal_tokens=["I"]))  # pyright: ignore


@pytest.mark.parametrize("kind", ["resid_post", "resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_edges_are_the_definition_token_by_token(problem: Problem, deep: Model, kind: str) -> None:
    deep = replace(deep, config=deep.config.model_copy(update={"template": "<|bos|>{prompt}?"}))
    prompts = deep.tokenize(["What", "hm"])
    random = at_sites(problem, deep, prompts, tuple(f"blocks.{layer}.hook_{kind}" for layer in (0, 1)))
    (pair,) = all_pairs(random)
    shortest = make_batches(prompts[:1], TemplateLayout.of(prompts), 1, deep.device)[0]
    prefix = PromptRuns.of(deep, [shortest], pair.upstream).cached_residuals[0]
    (fast,) = edge_effects(random, shortest, prefix, [pair], 1000)
    slow = edges_by_definition(random, shortest, pair.upstream, pair.downstream)
    assert (slow != 0).any(0).sum() > 10 and shortest.ids.shape[1] == 6
    torch.testing.assert_close(fast[0], slow, atol=1e-5 * float(slow.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2)], ids=["neighbours", "two layers apart"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_law_the_edges_out_of_a_node_sum_to_its_effect(
    problem: Problem, architecture: str, layers: tuple[int, ...], tmp_path: Path
) -> None:
    model = random_architecture(architecture, tmp_path)
    prompts = model.tokenize(["Bake bread?", "How do I kill a process?", "hm"])
    random = at_sites(problem, model, prompts, tuple(f"blocks.{layer}.hook_resid_post" for layer in layers))
    nodes = random.ablation.nodes
    for batch, prefix in random.runs:
        expected = attributed_effects(random, batch, prefix).by_prompt.split(nodes.sizes, dim=1)
        few = torch.tensor([5, nodes.widths[0]])  # a feature and the error: the Jacobian is applied from their side
        from_few = [pair._replace(sources=few) for pair in all_pairs(random)]
        for sources, pairs in ((slice(None), all_pairs(random)), (few, from_few)):
            for between, effect in zip(edge_effects(random, batch, prefix, pairs, 500), expected, strict=False):
                assert_close_to_1e4(between.sum(2), effect[:, sources])


SEVERAL_KINDS = {
    "Marks et al.": ("attn_out", "mlp_out", "resid_post"),
    "what the MLP reads": ("resid_pre", "attn_out", "resid_mid", "mlp_out"),
    "blocks' outputs alone": ("attn_out", "mlp_out"),
}


@pytest.mark.parametrize("kinds", SEVERAL_KINDS.values(), ids=SEVERAL_KINDS)
@pytest.mark.parametrize("architecture", ["GPT2", "Bloom", "GPTNeoX", "Qwen2", "Gemma2"])
def test_law_it_holds_for_sites_of_several_kinds(
    problem: Problem, architecture: str, kinds: tuple[SiteKind, ...], tmp_path: Path
) -> None:
    model = random_architecture(architecture, tmp_path)
    kinds = tuple(kind for kind in kinds if site_of(kind, 0) in model.hooks)  # parallel blocks have no `resid_mid`
    prompts = model.tokenize(["Bake bread?", "hm"])
    sites = in_order([site_of(kind, layer) for kind in kinds for layer in (0, 1)])
    random = at_sites(problem, model, prompts, (*sites, site_of("resid_post", 2)))
    nodes, pairs = random.ablation.nodes, all_pairs(random)
    for batch, prefix in random.runs:
        effects = edge_effects(random, batch, prefix, pairs, 2000)
        expected = attributed_effects(random, batch, prefix).by_prompt.split(nodes.sizes, dim=1)
        largest = max(effect.abs().max() for effect in expected)
        for site, effect in zip(nodes.sites[:-1], expected, strict=False):
            out = [between.sum(2) for pair, between in zip(pairs, effects, strict=True) if pair.upstream == site]
            assert (torch.stack(out).sum(0) - effect).abs().max() <= 1e-4 * largest
        assert all(of.any() for of in effects), "all that is drawn passes something"
    # Attention and MLP side by side: nothing passes from one to the other.
    between = {(site_of("attn_out", layer), site_of("mlp_out", layer)) for layer in (0, 1)}
    between &= {(pair.upstream, pair.downstream) for pair in pairs}
    assert not between if architecture == "GPTNeoX" else "resid_mid" in kinds or len(between) == 2


@pytest.mark.parametrize("architecture", ["GPT2", "Qwen2"])
def test_law_parts_by_role_sum_to_the_weight_and_are_those_of_tokens_alone(
    problem: Problem, architecture: str, tmp_path: Path
) -> None:
    """A part is what the weight would be if sources were displaced, and targets heard, at its roles' tokens alone."""
    model = random_architecture(architecture, tmp_path)
    model = replace(model, config=model.config.model_copy(update={"template": "<|bos|>Say:{prompt}?!"}))
    prompts = model.tokenize(["Bake bread?", "hm", "Why not?"])
    random = at_sites(problem, model, prompts, tuple(f"blocks.{layer}.hook_resid_post" for layer in (0, 1)))
    layout = random.ablation.baseline.layout
    assert layout.roles[:2] == ["prefix", "content"] and len(layout.roles) == 2 + layout.n_suffix >= 4
    (pair,) = all_pairs(random)
    few = torch.tensor([5, random.ablation.nodes.widths[0]])
    for batch, prefix in random.runs:
        roles = tokens_of_roles(batch, layout)
        assert roles.sum(0).eq(1).all() and roles.any(1).all()
        for asked in (pair, pair._replace(sources=few)):
            (parts,) = edge_parts(random, batch, prefix, [asked], 500, roles)
            (whole,) = edge_effects(random, batch, prefix, [asked], 500)
            assert_close_to_1e4(parts.sum((1, 2)), whole)
            later, earlier = torch.tril_indices(len(roles), len(roles), -1)
            assert not parts[:, later, earlier].any(), "nothing passes back"
        # Two groups are the sums of their roles.
        (two,) = edge_parts(random, batch, prefix, [pair], 500, torch.stack([roles[:2].any(0), roles[2:].any(0)]))
        (parts,) = edge_parts(random, batch, prefix, [pair], 500, roles)
        assert_close_to_1e4(two[:, 0, 1], parts[:, :2, 2:].sum((1, 2)))
        # What sources displace at the template after the prompt alone: those before it have their baseline.
        effects = attributed_effects(random, batch, prefix).by_position
        of_suffix = two[:, 1].sum((0, 1, 3))
        assert_close_to_1e4(of_suffix, effects[layout.n_prefix + 1 :, : len(of_suffix)].sum(0))


def test_edges_of_a_circuit_carry_the_parts_of_their_weight(problem: Problem) -> None:
    edges = attribution_edges(problem, range(problem.ablation.nodes.n_nodes))
    roles = problem.ablation.baseline.layout.roles
    names = {f"weight_{source}_to_{target}" for source in roles for target in roles}
    assert edges and all(set(edge.by_role) <= names and edge.by_role for edge in edges)
    for edge in edges:
        assert sum(edge.by_role.values()) == pytest.approx(edge.weight, rel=1e-4, abs=1e-9)
    assert len({name for edge in edges for name in edge.by_role}) > 3


def test_law_it_holds_before_the_first_layer_too(problem: Problem, model: Model) -> None:
    prompts = model.tokenize(["Bake bread?", "hm"])
    elsewhere = at_sites(problem, model, prompts, ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"))
    for batch, prefix in elsewhere.runs:
        (edges,) = edge_effects(elsewhere, batch, prefix, all_pairs(elsewhere), 500)
        assert_close_to_1e4(edges.sum(2), attributed_effects(elsewhere, batch, prefix).by_prompt[:, : edges.shape[1]])


def assert_close_to_1e4(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_both_sides_of_the_jacobian_and_any_packing_give_the_same(problem: Problem) -> None:
    few, everything = torch.tensor([3, 7, 20, 48]), torch.arange(49)
    batch, prefix = next(iter(problem.runs))
    (all_edges,) = edge_effects(problem, batch, prefix, [Pair(*SITES, everything, everything)], 1)
    for packed_tokens in (1, 200, 100_000):
        (from_sources,) = edge_effects(problem, batch, prefix, [Pair(*SITES, few, everything)], packed_tokens)
        (from_targets,) = edge_effects(problem, batch, prefix, [Pair(*SITES, everything, few)], packed_tokens)
        torch.testing.assert_close(from_sources, all_edges[:, few], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(from_targets, all_edges[:, :, few], atol=1e-6, rtol=1e-4)


def test_an_edge_is_what_the_score_loses_through_one_feature_when_another_moves(
    problem: Problem, prompts: list[TokenizedPrompt], layout: TemplateLayout
) -> None:
    """Finite differences: move x a little towards the baseline of u, let only d hear of it, and score."""
    batch = make_batches(prompts[:1], layout, 1, problem.model.device)[0]
    prefix = PromptRuns.of(problem.model, [batch], SITES[0]).cached_residuals[0]
    (edges,) = edge_effects(problem, batch, prefix, all_pairs(problem), 1000)
    above, below = (problem.ablation.dictionaries[site] for site in SITES)
    x, x_next = clean_activations(problem, batch, SITES)
    moved = above.encode(x) - problem.ablation.baseline.features[SITES[0]][batch.template_positions[0, 1:]]
    strongest = edges[0, :-1, :-1].abs().flatten().topk(5).indices.tolist()
    for u, d in (divmod(place, below.d_sae) for place in strongest):
        scores = []
        for step in (1e-2, -1e-2):
            x_moved = x - step * moved[:, [u]] * above.W_dec[u]
            heard = below.encode(run_with(problem, batch, SITES[0], x_moved, SITES[1])[0])[:, d]
            through = x_next + (heard - below.encode(x_next)[:, d])[:, None] * below.W_dec[d]
            scores.append(float(run_with(problem, batch, SITES[1], through, SITES[1])[1]))
        assert edges[0, u, d].item() == pytest.approx((scores[1] - scores[0]) / 2e-2, rel=0.03)


def test_edges_do_not_depend_on_the_batch(
    problem: Problem, prompts: list[TokenizedPrompt], layout: TemplateLayout
) -> None:
    device = problem.model.device

    def per_prompt(batch_tokens: int) -> Tensor:
        runs = PromptRuns.of(problem.model, make_batches(prompts, layout, batch_tokens, device), SITES[0])
        edges = [edge_effects(problem, *run, all_pairs(problem), 300)[0] for run in runs]
        return torch.cat(edges)[torch.cat([batch.prompts for batch in runs.batches]).argsort()]

    torch.testing.assert_close(per_prompt(1), per_prompt(10_000), atol=1e-6, rtol=1e-4)


def test_a_score_that_nothing_moves_has_edges_of_zero(problem: Problem) -> None:
    token = problem.score.tokens[:1]
    constant = replace(problem, score=RefusalScore(token, token))
    members = range(problem.ablation.nodes.n_nodes)
    assert all((between.absolute == 0).all() for between in attribution_weights(constant, members))
    assert attribution_edges(constant, members) == []


def test_nothing_passes_into_a_feature_that_is_off(problem: Problem) -> None:
    """The second site is the last layer's, where only the last token moves the score."""
    seen: dict[str, Tensor] = {}
    fires = torch.zeros(problem.ablation.nodes.widths[1], dtype=torch.bool)
    for batch, _ in problem.runs:
        last_logits(problem.model, batch, {SITES[1]: recorder(seen, SITES[1])})
        x = seen[SITES[1]][torch.arange(len(batch.lengths)), batch.lengths - 1]
        fires |= (problem.ablation.dictionaries[SITES[1]].encode(x) > 0).any(0)
    (between,) = attribution_weights(problem, range(problem.ablation.nodes.n_nodes))
    assert 0 < fires.sum() < len(fires)
    assert ((between.absolute != 0).any(0) == [*fires.tolist(), True]).all()


def test_memory_is_bounded_by_the_tokens_that_go_through_at_once(problem: Problem) -> None:
    batch, prefix = next(iter(problem.runs))
    pairs, tokens = all_pairs(problem), batch.ids.numel()

    def largest(packed_tokens: int) -> int:
        with LargestTensor() as mode:
            edge_effects(problem, batch, prefix, pairs, packed_tokens)
        return mode.elements

    one, four, all_at_once = largest(1), largest(4 * tokens), largest(1000 * tokens)
    assert one < four <= 4 * one < all_at_once


def test_means_over_prompts_and_what_of_them_is_kept(problem: Problem) -> None:
    nodes = problem.ablation.nodes
    members = [number for number in range(nodes.n_nodes - 1, -1, -1) if number % 2 or nodes.is_error[number]]
    (between,) = attribution_weights(problem, members)
    per_prompt = torch.cat([edge_effects(problem, *run, all_pairs(problem), 500)[0] for run in problem.runs]).numpy()
    within = np.ix_(range(len(per_prompt)), between.sources, between.targets - nodes.sizes[0])
    np.testing.assert_allclose(between.weight, per_prompt[within].mean(0), atol=1e-6)
    np.testing.assert_allclose(between.absolute, np.abs(per_prompt[within]).mean(0), atol=1e-6)
    assert set(between.sources) | set(between.targets) == set(members)
    assert nodes.is_error[between.sources].any() and nodes.is_error[between.targets].any()

    kept = EDGES["attribution"](problem.with_settings(discovery={"edge_share": 0.2, "edges_per_node": 3}), members)
    enough = np.abs(between.weight) >= 0.2 * np.abs(between.weight).max()
    into = {int(target): min(3, int(enough[:, column].sum())) for column, target in enumerate(between.targets)}
    counted = {target: sum(edge.target == target for edge in kept) for target in into}
    assert counted == into and 0 < len(kept) < enough.sum()


def test_sites_without_members_have_no_edges(problem: Problem) -> None:
    assert attribution_edges(problem, [0, 1, 2]) == []
    assert attribution_edges(problem, []) == []


def _by_hand(sources: list[int], targets: list[int], weight: list[list[float]]) -> Weights:
    """Two groups of tokens: a quarter passes within the first, the rest from it to the second."""
    all_of = np.array(weight)
    parts = np.array([[0.25 * all_of, 0.75 * all_of], [0 * all_of, 0 * all_of]])
    return Weights(np.array(sources), np.array(targets), all_of, np.full(all_of.shape, 9.0), parts)


HAND = [
    _by_hand([0, 1, 2], [3, 4], [[-3.0, 0.5], [1, 0], [2, -0.4]]),
    _by_hand([3, 4], [5], [[0.0], [-1]]),
]


def test_the_strongest_edges_by_hand() -> None:
    def kept(threshold: float, per_node: int) -> list[tuple[int, int, float]]:
        return [edge[:3] for edge in strongest_edges(HAND, threshold, per_node)]

    assert kept(0, 2) == [(0, 3, -3), (2, 3, 2), (0, 4, 0.5), (2, 4, -0.4), (4, 5, -1)]
    assert kept(1, 9) == [(0, 3, -3), (2, 3, 2), (1, 3, 1), (4, 5, -1)]
    assert kept(0, 1) == [(0, 3, -3), (0, 4, 0.5), (4, 5, -1)]
    assert kept(4, 9) == []
    assert strongest_edges(HAND, 3, 9) == [Edge(0, 3, -3.0, 9.0)]
    by_role = {"weight_a_to_a": -0.75, "weight_a_to_b": -2.25}
    assert strongest_edges(HAND, 3, 9, ["a", "b"]) == [Edge(0, 3, -3.0, 9.0, by_role)]


def test_dead_ends_by_hand() -> None:
    nodes = Nodes.of({f"blocks.{layer}.hook_resid_post": 1 for layer in range(4)})  # two nodes a site
    edges = [Edge(*ends, 1.0, 1.0) for ends in [(0, 2), (1, 3), (2, 4), (0, 3)]]
    assert without_dead_ends(nodes, [4, 3, 0, 1, 2], edges) == ([4, 0, 2], [edges[0], edges[2]])
    assert without_dead_ends(nodes, [3, 1, 7], edges[1:2]) == ([7], [])
    assert without_dead_ends(nodes, [], []) == ([], [])
    around = Nodes.of({f"blocks.{layer}.hook_mlp_out": 1 for layer in range(4)})
    assert without_dead_ends(around, [4, 0], []) == ([4, 0], []), "the stream takes what MLPs write to the logits"


@given(st.sets(st.integers(0, 19), min_size=1), st.randoms(use_true_random=False), st.floats(0, 1))
def test_what_is_no_dead_end_has_a_path_to_the_last_site(members: set[int], random: Any, density: float) -> None:
    nodes = Nodes.of({f"blocks.{layer}.hook_resid_post": 4 for layer in range(4)})
    site = nodes.site_numbers
    candidates = [(u, d) for u in members for d in members if site[d] == site[u] + 1]
    edges = [Edge(u, d, 1.0, 1.0) for u, d in candidates if random.random() < density]
    graph = nx.DiGraph([edge[:2] for edge in edges])
    graph.add_nodes_from(members)
    last = {node for node in members if site[node] == max(site[list(members)])}
    expected = last | {node for node in members if nx.descendants(graph, node) & last}
    order = list(members)
    random.shuffle(order)
    kept, kept_edges = without_dead_ends(nodes, order, edges)
    assert kept == [node for node in order if node in expected]
    assert {edge[:2] for edge in kept_edges} == set(graph.subgraph(expected).edges)
