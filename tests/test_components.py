"""Heads and MLPs as nodes: the laws that hold for features, against slow oracles, and `sfc discover` on them."""

import json
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import random_model
from commands import sfc
from conftest import TEXTS
from pydantic import ValidationError
from test_cli import RESULT_KEYS
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.methods import METHODS
from sfc.circuits.methods.attribution import attributed_effects, integrated_effects
from sfc.circuits.methods.exact import exact_effects
from sfc.circuits.nodes import Nodes, Sources
from sfc.circuits.options import DiscoveryOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.spaces import NodeSpace, checked, heads_and_mlps
from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.interventions import leaf_recorder, recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore


def component_spaces(model: Model) -> dict[str, NodeSpace]:
    return checked(heads_and_mlps(Sources(model, [], [0, 1], {}, None)), model)  # pyright: ignore


def of_components(problem: Problem, model: Model) -> Problem:
    """The problem put to the heads and MLPs of two layers of a model."""
    prompts = model.tokenize(TEXTS)
    layout = TemplateLayout.of(prompts)
    batches = make_batches(prompts, layout, 120, model.device)
    spaces = component_spaces(model)
    baseline = mean_baseline(model, spaces, make_batches(prompts[:4], layout, 60, model.device), layout)
    ablation = Ablation(Nodes.of_spaces(spaces), spaces, baseline, "node")
    runs = PromptRuns.of(model, batches, ablation.nodes.sites[0])
    return replace(problem, model=model, score=RefusalScore.of(model), ablation=ablation, runs=runs)


