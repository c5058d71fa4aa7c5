"""Integrated gradients (Sundararajan et al. 2017), one site at a time, from the baseline to the clean activation.

On the straight path `x(a) = x_hat(f_ref + a (f - f_ref)) + e_ref + a (e - e_ref) = x_ref + a (x - x_ref)` at one site,
with everything after it plain, the effect of feature i is `sum_t (mean_a g_t(a) . d_i)(f_ti - f_ref_ti)`: attribution,
but with the mean of the gradients along the path. Over a site the effects sum to F(M) - F(that site ablated).
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.gradients import SiteRun, site_runs
from sfc.circuits.methods import Effects, IntegratedGradientsOptions
from sfc.circuits.methods.attribution import BatchEffects, effects_at_site, join_sites, mean_effects
from sfc.circuits.problem import Problem
from sfc.core.progress import progress_bar
from sfc.models.batches import PACKED_TOKENS, Batch
from sfc.models.running import CachedResidual


def rank(problem: Problem) -> Effects:
    """Gradients averaged along each site's path from its baseline, ranked by |mean effect|."""
    steps = IntegratedGradientsOptions.of(problem.experiment).steps
    with progress_bar("integrated gradients", len(problem.runs.batches), "batches") as progress:

        def of_batch(problem: Problem, batch: Batch, cached: CachedResidual) -> BatchEffects:
            effects = integrated_effects(problem, batch, cached, steps)
            progress(1)
            return effects

        return mean_effects(problem, of_batch)


def integrated_effects(problem: Problem, batch: Batch, cached: CachedResidual, steps: int) -> BatchEffects:
    """The integrated gradients of every node on every prompt of one batch, in nats.

    Args:
        steps: gradients per path, at the midpoints of as many equal parts: the error falls with their square.
    """
    ablation = problem.ablation
    runs = site_runs(problem, ablation.nodes.sites, batch, cached)
    return join_sites([effects_at_site(ablation, r.site, r.x, _mean_gradient(r, steps), batch) for r in runs])


def _mean_gradient(run: SiteRun, steps: int) -> Float[Tensor, "batch pos d_in"]:
    """The mean gradient of the score along the path; several points of it go through in one batch."""
    x, batch = run.x.float(), run.batch
    away = torch.zeros_like(x)
    away[batch.touchable] = x[batch.touchable] - run.problem.ablation.ablated_activation(run.site, batch)
    left = 1 - (torch.arange(steps, device=x.device) + 0.5) / steps
    total = torch.zeros_like(x)
    for part in left.split(batch.copies_in(PACKED_TOKENS)):
        points = (x - einsum(part, away, "points, batch pos d_in -> points batch pos d_in")).requires_grad_()
        with torch.enable_grad():
            run.scores(points).sum().backward()
        assert points.grad is not None
        total += points.grad.sum(0)
    return total / steps
