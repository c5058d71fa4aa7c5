"""Relevance patching: its coefficients against relevance propagated by hand, against a frozen network, and its laws."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from architectures import random_model
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.gradients import score_gradients
from sfc.circuits.methods import METHODS
from sfc.circuits.methods.relevance import check_rules, relevance_rules
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.interventions import intervening, recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits

FOR, AGAINST = 70, 80
SITE, LAYER = "blocks.1.hook_resid_post", 2


class Case(NamedTuple):
    """A model, the Hugging Face model that it was loaded from, and prompts of different length."""

    model: Model
    network: Any
    batch: Batch


@pytest.fixture
def case_of(tmp_path: Path) -> Callable[..., Case]:
    """Make a case of a random model of an architecture; its norms and biases are random too."""

    def make(architecture: str, **settings: Any) -> Case:
        random_model(architecture, tmp_path, **settings)
        return _loaded(tmp_path, architecture)

    return make


def _loaded(folder: Path, architecture: str, change: Callable[[str, Tensor], None] | None = None) -> Case:
    kind = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    network = getattr(transformers, f"{architecture}{kind}").from_pretrained(folder).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if change:
            change(name, parameter)
        elif "norm" in name or "ln_" in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)
        elif parameter.dim() == 2:
            parameter *= 5
    network.save_pretrained(folder)
    model = load_model(ModelConfig(source=str(folder), template="plain", refusal_tokens=["I"]))  # pyright: ignore
    prompts = model.tokenize(["Hello there, who are you?", "What?"])
    return Case(model, network, make_batches(prompts, TemplateLayout.of(prompts), 200, model.device)[0])


def _difference(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    return logits[:, FOR] - logits[:, AGAINST]


def _coefficients(case: Case, site: str = SITE, rules: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The activation at a site, its coefficients for the logit difference, and the logits."""
    seen: dict[str, Tensor] = {}

    def leaf(activation: Tensor) -> Tensor:
        seen[site] = activation.detach().requires_grad_()
        return seen[site]

    with torch.enable_grad(), intervening(case.model, relevance_rules(case.model) if rules else {}):
        logits = last_logits(case.model, case.batch, {site: leaf})
    (g,) = torch.autograd.grad(_difference(logits).sum(), seen[site])
    return seen[site].detach(), g, logits.detach()


