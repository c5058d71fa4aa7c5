"""How strongly each feature fires on the prompts explained: `0.7 mean |f| + 0.3 variance`.

For prompts that all have the same label, where nothing can be correlated; as in the published pipeline.
"""

import numpy as np

from sfc.circuits.methods import Effects
from sfc.circuits.problem import Problem


def rank(problem: Problem) -> Effects:
    """The features that fire at all, by their magnitude; error nodes and components have none."""
    wanted = problem.labels == problem.config.explains_positives
    per_site = [0.7 * np.abs(f[wanted]).mean(0) + 0.3 * f[wanted].var(0) for f in problem.features.values()]
    effect = problem.ablation.nodes.of_features(per_site, elsewhere=0.0)
    ranking = np.argsort(-effect, kind="stable")
    return Effects(effect, effect, ranking[effect[ranking] > 0], {}, unit="magnitude")
