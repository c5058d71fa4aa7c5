"""The gradient of the score with respect to the activations at every site, in the plain model."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.problem import Problem
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention
from sfc.models.running import Prefix
from sfc.models.score import score_batch


class SiteGradient(NamedTuple):
    """What attribution needs of one site."""

    x: Float[Tensor, "batch pos d_in"]
    """the activation"""
    g: Float[Tensor, "batch pos d_in"]
    """ds/dx, s the score of the token's own prompt"""


def score_gradients(problem: Problem, batch: Batch, prefix: Prefix) -> dict[str, SiteGradient]:
    """Activations and gradients at the sites of all dictionaries, from one backward pass. Nothing is spliced in."""
    seen: dict[str, Tensor] = {}
    interventions = {site: _leaf(seen, site) for site in problem.ablation.nodes.sites}
    with torch.enable_grad():
        total = score_batch(problem.model, problem.score, batch, interventions, prefix).sum()
    gradients = torch.autograd.grad(total, list(seen.values()))
    return {site: SiteGradient(x.detach(), g) for (site, x), g in zip(seen.items(), gradients, strict=True)}


def _leaf(seen: dict[str, Tensor], site: str) -> Intervention:
    """Record the activation; the first one starts the graph."""

    def record(activation: Tensor) -> Tensor:
        # A copy takes its place: gradients are then of what an intervention here can change, and of nothing that
        # reads the same tensor by another way, as the residual stream around `hook_resid_mid`.
        seen[site] = activation.clone() if activation.requires_grad else activation.detach().requires_grad_()
        return seen[site]

    return record
