"""Circuits of edges: against the definition, one node and one prompt at a time, and against circuits of nodes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from test_edges import at_sites, random_architecture
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.edge_ablation import edge_ablated_scores, random_edges, why_not_ablatable
from sfc.circuits.edge_kinds import site_pairs
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.core.sites import in_order, site_of
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import PACKED_TOKENS, make_batches
from sfc.models.interventions import Intervention, recorder
from sfc.models.loading import Model
from sfc.models.running import last_logits

MARKS = tuple(in_order([site_of(kind, layer) for kind in ("attn_out", "mlp_out", "resid_post") for layer in (0, 1)]))
MODES = ("node", "keep-current", "keep-clean", "ablate")
TEXTS = ["Bake bread?", "How do I kill a process?", "hm"]
POSTS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_architecture("Qwen2", tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def deep(problem: Problem, network: Model) -> Problem:
    """Three layers with a dictionary each, prompts of different length, in batches with padding."""
    return at_sites(problem, network, network.tokenize(TEXTS), POSTS)


@pytest.fixture(scope="module", params=[POSTS, MARKS], ids=["stream", "Marks et al."])
def any_sites(request: pytest.FixtureRequest, problem: Problem, network: Model) -> Problem:
    return at_sites(problem, network, network.tokenize(TEXTS), request.param)


def in_mode(problem: Problem, mode: str) -> Problem:
    return replace(problem, ablation=replace(problem.ablation, error_mode=mode))


def random_circuit(problem: Problem, share: float, density: float) -> tuple[list[int], list[tuple[int, int]]]:
    random, nodes = np.random.default_rng(0), problem.ablation.nodes
    members = np.flatnonzero((random.random(nodes.n_nodes) < share) | nodes.is_error).tolist()
    return members, [edge for edge in neighbours(problem, members) if random.random() < density]


def neighbours(problem: Problem, members: list[int]) -> list[tuple[int, int]]:
    """All edges between members at sites of which one writes into the other."""
    site = problem.ablation.nodes.site_numbers
    pairs = {(u, d) for u, d, _ in site_pairs(problem.ablation.nodes)}
    return [(u, d) for u in members for d in members if (site[u], site[d]) in pairs]


def oracle_score(
    model: Model, ablation: Ablation, prompt: TokenizedPrompt, members: list[int], edges: list[tuple[int, int]],
    score: Callable[[Tensor], Tensor],
) -> float:  # fmt: skip
    """The definition by recursion: each node's value from a run of the whole model, dense, token by token."""
    nodes, baseline, layout = ablation.nodes, ablation.baseline, ablation.baseline.layout
    template_positions, batch = layout.template_positions(prompt), make_batches([prompt], layout, 1, model.device)[0]
    is_error, site_of, first = nodes.is_error, nodes.site_numbers, np.cumsum([0, *nodes.sizes])
    clean: dict[str, Tensor] = {}
    last_logits(model, batch, {site: recorder(clean, site) for site in nodes.sites})
    if ablation.error_mode in ("ablate", "keep-clean"):
        members = [node for node in members if not is_error[node]]
    if ablation.error_mode == "keep-current":
        members = sorted({*members, *np.flatnonzero(is_error).tolist()})
        pairs = {(u, d) for u, d, _ in site_pairs(nodes)}
        joined = [(u, d) for u in members for d in members if (site_of[u], site_of[d]) in pairs]
        edges = [*edges, *((u, d) for u, d in joined if is_error[u] or is_error[d])]

    def error(site: str, x: Tensor) -> Tensor:
        dictionary = ablation.dictionaries[site]
        return x - dictionary.decode(dictionary.encode(x))

    def activation(number: int, kept: list[int]) -> Tensor:
        site = nodes.sites[number]
        x, dictionary = clean[site].clone(), ablation.dictionaries[site]
        for position in range(1, len(template_positions)):
            f, e = (
                baseline.features[site][template_positions[position]].clone(),
                baseline.errors[site][template_positions[position]].clone(),
            )
            if ablation.error_mode == "keep-clean":
                e = error(site, clean[site][0, position])
            for node in kept:
                if is_error[node]:
                    e = value(node)[position]
                else:
                    f[node - first[number]] = value(node)[position]
            x[0, position] = dictionary.decode(f) + e
        return x

    def everywhere(kept: list[int], sites: Sequence[str]) -> dict[str, Intervention]:
        at_sites = (
            (site, activation(number, [u for u in kept if site_of[u] == number])) for number, site in enumerate(sites)
        )
        return {site: lambda _, x=x: x for site, x in at_sites}

    @cache
    def value(node: int) -> Tensor:
        number, site = int(site_of[node]), nodes.sites[site_of[node]]
        kept = sorted({u for u, d in edges if d == node and u in members})
        seen: dict[str, Tensor] = {}
        last_logits(model, batch, {**everywhere(kept, nodes.sites[:number]), site: recorder(seen, site)})
        x = seen[site]
        if is_error[node]:
            return torch.stack([error(site, row) for row in x[0]])
        return torch.stack([ablation.dictionaries[site].encode(row)[node - first[number]] for row in x[0]])

    return float(score(last_logits(model, batch, everywhere(members, nodes.sites))))