@pytest.fixture(scope="module", params=["GPT2", "GPTNeoX", "Qwen2"])
def components(problem: Problem, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp("model")
    return of_components(problem, random_architecture(request.param, folder))


def random_architecture(architecture: str, folder: Path) -> Model:
    random_model(architecture, folder, initializer_range=0.2)
    return load_model(ModelConfig(source=str(folder), template="plain", refusal_tokens=["I"]))  # pyright: ignore


def test_a_model_that_never_passes_its_mlps_site_is_refused(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing passes its hook"):
        of_components(problem, random_architecture("Granite", tmp_path))


def part_of(problem: Problem, node: int) -> tuple[str, slice]:
    """The site of a node and its coordinates there, the heads' outputs side by side."""
    kind, layer, *head = problem.ablation.nodes.name(node).split(".")
    if kind == "mlp":
        return f"blocks.{layer}.hook_mlp_out", slice(None)
    width = problem.model.bridge.cfg.d_head
    return f"blocks.{layer}.attn.hook_z", slice(int(head[0]) * width, (int(head[0]) + 1) * width)


def oracle(problem: Problem, kept: np.ndarray) -> np.ndarray:
    """Scores with every other component set to its baseline, prompt by prompt, token by token, from the tokens on."""
    baseline, scores = problem.ablation.baseline, []
    for batch in problem.runs.batches:
        for row in range(len(batch.prompts)):
            alone = batch.select(torch.tensor([row]))

            def hook(site: str, nodes: list[int], alone=alone):
                def act(activation: Tensor) -> Tensor:
                    flat = activation.clone()
                    for position in range(1, int(alone.lengths[0])):
                        for node in nodes:
                            where = part_of(problem, node)[1]
                            flat[0, position, where] = baseline.errors[site][
                                alone.template_positions[0, position], where
                            ]
                    return flat

                return act

            gone: dict[str, list[int]] = {}
            for node in np.flatnonzero(~kept).tolist():
                gone.setdefault(part_of(problem, node)[0], []).append(node)
            with torch.no_grad():
                logits = last_logits(problem.model, alone, {site: hook(site, nodes) for site, nodes in gone.items()})
            scores.append((int(batch.prompts[row]), float(problem.score(logits, alone))))
    return np.array([score for _, score in sorted(scores)])


def test_ablating_some_agrees_with_the_oracle_and_nothing_changes_nothing(components: Problem) -> None:
    n = components.ablation.nodes.n_nodes
    keep = np.random.default_rng(0).random((2, n)) < 0.5
    keep = np.concatenate([keep, np.zeros((1, n), dtype=bool), np.ones((1, n), dtype=bool)])
    fast = ablated_scores(components.model, components.score, components.ablation, components.runs, keep)
    for row, kept in zip(fast, keep, strict=True):
        np.testing.assert_allclose(row, oracle(components, kept), atol=1e-4)
    np.testing.assert_allclose(fast[-1], full_scores(components.model, components.score, components.runs), atol=1e-4)
    assert np.abs(fast[:-1] - fast[-1]).max() > 1e-2


def test_exact_effects_are_what_ablating_each_alone_does(components: Problem) -> None:
    n = components.ablation.nodes.n_nodes
    exact = exact_effects(components, range(n))
    full = full_scores(components.model, components.score, components.runs)
    for node in range(n):
        slow = full - oracle(components, np.arange(n) != node)
        np.testing.assert_allclose(exact[node], slow, atol=1e-4)


def test_attribution_is_the_gradient_times_what_ablation_takes_away(components: Problem) -> None:
    nodes, baseline = components.ablation.nodes, components.ablation.baseline
    for batch, prefix in components.runs:
        fast = attributed_effects(components, batch, prefix)
        seen: dict[str, Tensor] = {}
        # The embedding begins the graph: the sites themselves are left as they are.
        begins = {"blocks.0.hook_resid_pre": leaf_recorder({}, "blocks.0.hook_resid_pre")}
        with torch.enable_grad():
            logits = last_logits(components.model, batch, {**begins, **{s: recorder(seen, s) for s in nodes.sites}})
            gradients = torch.autograd.grad(components.score(logits).sum(), list(seen.values()))
        for node in range(nodes.n_nodes):
            site, where = part_of(components, node)
            g = gradients[list(seen).index(site)][..., where]
            x_ref = baseline.errors[site][batch.template_positions.clamp(min=0)][..., where]
            moved = (g * (seen[site].detach()[..., where] - x_ref)).sum(-1) * batch.touchable
            torch.testing.assert_close(fast.by_prompt[:, node], moved.sum(1), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(fast.by_position.sum(0), fast.by_prompt.sum(0), atol=1e-4, rtol=1e-3)


def test_law_integrated_gradients_of_a_site_sum_to_what_ablating_the_site_does(components: Problem) -> None:
    nodes = components.ablation.nodes
    per_prompt = np.zeros((components.runs.n_prompts, nodes.n_nodes))
    for batch, prefix in components.runs:
        per_prompt[batch.prompts] = integrated_effects(components, batch, prefix, steps=40).by_prompt
    full = full_scores(components.model, components.score, components.runs)
    for site in range(len(nodes.sites)):
        lost = full - oracle(components, nodes.site_numbers != site)
        np.testing.assert_allclose(per_prompt[:, nodes.site_numbers == site].sum(1), lost, atol=2e-3)


def test_every_causal_method_ranks_all_components(problem: Problem, model: Model) -> None:
    components = of_components(problem, model)
    few = components.with_settings(integrated_gradients={"steps": 4}, exact={"nodes": 100}, learned_mask={"steps": 10})
    nodes = components.ablation.nodes
    for method in ("attribution", "integrated-gradients", "exact", "learned-mask"):
        effects = METHODS[method].rank(few)
        assert sorted(effects.ranking) == list(range(nodes.n_nodes))
        assert np.isfinite(effects.effect).all() and (effects.absolute >= np.abs(effects.effect) - 1e-6).all()


def test_names_of_components_and_numbers_are_inverse(model: Model) -> None:
    nodes = Nodes.of_spaces(component_spaces(model))
    names = [nodes.name(i) for i in range(nodes.n_nodes)]
    n_heads = model.bridge.cfg.n_heads
    assert names == [n for layer in (0, 1) for n in (*(f"head.{layer}.{h}" for h in range(n_heads)), f"mlp.{layer}")]
    assert [nodes.number(name) for name in names] == list(range(nodes.n_nodes))
    assert [nodes.kind(i) for i in range(n_heads + 1)] == ["head"] * n_heads + ["mlp"]
    assert not nodes.is_error.any()
    for wrong in ("head.0.99", "mlp.2", "resid_post.0/F0", "hook_z.0/error", "mlp_out.0/error"):
        with pytest.raises(UserError, match="no node"):
            nodes.number(wrong)


@pytest.mark.parametrize("values", [{"method": "correlation"}, {"drop_dead_ends": True}])
def test_what_components_cannot_have_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="heads"):
        DiscoveryOptions.model_validate({"nodes": "heads", **values})


def test_discover_on_heads_and_mlps_needs_no_saes(tmp_path: Path) -> None:
    options = ("--set", "discovery.nodes=heads-and-mlps", "--set", "discovery.checked_nodes=3")
    result = sfc("discover", "--preset", "tiny", *options, "--json", root=tmp_path).result
    assert set(result) == RESULT_KEYS and result["n_edges"] == 0 and result["error_share"] == 0
    assert not (tmp_path / "saes").exists()
    graph = nx.node_link_graph(json.loads(Path(result["files"]["circuit"]).read_text()), edges="edges")
    assert {kind for _, kind in graph.nodes(data="kind")} <= {"head", "mlp"} and len(graph) == result["n_nodes"]
    whole = pd.read_csv(result["files"]["curve"]).iloc[-1]
    assert whole["f_circuit"] == pytest.approx(whole["f_model"], abs=1e-4)
    assert "head." in Path(result["files"]["page"]).read_text()
