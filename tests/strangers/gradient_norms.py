"""A method of a stranger's: how far nodes move the activation, times the norm of the gradient of the score."""

import numpy as np
from pydantic import Field

from sfc.circuits.methods import METHODS, Effects, Method
from sfc.core.options import Options


class GradientNormOptions(Options):
    """What is ranked by gradient norms."""

    section = "gradient_norm"

    power: float = Field(1.0, gt=0, description="of the gradient's norm")


def rank(problem) -> Effects:
    """Features by `mean_t |f_t - f_ref| |g_t|^power` over the discovery prompts; errors by the same of their norm."""
    from sfc.circuits.gradients import score_gradients

    power = GradientNormOptions.of(problem.experiment).power
    total, reference = np.zeros(problem.ablation.nodes.n_nodes), problem.ablation.reference
    for batch, prefix in problem.runs:
        slots, of_sites = batch.slots[batch.touchable], []
        for site, (x, g) in score_gradients(problem, batch, prefix).items():
            space, x, g = problem.ablation.dictionaries[site], x[batch.touchable], g[batch.touchable]
            f, norm = space.encode(x), g.norm(dim=1) ** power
            error = x - space.decode(f) - reference.errors[site][slots]
            of_features = ((f - reference.features[site][slots]).abs() * norm[:, None]).sum(0)
            of_sites += [of_features.numpy(), [float((error.norm(dim=1) * norm).sum())]]
        total += np.concatenate(of_sites)
    return Effects(total, total, np.argsort(-total, kind="stable"), {}, unit="nats, an upper bound")


METHODS.register(Method("gradient-norm", rank, GradientNormOptions, per_prompt=False))
