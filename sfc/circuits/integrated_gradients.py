"""Integrated gradients (Sundararajan et al. 2017), one site at a time, from the reference to the clean activation.

On the straight path `x(a) = x_hat(f_ref + a (f - f_ref)) + e_ref + a (e - e_ref) = x_ref + a (x - x_ref)` at one site,
with everything after it plain, the effect of feature i is `sum_t (mean_a g_t(a) . d_i)(f_ti - f_ref_ti)`: attribution,
but with the mean of the gradients along the path. Over a site the effects sum to F(M) - F(that site ablated).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.attribution import BatchEffects, first_order_effects, join_sites
from sfc.circuits.problem import Problem
from sfc.circuits.site_runs import SiteRun, site_runs
from sfc.models.batches import PACKED_TOKENS, Batch
from sfc.models.running import Prefix


def integrated_effects(problem: Problem, batch: Batch, prefix: Prefix, steps: int) -> BatchEffects:
    """The integrated gradients of every node on every prompt of one batch, in nats.

    Args:
        steps: gradients per path, at the midpoints of as many equal parts: the error falls with their square.
    """
    ablation = problem.ablation
    runs = site_runs(problem, ablation.nodes.sites, batch, prefix)
    return join_sites([first_order_effects(ablation, r.site, r.x, _mean_gradient(r, steps), batch) for r in runs])


def _mean_gradient(run: SiteRun, steps: int) -> Float[Tensor, "batch pos d_in"]:
    """The mean gradient of the score along the path; several points of it go through in one batch."""
    x, batch = run.x.float(), run.batch
    x_ref = run.problem.ablation.reference_activation(run.site)[batch.slots]
    away = (x - x_ref) * batch.touchable[..., None]
    left = 1 - (torch.arange(steps, device=x.device) + 0.5) / steps
    total = torch.zeros_like(x)
    for part in left.split(batch.copies_in(PACKED_TOKENS)):
        points = (x - part[:, None, None, None] * away).requires_grad_()
        with torch.enable_grad():
            run.scores(points).sum().backward()
        assert points.grad is not None
        total += points.grad.sum(0)
    return total / steps