def _backward(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """The 0 rule: what each input of `x @ weight.T` is due of the relevance of its outputs."""
    return x * ((relevance / (x @ weight.T)) @ weight)


def test_coefficients_are_relevance_propagated_by_hand(case_of: Callable[..., Case]) -> None:
    """An explicit block of Llama: relevance is shared out number by number, and no gradient is taken."""
    case = case_of("Llama")
    block, base = case.network.double().model.layers[LAYER], case.network.model
    kept: dict[str, Tensor] = {}
    recorders = {name: recorder(kept, name) for name in (f"blocks.{LAYER}.attn.hook_pattern", SITE)}
    last_logits(case.model, case.batch, recorders)
    x, g, logits = _coefficients(case)
    for row, length in enumerate(case.batch.lengths.tolist()):
        x0 = kept[SITE][row, :length].double()
        pattern = kept[f"blocks.{LAYER}.attn.hook_pattern"][row, :, :length, :length].double()
        read = block.input_layernorm(x0)
        v = block.self_attn.v_proj(read).view(length, 2, 8).repeat_interleave(2, dim=1)
        z = torch.einsum("hts,shd->thd", pattern, v)
        attended = block.self_attn.o_proj(z.flatten(1))
        middle = x0 + attended
        read_mlp = block.post_attention_layernorm(middle)
        gate, up = block.mlp.gate_proj(read_mlp), block.mlp.up_proj(read_mlp)
        product = torch.nn.functional.silu(gate) * up
        written = block.mlp.down_proj(product)
        after = middle + written
        final = base.norm(after[-1:])
        unembedding = case.network.lm_head.weight[[FOR, AGAINST]]
        ours = final @ unembedding.T
        torch.testing.assert_close(ours[0].float(), logits[row, [FOR, AGAINST]], atol=1e-4, rtol=1e-4)

        # An RMSNorm with a constant scale multiplies number by number, so that relevance passes it as it is.
        relevance = torch.zeros_like(after)
        relevance[-1:] = _backward(final, unembedding, ours * torch.tensor([1.0, -1.0]))
        of_written = _backward(product, block.mlp.down_proj.weight, relevance * written / after)
        half = of_written / 2
        of_read = _backward(read_mlp, block.mlp.gate_proj.weight, half) + _backward(
            read_mlp, block.mlp.up_proj.weight, half
        )
        relevance = relevance * middle / after + of_read
        of_z = _backward(z.flatten(1), block.self_attn.o_proj.weight, relevance * attended / middle).view_as(z)
        of_v = (v * torch.einsum("hts,thd->shd", pattern, of_z / z)).view(length, 2, 2, 8).sum(2)
        of_read = _backward(read, block.self_attn.v_proj.weight, of_v.flatten(1))
        relevance = relevance * x0 / middle + of_read
        torch.testing.assert_close((g * x)[row, :length].double(), relevance, atol=1e-4, rtol=1e-3)
        assert float(relevance.sum()) == pytest.approx(float(ours[0, 0] - ours[0, 1]), rel=1e-6)


@torch.no_grad()
def _frozen_difference(case: Case, x: Tensor, gated: bool) -> Tensor:
    """The logit difference of a network whose scales, patterns and ratios are those of the model's own run."""
    model, hooks, own = case.model, case.model.hooks, dict[str, Tensor]()
    norms = [name.removesuffix(".hook_scale") for name in hooks if name.endswith(".hook_scale")]
    norms = [name for name in norms if name.startswith(("blocks.2", "ln_final"))]
    mlp, pattern = f"blocks.{LAYER}.mlp", f"blocks.{LAYER}.attn.hook_pattern"
    names = [f"{n}.hook_{part}" for n in norms for part in ("scale", "in", "out")] + [pattern]
    names += [f"{mlp}.hook_pre", f"{mlp}.hook_post"] + [f"{mlp}.hook_pre_linear"] * gated
    last_logits(model, case.batch, {name: recorder(own, name) for name in names})
    now: dict[str, Tensor] = {}
    acting: dict[str, Any] = {SITE: lambda _: x, pattern: lambda _: own[pattern]}
    for norm in norms:
        # Linear number by number but for the mean that LayerNorm takes away: its slope is told from what it did.
        centre = (lambda x: x) if type(case.network).__name__.startswith(("Llama", "Qwen2")) else (
            lambda x: x - x.mean(-1, keepdim=True)
        )  # fmt: skip
        weight = dict(case.network.named_parameters())[NORM_WEIGHTS[type(case.network).__name__][norm]]

        def frozen(_: Tensor, norm: str = norm, weight: Tensor = weight, centre: Any = centre) -> Tensor:
            moved = centre(now[f"{norm}.hook_in"] - own[f"{norm}.hook_in"])
            return own[f"{norm}.hook_out"] + weight * moved / own[f"{norm}.hook_scale"]

        acting |= {f"{norm}.hook_in": recorder(now, f"{norm}.hook_in"), f"{norm}.hook_out": frozen}

    def product(_: Tensor) -> Tensor:
        z, h = own[f"{mlp}.hook_pre"], own[f"{mlp}.hook_post"]
        if not gated:
            return h / z * now["z"]
        u = own[f"{mlp}.hook_pre_linear"]
        return (h / z * now["z"] + h / u * now["u"]) / 2

    acting |= {f"{mlp}.hook_pre": recorder(now, "z"), f"{mlp}.hook_post": product}
    if gated:
        acting[f"{mlp}.hook_pre_linear"] = recorder(now, "u")
    return _difference(last_logits(model, case.batch, acting))


NORM_WEIGHTS = {
    "GPT2LMHeadModel": {
        "blocks.2.ln1": "transformer.h.2.ln_1.weight",
        "blocks.2.ln2": "transformer.h.2.ln_2.weight",
        "ln_final": "transformer.ln_f.weight",
    },
    "GPTNeoXForCausalLM": {
        "blocks.2.ln1": "gpt_neox.layers.2.input_layernorm.weight",
        "blocks.2.ln2": "gpt_neox.layers.2.post_attention_layernorm.weight",
        "ln_final": "gpt_neox.final_layer_norm.weight",
    },
    **{
        name: {
            "blocks.2.ln1": "model.layers.2.input_layernorm.weight",
            "blocks.2.ln2": "model.layers.2.post_attention_layernorm.weight",
            "ln_final": "model.norm.weight",
        }
        for name in ("LlamaForCausalLM", "Qwen2ForCausalLM")
    },
}


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX", "Llama", "Qwen2"])
def test_coefficients_are_the_slopes_of_the_frozen_network(architecture: str, case_of: Callable[..., Case]) -> None:
    case = case_of(architecture)
    gated = architecture in ("Llama", "Qwen2")
    x, g, logits = _coefficients(case)
    plain = _frozen_difference(case, x, gated)
    torch.testing.assert_close(plain, _difference(logits), atol=1e-4, rtol=1e-4)
    step = x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    step[:, 0] = 0
    moved = _frozen_difference(case, x + step, gated) - plain
    torch.testing.assert_close(moved, (g * step).sum((1, 2)), atol=2e-4, rtol=2e-3)
    assert not torch.allclose(g, _coefficients(case, rules=False)[1], rtol=0.05)


@pytest.mark.parametrize("architecture", ["Llama", "Granite"])
def test_law_relevance_is_conserved_from_layer_to_layer_without_biases(
    architecture: str, case_of: Callable[..., Case]
) -> None:
    case = case_of(architecture)
    for layer in range(3):
        x, g, logits = _coefficients(case, f"blocks.{layer}.hook_resid_post")
        torch.testing.assert_close((g * x).sum((1, 2)), _difference(logits), atol=1e-4, rtol=1e-4)
        assert _difference(logits).abs().min() > 0.01


def test_law_on_a_network_without_nonlinearities_the_rules_are_the_chain_rule(tmp_path: Path) -> None:
    """GPT-2 with linear units, attention that looks everywhere alike, and norms that divide by a constant."""
    random_model("GPT2", tmp_path, activation_function="linear", layer_norm_epsilon=1e8)

    def make_linear(name: str, parameter: Tensor) -> None:
        if "ln_" in name and name.endswith("weight"):
            parameter.fill_(1e4)
        if "c_attn" in name:
            parameter[..., :64] = 0
        if "wte" in name or "wpe" in name:
            parameter *= 10

    case = _loaded(tmp_path, "GPT2", make_linear)
    for layer in range(3):
        site = f"blocks.{layer}.hook_resid_post"
        _, g, _ = _coefficients(case, site)
        chain = _coefficients(case, site, rules=False)[1]
        torch.testing.assert_close(g, chain, atol=1e-5 * float(chain.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX", "Llama", "Qwen2", "Gemma2", "Bloom"])
def test_scores_stay_what_they_are_to_the_bit(architecture: str, case_of: Callable[..., Case]) -> None:
    case = case_of(architecture)
    assert torch.equal(_coefficients(case)[2], last_logits(case.model, case.batch))
    assert torch.equal(last_logits(case.model, case.batch), last_logits(case.model, case.batch))


def test_an_architecture_without_the_hooks_is_refused_in_one_line(
    problem: Problem, case_of: Callable[..., Case]
) -> None:
    case = case_of("GPTJ")
    other = replace(problem, model=case.model, runs=PromptRuns.of(case.model, [case.batch], SITE))
    with pytest.raises(
        UserError, match=r"no rule for 'blocks.\d.attn.hook_pattern'.*in GPTJForCausalLM: take --method"
    ):
        check_rules(other, relevance_rules(case.model))


def test_effects_are_those_of_attribution_with_other_coefficients(problem: Problem) -> None:
    effects, again = METHODS["relevance"].rank(problem), METHODS["relevance"].rank(problem)
    for one, other in zip(effects, again, strict=True):
        np.testing.assert_equal(one, other)
    rules, nodes = relevance_rules(problem.model), problem.ablation.nodes
    assert sorted(effects.ranking) == list(range(nodes.n_nodes)) and effects.by_prompt is not None
    for batch, cached in problem.runs:
        with intervening(problem.model, rules):
            at = score_gradients(problem, batch, cached)
        per_site = nodes.split(torch.from_numpy(effects.by_prompt[batch.prompts.numpy()]))
        for site, (x, g) in at.items():
            moved = x[batch.touchable] - problem.ablation.ablated_activation(site, batch)
            of_token = torch.zeros(batch.ids.shape).masked_scatter(batch.touchable, (g[batch.touchable] * moved).sum(1))
            torch.testing.assert_close(per_site[site].sum(1), of_token.sum(1), atol=1e-5, rtol=1e-3)
    assert not np.allclose(effects.effect, METHODS["attribution"].rank(problem).effect, rtol=0.05, atol=1e-5)