@pytest.mark.parametrize("mode", MODES)
def test_edges_are_ablated_as_the_recursive_definition_says(any_sites: Problem, mode: str) -> None:
    deep = in_mode(any_sites, mode)
    members, edges = random_circuit(deep, 0.2, 0.3)
    fast = edge_ablated_scores(deep, deep.runs, members, edges)
    with torch.no_grad():
        slow = [
            oracle_score(deep.model, deep.ablation, prompt, members, edges, deep.score)
            for prompt in deep.model.tokenize(TEXTS)
        ]
    np.testing.assert_allclose(fast, slow, atol=1e-4)
    nodes = ablated_scores(deep.model, deep.score, deep.ablation, deep.runs, as_mask(deep, members))[0]
    assert np.abs(fast - nodes).max() > 1e-2, "the edges that are missing matter"


def as_mask(problem: Problem, members: list[int]) -> np.ndarray:
    mask = np.zeros((1, problem.ablation.nodes.n_nodes), dtype=bool)
    mask[0, members] = True
    return mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_law_all_edges_between_neighbours_are_the_circuit_of_nodes(any_sites: Problem, mode: str, share: float) -> None:
    deep = in_mode(any_sites, mode)
    members, _ = random_circuit(deep, share, 0)
    steps: list[int] = []
    edges = edge_ablated_scores(deep, deep.runs, members, neighbours(deep, members), steps.append)
    nodes = ablated_scores(deep.model, deep.score, deep.ablation, deep.runs, as_mask(deep, members))[0]
    np.testing.assert_allclose(edges, nodes, atol=1e-4)
    assert sum(steps) == len(deep.ablation.nodes.sites) * len(deep.runs.batches)
    if share == 1 and mode != "ablate":
        np.testing.assert_allclose(edges, full_scores(deep.model, deep.score, deep.runs), atol=1e-4)


def test_many_runs_go_through_in_several_packs_and_batches_do_not_matter(deep: Problem) -> None:
    members, edges = random_circuit(deep, 1.0, 0.5)
    assert len(members) / 3 * max(batch.ids.numel() for batch in deep.runs.batches) > PACKED_TOKENS
    prompts, layout = deep.model.tokenize(TEXTS), deep.ablation.baseline.layout
    one_by_one = at_sites(deep, deep.model, prompts, POSTS)
    runs = type(deep.runs).of(deep.model, make_batches(prompts, layout, 1, deep.model.device), POSTS[0])
    assert len(runs.batches) == 3
    slow = edge_ablated_scores(one_by_one, runs, members, edges)
    np.testing.assert_allclose(edge_ablated_scores(deep, deep.runs, members, edges), slow, atol=1e-4)


def test_an_edge_into_a_node_that_leads_nowhere_changes_nothing(deep: Problem) -> None:
    members, edges = random_circuit(deep, 0.2, 0.3)
    middle = next(target for _, target in edges if target in {source for source, _ in edges})
    silent = [edge for edge in edges if edge[0] != middle]
    deaf = [edge for edge in silent if edge[1] != middle]
    assert len(deaf) < len(silent)
    before, after = (edge_ablated_scores(deep, deep.runs, members, some) for some in (silent, deaf))
    np.testing.assert_array_equal(before, after)


def test_without_members_at_the_last_site_everything_is_ablated(deep: Problem) -> None:
    nothing = ablated_scores(deep.model, deep.score, deep.ablation, deep.runs, as_mask(deep, []))[0]
    for members in ([], [0, 1, 50]):
        np.testing.assert_allclose(edge_ablated_scores(deep, deep.runs, members, []), nothing, atol=1e-4)


def test_edges_of_other_nodes_are_refused(deep: Problem) -> None:
    for members, edge in (([0, 60], (0, 61)), ([0, 1], (0, 1)), ([0, 100], (0, 100)), ([0, 60], (60, 0))):
        with pytest.raises(UserError, match="does not join two of the circuit's nodes at sites that write"):
            edge_ablated_scores(deep, deep.runs, members, [edge])


def test_random_edges_are_as_many_into_each_node(deep: Problem) -> None:
    members, edges = random_circuit(deep, 0.3, 0.2)
    nodes = deep.ablation.nodes
    drawn = random_edges(nodes, members, edges, seed=3)
    assert Counter(target for _, target in drawn) == Counter(target for _, target in edges)
    assert why_not_ablatable(nodes, members, drawn) is None and len(set(drawn)) == len(drawn)
    assert set(drawn) != set(edges) and drawn == random_edges(nodes, members, edges, seed=3)
    assert drawn != random_edges(nodes, members, edges, seed=4)


def test_outputs_around_which_the_stream_flows_write_into_the_logits_as_well(problem: Problem, network: Model) -> None:
    sites = ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    around = at_sites(problem, network, network.tokenize(TEXTS), sites)
    members, edges = random_circuit(around, 0.3, 1.0)
    nodes = ablated_scores(network, around.score, around.ablation, around.runs, as_mask(around, members))[0]
    np.testing.assert_allclose(edge_ablated_scores(around, around.runs, members, edges), nodes, atol=1e-4)
    without = edge_ablated_scores(around, around.runs, members, [])
    deaf = edge_ablated_scores(around, around.runs, [node for node in members if node >= 49], [])
    assert np.abs(without - nodes).max() > 1e-3, "the second hears the first"
    assert np.abs(without - deaf).max() > 1e-3, "and the first is heard by the logits"
