"""Attribution: the first-order effect of setting each node to its reference.

With g = ds/dx at a site, the effect of feature i is `sum_t (g_t . d_i)(f_ti - f_ref_ti)` and that of the error
`sum_t g_t . (e_t - e_ref_t)` (Marks et al. 2024, without splicing anything in). Over a site they sum to
`sum_t g_t . (x_t - x_ref_t)`, whatever g is: integrated gradients are the same sums with another g.

Integrated gradients (Sundararajan et al. 2017), one site at a time, from the reference to the clean activation.

On the straight path `x(a) = x_hat(f_ref + a (f - f_ref)) + e_ref + a (e - e_ref) = x_ref + a (x - x_ref)` at one site,
with everything after it plain, the effect of feature i is `sum_t (mean_a g_t(a) . d_i)(f_ti - f_ref_ti)`: attribution,
but with the mean of the gradients along the path. Over a site the effects sum to F(M) - F(that site ablated).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.gradients import SiteRun, score_gradients, site_runs
from sfc.circuits.problem import Problem
from sfc.models.batches import PACKED_TOKENS, Batch
from sfc.models.linear import linear
from sfc.models.running import Prefix
from sfc.saes.kernels import row_dots


class BatchEffects(NamedTuple):
    """Effects on the prompts of one batch, in nats, summed over positions in two ways."""

    by_prompt: Float[Tensor, "batch nodes"]
    by_slot: Float[Tensor, "slots nodes"]
    """summed over the prompts"""


def attributed_effects(problem: Problem, batch: Batch, prefix: Prefix) -> BatchEffects:
    """The attribution of every node on every prompt of one batch, from one backward pass in the plain model."""
    gradients = score_gradients(problem, batch, prefix)
    return join_sites([first_order_effects(problem.ablation, site, x, g, batch) for site, (x, g) in gradients.items()])


@torch.no_grad()
def first_order_effects(
    ablation: Ablation, site: str, x: Float[Tensor, "batch pos d_in"], g: Float[Tensor, "batch pos d_in"], batch: Batch
) -> BatchEffects:
    """The effects of one site's nodes, its features first, for activations x and gradients g.

    The reference's part needs gradients only summed per prompt and slot, so that features that are off cost nothing.
    """
    dictionary, reference = ablation.dictionaries[site], ablation.reference
    touchable = batch.touchable
    prompt = torch.arange(len(batch.lengths), device=x.device)[:, None].expand_as(batch.slots)[touchable]
    slots, g, x = batch.slots[touchable], g[touchable].float(), x[touchable].float()
    n_slots, n_table = len(reference.features[site]), reference.layout.n_slots
    place, place_of_token = (prompt * n_slots + slots).unique(return_inverse=True)
    prompt_of_place, slot_of_place = place // n_slots, place % n_slots
    values, indices = dictionary.encode_sparse(x)

    summed = x.new_zeros(len(place), dictionary.d_in).index_add_(0, place_of_token, g)
    of_features = -linear(summed, dictionary.W_dec) * reference.features[site][slot_of_place]
    active = (place_of_token[:, None] * dictionary.d_sae + indices).flatten()
    of_features.view(-1).index_add_(0, active, (row_dots(g, indices, dictionary.W_dec) * values).flatten())

    error = x - dictionary.decode_sparse(values, indices) - reference.errors[site][slots]
    of_parts = (g * error).unflatten(1, (dictionary.n_parts, -1)).sum(-1)
    of_error = x.new_zeros(len(place), dictionary.n_parts).index_add_(0, place_of_token, of_parts)
    effects = torch.cat([of_features, of_error], dim=1)
    return BatchEffects(
        effects.new_zeros(len(batch.lengths), effects.shape[1]).index_add_(0, prompt_of_place, effects),
        effects.new_zeros(n_table, effects.shape[1]).index_add_(0, slot_of_place % n_table, effects),
    )


def join_sites(per_site: Sequence[BatchEffects]) -> BatchEffects:
    """The effects of all nodes from those of each site, in the order of the sites."""
    return BatchEffects(*(torch.cat(parts, dim=1) for parts in zip(*per_site, strict=True)))


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
