"""Greedy filtering: features near a refusal direction, dropped as long as the others do (Prakash et al. 2025).

*Beyond I'm Sorry, I Can't* collects features close to a refusal direction whose ablation together turns refusals into
answers, and prunes them greedily: a feature without which the ablation still does so is dropped. Candidates here are
those of `refusal_direction`. They are tried from the smallest |attribution| to the largest, each once; one is dropped
if the ablation of what is then left takes away as much of the score as a share of what ablating all candidates does.
What is left is ranked by how much each was missed when it was tried.

The paper judges single prompts by their replies, and so has a set for each. Here one set is found for all discovery
prompts, by their scores. Its third step, a model of how features interact, proposes further features that are active
only without the first ones; it ranks no nodes and is left out.
"""

from dataclasses import replace

import numpy as np

from sfc.circuits.faithfulness import top_circuits
from sfc.circuits.methods import Effects, GreedyFilteringOptions, attribution
from sfc.circuits.methods.refusal_direction import cosines, nearest_features, refusal_direction, scores_without
from sfc.circuits.problem import Problem
from sfc.core.progress import progress_bar


def rank(problem: Problem) -> Effects:
    """The features that greedy filtering leaves, ranked by what is lost without them; effects are attribution's.

    Attributes: `cosine` of each feature's decoder row with the direction.

    Raises:
        UserError: nodes have no features, sites are not of one width, or all prompts are on one side.
    """
    options = GreedyFilteringOptions.of(problem.experiment)
    cosine = cosines(problem, refusal_direction(problem))
    effects = attribution.rank(problem)
    candidates = nearest_features(problem, cosine, options.per_site)
    candidates = candidates[np.argsort(np.abs(effects.effect[candidates]), kind="stable")]
    some = replace(problem, runs=problem.runs.sample(options.prompts, problem.experiment.seed))
    plain, of_left = scores_without(some, top_circuits(candidates, [0, len(candidates)], len(cosine)))
    bound = plain - options.share * (plain - of_left)
    left, missed = set(candidates.tolist()), dict[int, float]()
    with progress_bar("greedy filtering", len(candidates) * some.runs.n_prompts, "runs") as progress:
        for node in candidates.tolist():
            rest = np.array(sorted(left - {node}), dtype=int)
            (without,) = scores_without(some, top_circuits(rest, [len(rest)], len(cosine)), progress)
            if len(rest) and without <= bound:
                left, of_left = left - {node}, without
            else:
                missed[node] = without - of_left
    ranking = np.array(sorted(missed, key=lambda node: -missed[node]), dtype=int)
    return effects._replace(ranking=ranking, attributes={"cosine": cosine})
