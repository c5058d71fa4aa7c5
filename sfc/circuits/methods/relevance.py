"""Relevance patching (RelP; Jafari et al. 2025): attribution patching with the coefficients of relevance propagation.

The effect of a node is that of attribution patching, except that the backward pass follows the rules of layer-wise
relevance propagation (LRP) instead of the chain rule. Each rule replaces a nonlinearity by a linear map that gives the
same output for the input at hand:

    LayerNorm, RMSNorm   the scale that it divides by is a constant (LN rule; Ali et al. 2022)
    attention            the pattern is a constant, so that relevance flows through values alone (AH rule; the same)
    activation           a(z) is (a(z) / z) z with the ratio a constant (identity rule)
    gated product        a(z) u is half of each factor times the other, held constant (half rule)
    linear maps          as they are (0 rule)

Where a model has no biases, relevance is then conserved: at every layer the sum over tokens of coefficient times
activation is the logit that was started from. On a network without nonlinearities the rules are the chain rule.

The forward pass computes what it always does: an intervention puts the value that is there in its own place, with
another way back. Nothing of a model's code is copied or replaced. The paper starts from a difference of two logits;
here the pass starts from the gradient of the score at the logits, whatever the score is.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from sfc.circuits.methods import Effects
from sfc.circuits.methods.attribution import BatchEffects, attributed_effects, mean_effects
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention, intervening, recorder
from sfc.models.model import Model
from sfc.models.running import CachedResidual
from sfc.models.score import score_batch

_SMALLEST = 1e-20
"""a factor smaller in size than this is taken for 0, and passes nothing back; what it stands in is 0 itself"""
_REPLACED = (".hook_pattern", ".hook_post", ".hook_out")
"""the ends of the names of hooks at which a rule puts something in place of what is there"""
_TOLERANCE = 0.02
"""of the largest output: by how much a norm may differ from what it is taken for; bfloat16 rounds to 0.004"""


def rank(problem: Problem) -> Effects:
    """Effects from one backward pass per batch by the rules of relevance propagation, ranked by |mean effect|.

    Raises:
        UserError: the architecture lacks a hook at which a rule must act, or has a norm that is not understood.
    """
    rules = relevance_rules(problem.model)
    check_rules(problem, rules)

    def of_batch(problem: Problem, batch: Batch, cached: CachedResidual) -> BatchEffects:
        with intervening(problem.model, rules):
            return attributed_effects(problem, batch, cached)

    return mean_effects(problem, of_batch)


def relevance_rules(model: Model) -> dict[str, Intervention]:
    """The interventions that make gradients of a run relevance coefficients; its values stay what they are.

    Raises:
        UserError: the model has no hook for an attention pattern, or for what its MLP is made of.
    """
    rules: dict[str, Intervention] = {}
    for norm, module in _norms(model).items():
        rules |= _norm_rules(norm, module)
    for layer in range(model.n_layers):
        pattern, mlp = f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.mlp"
        for needed, part in ((pattern, "attention"), (f"{mlp}.hook_pre", "MLP"), (f"{mlp}.hook_post", "MLP")):
            if needed not in model.hooks:
                raise _no_rule(model, f"the {part} of layer {layer}, which has no hook {needed!r},")
        factors = [f"{mlp}.{name}" for name in ("hook_pre", "hook_pre_linear") if f"{mlp}.{name}" in model.hooks]
        rules[pattern] = Tensor.detach
        rules |= _product_rules(factors, f"{mlp}.hook_post")
    return rules


def _norms(model: Model) -> dict[str, NormalizationBridge]:
    """The norms of blocks and the final one by their names, those of queries and keys left out.

    No relevance flows through a pattern, and none is wanted before the first block.
    """
    name_of = {id(hook): name for name, hook in model.hooks.items()}
    scales = {
        name_of[id(module.hook_scale)]: module
        for module in model.bridge.modules()
        if isinstance(module, NormalizationBridge) and id(module.hook_scale) in name_of
    }
    return {
        name.removesuffix(".hook_scale"): module
        for name, module in scales.items()
        if name.startswith(("blocks.", "ln_final")) and ".attn." not in name
    }


def _norm_rules(name: str, module: NormalizationBridge) -> dict[str, Intervention]:
    """What a norm gives, as a linear map of what it reads: the scale that it divides by is a constant."""
    seen: dict[str, Tensor] = {}

    def linear(output: Tensor) -> Tensor:
        return _as_if(output, _frozen_norm(module, seen["hook_in"], seen["hook_scale"].detach()))

    return {f"{name}.{hook}": recorder(seen, hook) for hook in ("hook_in", "hook_scale")} | {f"{name}.hook_out": linear}


def _frozen_norm(
    module: NormalizationBridge, x: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "*rows 1"]
) -> Float[Tensor, "*rows d_model"]:
    """A norm that divides by this scale, without its bias."""
    x = x.float()
    centred = x if module.uses_rms_norm else x - x.mean(-1, keepdim=True)
    weight = getattr(module.original_component, "weight", None)
    if weight is None:
        return centred / scale
    return centred / scale * (weight.float() + bool(getattr(module.config, "rmsnorm_uses_offset", False)))


def _product_rules(factors: Sequence[str], product: str) -> dict[str, Intervention]:
    """What an MLP makes of its factors, as a linear map of them: an equal share of it is due to each."""
    seen: dict[str, Tensor] = {}

    def linear(output: Tensor) -> Tensor:
        shares = [_ratio(output, factor) * factor / len(seen) for factor in seen.values()]
        return _as_if(output, torch.stack(shares).sum(0))

    return {factor: recorder(seen, factor) for factor in factors} | {product: linear}


def _ratio(output: Tensor, factor: Tensor) -> Tensor:
    """What the factor is multiplied by to give the output, as a constant."""
    output, factor = output.detach(), factor.detach()
    is_zero = factor.abs() < _SMALLEST
    return torch.where(is_zero, 0, output / torch.where(is_zero, 1, factor))


def _as_if(value: Tensor, linear: Tensor) -> Tensor:
    """The value as it is, for whose gradient it counts as `linear`."""
    return value.detach() + (linear - linear.detach()).to(value.dtype)


def check_rules(problem: Problem, rules: Mapping[str, Intervention]) -> None:
    """Run one prompt to see that every rule acts: that what it puts in its place is what the model goes on with.

    Raises:
        UserError: a hook is passed by no run or its output is not used, or a norm is not what it is taken for.
    """
    model, first = problem.model, torch.zeros(1, dtype=torch.long, device=problem.model.device)
    batch, cached = problem.runs.batches[0].select(first), problem.runs.cached_residuals[0].select(first)
    norms = {name: module for name, module in _norms(model).items() if _passed(name, cached)}
    replaced = [name for name in rules if name.endswith(_REPLACED) and _passed(name, cached)]
    seen, probes = dict[str, Tensor](), dict[str, Tensor]()

    def probe(name: str) -> Intervention:
        def add_nothing(activation: Tensor) -> Tensor:
            probes[name] = torch.zeros_like(activation, requires_grad=True)
            return activation + probes[name]

        return add_nothing

    reads = [f"{norm}.{hook}" for norm in norms for hook in ("hook_in", "hook_scale", "hook_out")]
    recorders = {name: recorder(seen, name) for name in reads}
    with torch.enable_grad(), intervening(model, rules), intervening(model, recorders):
        score = score_batch(model, problem.score, batch, {name: probe(name) for name in replaced}, cached).sum()
    gradients = torch.autograd.grad(score, list(probes.values()), allow_unused=True)
    used = {name for name, gradient in zip(probes, gradients, strict=True) if gradient is not None}
    if lacking := [name for name in replaced if name not in used]:
        raise _no_rule(model, f"{lacking[0]!r}, a hook at which a change has no effect,")
    for norm, module in norms.items():
        x, scale, output = (seen[f"{norm}.{hook}"].detach() for hook in ("hook_in", "hook_scale", "hook_out"))
        bias = getattr(module.original_component, "bias", None)
        ours = _frozen_norm(module, x, scale) + (0 if bias is None else bias.float())
        if not bool((output - ours).abs().max() <= _TOLERANCE * output.abs().max()):
            raise _no_rule(model, f"{norm!r}, a norm that is neither LayerNorm nor RMSNorm,")


def _passed(name: str, cached: CachedResidual) -> bool:
    """Whether a run that starts from the cached residual stream passes this hook."""
    return not name.startswith("blocks.") or int(name.split(".")[1]) > cached.layer


def _no_rule(model: Model, what: str) -> UserError:
    return UserError(f"method 'relevance' has no rule for {what} in {model.architecture}: take --method attribution")
