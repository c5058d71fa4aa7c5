"""A discovery method of one's own: the features that point most along the difference of the two sides' means."""

import numpy as np

from sfc.circuits.methods import METHODS, Effects, Method
from sfc.core.options import Options


class AlignedOptions(Options):
    section = "aligned"
    most: int = 100


def rank(problem):
    """Cosines of decoder directions with the difference of the means of a site's stored activations."""
    nodes, cosines = problem.ablation.nodes, []
    for site, dictionary in problem.ablation.dictionaries.items():
        direction = mean(problem, site, True) - mean(problem, site, False)
        rows = dictionary.W_dec.cpu()
        cosines.append((rows @ direction / (rows.norm(dim=1) * direction.norm()).clamp(min=1e-9)).numpy())
    effect = nodes.of_features(cosines, elsewhere=0.0)
    ranking = np.argsort(-np.abs(effect), kind="stable")[: AlignedOptions.of(problem.experiment).most]
    return Effects(effect, np.abs(effect), ranking[nodes.is_feature[ranking]], {}, unit="cosine")


def mean(problem, site, positive):
    """The mean of the stored activations of one side's discovery prompts."""
    store, prompts = problem.store, problem.prompts["store_index"][problem.labels == positive]
    wanted = np.isin(store.tokens.prompt, prompts)
    total = sum(store.read(site, start, stop)[wanted[start:stop]].sum(0) for start, stop in store.blocks(4096))
    return total / wanted.sum()


METHODS.register(
    Method(
        "aligned", rank, AlignedOptions, causal=False, per_prompt=False,
        signs=("points to {positive} prompts", "points to {negative} prompts", "at right angles"),
    )
)  # fmt: skip
