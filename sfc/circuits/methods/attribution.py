"""Attribution patching: to first order, what setting each node to its baseline does (Nanda 2023; Marks et al. 2024).

With g = ds/dx at a site of the plain model, in which nothing is spliced, the effect of feature i is
`sum_t (g_t . d_i)(f_ti - f_ref_ti)` and that of the error `sum_t g_t . (e_t - e_ref_t)`. Over a site they sum to
`sum_t g_t . (x_t - x_ref_t)`, whatever g is.

Integrated gradients (Sundararajan et al. 2017), one site at a time, are the same sums with the mean gradient along the
straight path `x(a) = x_ref + a (x - x_ref)`, everything after the site plain. Over a site they sum to
F(M) - F(that site ablated).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float, Int
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.gradients import SiteRun, prompt_of_token, score_gradients, site_runs
from sfc.circuits.methods import Effects, IntegratedGradientsOptions
from sfc.circuits.problem import Problem
from sfc.core.progress import progress_bar
from sfc.models.batches import PACKED_TOKENS, Batch
from sfc.models.running import CachedResidual
from sfc.saes.kernels import row_dots


class BatchEffects(NamedTuple):
    """Effects on the prompts of one batch, in nats, summed over positions in two ways."""

    by_prompt: Float[Tensor, "batch nodes"]
    by_position: Float[Tensor, "positions nodes"]
    """summed over the prompts"""


def rank(problem: Problem) -> Effects:
    """Effects from one backward pass per batch, ranked by |mean effect|."""
    return mean_effects(problem, attributed_effects)


def attributed_effects(problem: Problem, batch: Batch, cached: CachedResidual) -> BatchEffects:
    """The attribution of every node on every prompt of one batch, from one backward pass in the plain model."""
    gradients = score_gradients(problem, batch, cached)
    return join_sites([effects_at_site(problem.ablation, site, x, g, batch) for site, (x, g) in gradients.items()])


@torch.no_grad()
def effects_at_site(
    ablation: Ablation, site: str, x: Float[Tensor, "batch pos d_in"], g: Float[Tensor, "batch pos d_in"], batch: Batch
) -> BatchEffects:
    """The effects of one site's nodes, its features first, for activations x and gradients g.

    The baseline's part is its own to sum (see `Baseline.attributed`), per prompt and template position.
    """
    dictionary, baseline = ablation.dictionaries[site], ablation.baseline
    touchable = batch.touchable
    prompt = prompt_of_token(batch)
    template_positions, g, x = batch.template_positions[touchable], g[touchable].float(), x[touchable].float()
    n_template_positions, n_table = int(template_positions.max()) + 1, baseline.layout.n_template_positions
    place, place_of_token = (prompt * n_template_positions + template_positions).unique(return_inverse=True)
    prompt_of_place, position_of_place = place // n_template_positions, place % n_template_positions
    values, indices = dictionary.encode_sparse(x)

    of_features = -baseline.attributed(dictionary, g, batch, place_of_token, len(place))
    active = (place_of_token[:, None] * dictionary.d_sae + indices).flatten()
    of_features.view(-1).index_add_(0, active, (row_dots(g, indices, dictionary.W_dec) * values).flatten())

    error = x - dictionary.decode_sparse(values, indices) - baseline.errors_at(dictionary, batch)
    of_parts = reduce(g * error, "tokens (parts width) -> tokens parts", "sum", parts=dictionary.n_parts)
    of_error = x.new_zeros(len(place), dictionary.n_parts).index_add_(0, place_of_token, of_parts)
    effects = torch.cat([of_features, of_error], dim=1)
    return BatchEffects(
        effects.new_zeros(len(batch.lengths), effects.shape[1]).index_add_(0, prompt_of_place, effects),
        effects.new_zeros(n_table, effects.shape[1]).index_add_(0, position_of_place % n_table, effects),
    )


def join_sites(per_site: Sequence[BatchEffects]) -> BatchEffects:
    """The effects of all nodes from those of each site, in the order of the sites."""
    return BatchEffects(*(torch.cat(parts, dim=1) for parts in zip(*per_site, strict=True)))


def mean_effects(problem: Problem, of_batch: Callable[[Problem, Batch, CachedResidual], BatchEffects]) -> Effects:
    """Means over the prompts of effects that come batch by batch, ranked by their size."""
    nodes, n_prompts = problem.ablation.nodes, problem.runs.n_prompts
    by_prompt = np.zeros((n_prompts, nodes.n_nodes), dtype=np.float32)
    by_position = torch.zeros(problem.ablation.baseline.layout.n_template_positions, nodes.n_nodes, dtype=torch.float64)
    for batch, cached in problem.runs:
        effects = of_batch(problem, batch, cached)
        by_prompt[batch.prompts.cpu().numpy()] = effects.by_prompt.cpu().numpy()
        by_position += effects.by_position.double().cpu()
    by_position = (by_position / n_prompts).numpy()
    mean = by_position.sum(0)
    ranking = ranked(np.abs(mean), problem.ablation)
    absolute = np.abs(by_prompt).mean(0, dtype=np.float64)
    return Effects(mean, absolute, ranking, {}, by_position=by_position, by_prompt=by_prompt)


def ranked(importance: Float[np.ndarray, " nodes"], ablation: Ablation) -> Int[np.ndarray, " ranked"]:
    """The nodes that a circuit can choose to keep, best first: not the errors where the error mode decides on them."""
    ranking = np.argsort(-importance, kind="stable")
    return ranking if ablation.error_mode == "node" else ranking[~ablation.nodes.is_error[ranking]]


def rank_integrated(problem: Problem) -> Effects:
    """Gradients averaged along each site's path from its baseline, ranked by |mean effect|."""
    return mean_integrated_effects(problem, IntegratedGradientsOptions.of(problem.experiment).steps)


def mean_integrated_effects(problem: Problem, steps: int) -> Effects:
    """As `rank_integrated`, with so many gradients per path."""
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
