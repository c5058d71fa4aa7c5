"""Attribution, integrated gradients and exact effects: their laws, a slow oracle, and a model in which they agree."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline, paired_baseline, zero_baseline
from sfc.circuits.circuit import effects_by_role, role_names
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.methods import METHODS, NATS
from sfc.circuits.methods.attribution import BatchEffects, attributed_effects, integrated_effects
from sfc.circuits.methods.exact import exact_effects
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.config import ModelConfig
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.models.sources import tiny_model_folder
from sfc.saes.dictionary import Dictionary, TopKDictionary

KINDS = ["resid_post", "resid_mid", "attn_out", "mlp_out"]
CAUSAL = ["attribution", "integrated-gradients", "exact"]


def at_sites(problem: Problem, kind: str) -> Problem:
    """The problem with its dictionaries at sites of this kind."""
    layout = problem.ablation.baseline.layout
    dictionaries: dict[str, Dictionary] = {
        (site := f"blocks.{layer}.hook_{kind}"): TopKDictionary(dictionary.state_dict(), k=6, site=site)
        for layer, dictionary in enumerate(problem.ablation.dictionaries.values())
    }
    baseline = mean_baseline(problem.model, dictionaries, problem.runs.batches, layout)
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()})
    runs = PromptRuns.of(problem.model, problem.runs.batches, nodes.sites[0])
    return replace(problem, ablation=Ablation(nodes, dictionaries, baseline, "node"), runs=runs)


def by_prompt(problem: Problem, effects: list[BatchEffects]) -> np.ndarray:
    """Effects of all batches, a row per prompt in the order of the list that was batched."""
    result = np.full((problem.runs.n_prompts, problem.ablation.nodes.n_nodes), np.nan)
    for batch, part in zip(problem.runs.batches, effects, strict=True):
        result[batch.prompts.numpy()] = part.by_prompt.double().numpy()
    return result


def by_hand(problem: Problem, node: int) -> np.ndarray:
    """The effect of one node, one whole run of each prompt at a time: `x <- x - (f_i - f_ref_i) d_i`."""
    nodes, baseline = problem.ablation.nodes, problem.ablation.baseline
    number = int(nodes.site_numbers[node])
    site, within = nodes.sites[number], node - sum(nodes.sizes[:number])
    dictionary = problem.ablation.dictionaries[site]
    effects = np.zeros(problem.runs.n_prompts)
    for whole in problem.runs.batches:
        for row in range(len(whole.prompts)):
            batch = whole.select(torch.tensor([row]))

            def act(activation: Tensor, batch: Batch = batch) -> Tensor:
                result = activation.clone()
                for position in range(1, int(batch.lengths)):
                    x, place = activation[0, position], batch.template_positions[0, position]
                    f = dictionary.encode(x)
                    if within == dictionary.d_sae:
                        result[0, position] = x - (x - dictionary.decode(f) - baseline.errors[site][place])
                    else:
                        difference = f[within] - baseline.features[site][place, within]
                        result[0, position] = x - difference * dictionary.W_dec[within]
                return result

            with torch.no_grad():
                plain, ablated = (problem.score(last_logits(problem.model, batch, h)) for h in ({}, {site: act}))
            effects[int(batch.prompts)] = float(plain - ablated)
    return effects


@pytest.mark.parametrize("kind", KINDS)
def test_exact_effects_are_those_of_a_hook_written_by_hand(problem: Problem, kind: str) -> None:
    problem = at_sites(problem, kind)
    n_first = problem.ablation.nodes.sizes[0]
    chosen = [n_first + 48, 3, n_first + 3, n_first - 1, 17, n_first + 20]  # features and errors, in no order
    fast = exact_effects(problem, chosen)
    np.testing.assert_allclose(fast, [by_hand(problem, node) for node in chosen], atol=2e-5)
    assert np.abs(fast).max() > 1e-3


def test_exact_effects_are_those_of_ablating_all_but_one(problem: Problem) -> None:
    n_nodes = problem.ablation.nodes.n_nodes
    keep = ~np.eye(n_nodes, dtype=bool)
    ablated = ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, keep)
    full = full_scores(problem.model, problem.score, problem.runs)
    np.testing.assert_allclose(exact_effects(problem, range(n_nodes)), full - ablated, atol=5e-5)


def test_exact_effects_do_not_depend_on_how_many_nodes_go_through_at_once(problem: Problem) -> None:
    done: list[int] = []
    one_by_one = exact_effects(problem, range(40, 60), packed_tokens=1, progress=done.append)
    assert done == [1] * 20 * len(problem.runs.batches)
    np.testing.assert_allclose(one_by_one, exact_effects(problem, range(40, 60)), atol=2e-5)
    assert exact_effects(problem, []).shape == (0, problem.runs.n_prompts)


@pytest.fixture(scope="module")
def paired(problem: Problem, prompts: list[TokenizedPrompt], layout: TemplateLayout, batches: list[Batch]) -> Problem:
    """The problem with each prompt compared with the next one in the list."""
    partners = [*prompts[1:], prompts[0]]
    of_partners = make_batches(partners, layout, 60, problem.model.device)
    baseline = paired_baseline(problem.model, problem.ablation.dictionaries, of_partners, layout)
    runs = PromptRuns(
        [batch.with_tables(batch.prompts, layout) for batch in problem.runs.batches], problem.runs.cached_residuals
    )
    return replace(problem, ablation=replace(problem.ablation, baseline=baseline), runs=runs)


def test_with_everything_ablated_to_its_partner_a_prompt_scores_as_its_partner_does(paired: Problem) -> None:
    nothing = np.zeros((3, paired.ablation.nodes.n_nodes), dtype=bool)
    full = full_scores(paired.model, paired.score, paired.runs)
    ablated = ablated_scores(paired.model, paired.score, paired.ablation, paired.runs, nothing)
    np.testing.assert_allclose(ablated, [np.roll(full, -1)] * 3, atol=1e-4)
    assert np.abs(full - np.roll(full, -1)).max() > 1e-2


def test_effects_against_partners_are_those_by_hand_and_obey_the_laws(paired: Problem) -> None:
    nodes, layout = paired.ablation.nodes, paired.ablation.baseline.layout
    chosen = [5, nodes.sizes[0] - 1, nodes.sizes[0] + 5]
    np.testing.assert_allclose(exact_effects(paired, chosen), [by_hand(paired, node) for node in chosen], atol=2e-5)
    for method in ("attribution", "integrated-gradients"):
        effects = METHODS[method].rank(paired.with_settings(integrated_gradients={"steps": 60}))
        assert effects.by_position is not None and len(effects.by_position) == layout.n_template_positions
        np.testing.assert_allclose(effects.by_position.sum(0), effects.effect, atol=1e-9)
    lost = full_scores(paired.model, paired.score, paired.runs) - site_ablated(paired, 0)
    assert effects.effect[nodes.site_numbers == 0].sum() == pytest.approx(lost.mean(), abs=3e-4)  # pyright: ignore
    assert role_names(paired.model, paired.runs.batches, layout)["effect_suffix_0"] == "<|end|>"


def site_ablated(problem: Problem, site: int) -> np.ndarray:
    """The score of every prompt with all nodes of one site ablated, and nothing else."""
    keep = (problem.ablation.nodes.site_numbers != site)[None]
    return ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, keep)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_law_integrated_gradients_sum_to_what_ablating_the_site_does(problem: Problem, kind: str) -> None:
    problem = at_sites(problem, kind)
    nodes = problem.ablation.nodes
    effects = by_prompt(problem, [integrated_effects(problem, *run, steps=100) for run in problem.runs])
    for site in range(len(nodes.sites)):
        lost = full_scores(problem.model, problem.score, problem.runs) - site_ablated(problem, site)
        assert np.abs(lost).max() > 1e-2
        np.testing.assert_allclose(effects[:, nodes.site_numbers == site].sum(1), lost, atol=3e-4)


def test_the_error_of_integrated_gradients_falls_with_the_square_of_the_steps(problem: Problem) -> None:
    first = problem.ablation.nodes.site_numbers == 0
    lost = full_scores(problem.model, problem.score, problem.runs) - site_ablated(problem, 0)

    def error(steps: int) -> float:
        effects = by_prompt(problem, [integrated_effects(problem, *run, steps) for run in problem.runs])
        return float(np.abs(effects[:, first].sum(1) - lost).mean())

    assert error(20) < error(5) / 6


def test_one_step_of_integrated_gradients_is_the_gradient_half_way(problem: Problem) -> None:
    batch, cached = next(iter(problem.runs))
    site = problem.ablation.nodes.sites[1]
    table = problem.ablation.dictionaries[site].decode(problem.ablation.baseline.features[site])
    x_ref = (table + problem.ablation.baseline.errors[site])[batch.template_positions]
    kept: list[Tensor] = []

    def half_way(x: Tensor) -> Tensor:
        kept.append(torch.where(batch.touchable[..., None], (x + x_ref) / 2, x).detach().requires_grad_())
        kept.append(x.detach())
        return kept[0]

    problem.score(last_logits(problem.model, batch, {site: half_way})).sum().backward()
    assert kept[0].grad is not None
    moved = ((kept[1] - x_ref) * kept[0].grad).sum(-1) * batch.touchable
    effects = problem.ablation.nodes.split(integrated_effects(problem, batch, cached, steps=1).by_prompt)[site]
    torch.testing.assert_close(effects.sum(1), moved.sum(1), atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory, prompts: list[TokenizedPrompt], problem: Problem) -> Problem:
    """A problem whose score is linear in every activation: uniform attention, no MLP, a norm that hardly varies.

    One coordinate is so large that every norm divides by nearly the same number, and no weight reads or writes it.
    """
    config = LlamaConfig.from_pretrained(tiny_model_folder())
    torch.manual_seed(1)
    toy = LlamaForCausalLM(config)
    with torch.no_grad():
        toy.model.embed_tokens.weight[:, 0] = 1e5
        toy.lm_head.weight.mul_(1e5)
        toy.model.norm.weight[0] = 0
        for layer in toy.model.layers:
            layer.input_layernorm.weight[0] = 0
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.v_proj.weight.mul_(1e5)
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight.zero_()
    folder: Path = tmp_path_factory.mktemp("linear")
    for file in tiny_model_folder().iterdir():
        shutil.copy(file, folder)
    toy.save_pretrained(folder)
    model: Model = load_model(ModelConfig(source=str(folder), refusal_tokens=["I"], against_tokens=["S"]))  # pyright: ignore

    layout = TemplateLayout.of(prompts)
    batches = make_batches(prompts, layout, 80, model.device)
    dictionaries: dict[str, Dictionary] = {}
    for site, dictionary in problem.ablation.dictionaries.items():
        weights = {name: weight.clone() for name, weight in dictionary.state_dict().items()}  # pyright: ignore
        weights["W_enc"][0], weights["W_dec"][:, 0], weights["b_dec"][0] = 0, 0, 0
        dictionaries[site] = TopKDictionary(weights, k=6, site=site)
    baseline = mean_baseline(model, dictionaries, batches[:2], layout)
    ablation = Ablation(problem.ablation.nodes, dictionaries, baseline, "node")
    runs = PromptRuns.of(model, batches, ablation.nodes.sites[0])
    return replace(problem, model=model, score=RefusalScore.of(model), ablation=ablation, runs=runs)


def test_in_a_linear_model_attribution_integrated_gradients_and_exact_effects_agree(linear: Problem) -> None:
    exact = exact_effects(linear, range(linear.ablation.nodes.n_nodes))
    attribution = by_prompt(linear, [attributed_effects(linear, *run) for run in linear.runs])
    integrated = by_prompt(linear, [integrated_effects(linear, *run, steps=3) for run in linear.runs])
    scale = np.abs(exact).max()
    assert scale > 1, "the toy does something"
    first = linear.ablation.nodes.site_numbers == 0
    assert np.abs(exact[first]).max() > 0.1 * scale, "and not only at its last site"
    np.testing.assert_allclose(attribution.T, exact, atol=1e-4 * scale)
    np.testing.assert_allclose(integrated.T, exact, atol=1e-4 * scale)


@pytest.mark.parametrize("method", CAUSAL)
def test_a_node_at_its_reference_has_no_effect(problem: Problem, method: str) -> None:
    """A prompt with a single content token is its own mean: everything already is what ablation would make it."""
    prompts = problem.model.tokenize(["h"])
    layout = TemplateLayout.of(prompts)
    batches = make_batches(prompts, layout, 80, problem.model.device)
    baseline = mean_baseline(problem.model, problem.ablation.dictionaries, batches, layout)
    runs = PromptRuns.of(problem.model, batches, problem.ablation.nodes.sites[0])
    own = replace(problem, ablation=replace(problem.ablation, baseline=baseline), runs=runs)
    effects = METHODS[method].rank(own)
    np.testing.assert_allclose(effects.effect, 0, atol=1e-5)
    zero = zero_baseline(problem.ablation.dictionaries, layout)
    other = METHODS[method].rank(replace(own, ablation=replace(own.ablation, baseline=zero)))
    assert np.abs(other.effect).max() > 1e-2


def test_a_zero_reference_leaves_the_decoders_bias(problem: Problem, layout: TemplateLayout) -> None:
    dictionaries = problem.ablation.dictionaries
    ablation = replace(problem.ablation, baseline=zero_baseline(dictionaries, layout))
    nothing = torch.zeros(1, ablation.nodes.n_nodes)
    for batch in problem.runs.batches:
        interventions = ablation.interventions(nothing, torch.zeros_like(batch.lengths), batch)
        for site, act in interventions.items():
            left = act(torch.randn(*batch.ids.shape, 32))
            assert left is not None
            torch.testing.assert_close(
                left[batch.touchable], dictionaries[site].b_dec.expand(int(batch.touchable.sum()), -1)
            )


@pytest.mark.parametrize("method", ["attribution", "integrated-gradients"])
def test_parts_by_role_sum_to_the_effect_and_each_is_that_of_its_tokens(problem: Problem, method: str) -> None:
    effects = METHODS[method].rank(problem.with_settings(integrated_gradients={"steps": 2}))
    layout = problem.ablation.baseline.layout
    assert effects.by_position is not None and len(effects.by_position) == layout.n_template_positions
    parts = effects_by_role(effects.by_position, layout)
    np.testing.assert_allclose(sum(parts.values()), effects.effect, atol=1e-9)
    assert not effects.by_position[0].any(), "the attention sink is never ablated"
    assert list(parts) == ["effect_prefix", "effect_content", *(f"effect_suffix_{i}" for i in range(layout.n_suffix))]


def test_the_part_of_one_role_is_that_of_ablating_there_alone(linear: Problem) -> None:
    """In the linear model, what a node does at its content tokens is what is left when no other place differs."""
    baseline, layout = linear.ablation.baseline, linear.ablation.baseline.layout
    site, content = linear.ablation.nodes.sites[0], layout.n_prefix
    effects = METHODS["attribution"].rank(linear)
    assert effects.by_position is not None
    batch, _ = next(iter(linear.runs))
    one = replace(
        linear, runs=PromptRuns.of(linear.model, [replace(batch, prompts=torch.arange(len(batch.prompts)))], site)
    )
    part = effects_by_role(METHODS["attribution"].rank(one).by_position, layout)["effect_content"]  # pyright: ignore

    def content_ablated(activation: Tensor) -> Tensor:
        baseline = linear.ablation.baseline
        x_ref = (linear.ablation.dictionaries[site].decode(baseline.features[site]) + baseline.errors[site])[content]
        return torch.where(
            (batch.template_positions == content)[..., None] & batch.touchable[..., None], x_ref, activation
        )

    with torch.no_grad():
        plain, ablated = (linear.score(last_logits(linear.model, batch, h)) for h in ({}, {site: content_ablated}))
    at_site = linear.ablation.nodes.site_numbers == 0
    expected = float((plain - ablated).mean())
    assert abs(expected) > 1e-2 and baseline.layout == layout
    assert part[at_site].sum() == pytest.approx(expected, rel=1e-4)


def test_roles_after_the_prompt_are_named_by_their_tokens(
    model: Model, batches: list[Batch], layout: TemplateLayout
) -> None:
    names = role_names(model, batches, layout)
    assert list(names.values()) == ["template before the prompt", "prompt", "<|end|>", "<|assistant|>"]


def test_exact_ranks_the_nodes_of_largest_attribution_by_their_exact_effect(problem: Problem) -> None:
    effects = METHODS["exact"].rank(problem.with_settings(exact={"nodes": 12}))
    chosen = METHODS["attribution"].rank(problem).ranking[:12]
    per_prompt = exact_effects(problem, chosen.tolist())
    assert sorted(effects.ranking) == sorted(chosen) and effects.unit == NATS
    np.testing.assert_allclose(effects.effect[chosen], per_prompt.mean(1))
    np.testing.assert_allclose(effects.absolute[chosen], np.abs(per_prompt).mean(1))
    assert (np.diff(np.abs(effects.effect[effects.ranking])) <= 0).all()
    assert np.isnan(np.delete(effects.effect, chosen)).all(), "what was not measured has no effect that one could read"


def test_with_many_steps_integrated_gradients_are_a_method_whose_means_obey_the_law(problem: Problem) -> None:
    effects = METHODS["integrated-gradients"].rank(problem.with_settings(integrated_gradients={"steps": 60}))
    for site in (0, 1):
        lost = full_scores(problem.model, problem.score, problem.runs) - site_ablated(problem, site)
        total = effects.effect[problem.ablation.nodes.site_numbers == site].sum()
        assert total == pytest.approx(lost.mean(), abs=3e-4)
    assert sorted(effects.ranking) == list(range(problem.ablation.nodes.n_nodes))
    assert (effects.absolute >= np.abs(effects.effect) - 1e-6).all()


@pytest.mark.parametrize("method", [*CAUSAL, "learned-mask"])
def test_memory_is_bounded_by_the_prompts_of_a_batch(
    problem: Problem, prompts: list[TokenizedPrompt], layout: TemplateLayout, method: str
) -> None:
    problem = problem.with_settings(integrated_gradients={"steps": 2}, exact={"nodes": 4}, learned_mask={"steps": 4})
    longest = max(len(prompt.ids) for prompt in prompts)

    def largest(copies: int, batch_tokens: int) -> int:
        batches = make_batches(prompts * copies, layout, batch_tokens, problem.model.device)
        runs = PromptRuns.of(problem.model, batches, problem.ablation.nodes.sites[0])
        with LargestTensor() as mode:
            METHODS[method].rank(replace(problem, runs=runs))
        return mode.elements

    assert largest(copies=4, batch_tokens=2 * longest) <= largest(copies=2, batch_tokens=2 * longest)
    if method == "attribution":  # the others pack as many runs into a batch as fit, whatever its size
        assert largest(copies=4, batch_tokens=8 * longest) > 2 * largest(copies=4, batch_tokens=2 * longest)
