"""Node effects, by method: what each node does to the score, or how it goes along with it.

A method is a function from a `Problem` to `Effects`, registered by name in `METHODS`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from sfc.circuits.ablation import Ablation
from sfc.circuits.attribution import BatchEffects, attributed_effects, integrated_effects
from sfc.circuits.exact import exact_effects
from sfc.circuits.learned_mask import learn_mask
from sfc.circuits.nodes import Nodes
from sfc.circuits.permutation import permutation_test
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar
from sfc.models.batches import Batch
from sfc.models.running import Prefix
from sfc.stats import pearson

NATS = "nats"
"""the unit of causal effects: of whatever the problem's score is"""


class Effects(NamedTuple):
    """What a method says of every node."""

    effect: Float[np.ndarray, " nodes"]
    """signed, in `unit`; not a number for a node that the method has not looked at"""
    absolute: Float[np.ndarray, " nodes"]
    """mean over prompts of the absolute effect where the method has one per prompt, else |effect|"""
    ranking: Int[np.ndarray, " ranked"]
    """the nodes that may be in a circuit, best first"""
    attributes: Mapping[str, Float[np.ndarray, " nodes"]]
    """further numbers per node, such as p-values"""
    unit: str = NATS
    by_slot: Float[np.ndarray, "slots nodes"] | None = None
    """the effect's parts from each slot, where the method has them: where in the prompt the node matters"""
    by_prompt: Float[np.ndarray, "prompts nodes"] | None = None
    """the effects that `effect` is the mean of, where it is one over prompts"""


def attribution(problem: Problem) -> Effects:
    """First-order effects from one backward pass (see `sfc.circuits.attribution`), ranked by |mean effect|."""
    return _mean_effects(problem, attributed_effects)


def integrated_gradients(problem: Problem) -> Effects:
    """Gradients averaged along each site's path from its reference (see `sfc.circuits.attribution`)."""
    with progress_bar("integrated gradients", len(problem.runs.batches), "batches") as progress:

        def of_batch(problem: Problem, batch: Batch, prefix: Prefix) -> BatchEffects:
            effects = integrated_effects(problem, batch, prefix, problem.config.ig_steps)
            progress(1)
            return effects

        return _mean_effects(problem, of_batch)


def exact(problem: Problem) -> Effects:
    """Exact effects (see `sfc.circuits.exact`) of the `exact_nodes` nodes of largest |attribution|, and of no others.

    Only they are ranked: a run per node would take hours for all. The others' effects are not a number.
    """
    chosen = attribution(problem).ranking[: problem.config.exact_nodes]
    with progress_bar("exact effects", len(chosen) * len(problem.runs.batches), "runs") as progress:
        per_prompt = exact_effects(problem, chosen.tolist(), progress=progress)
    effect, absolute = np.full((2, problem.ablation.nodes.n_nodes), np.nan)
    effect[chosen], absolute[chosen] = per_prompt.mean(1), np.abs(per_prompt).mean(1)
    by_prompt = np.full((per_prompt.shape[1], len(effect)), np.nan, dtype=np.float32)
    by_prompt[:, chosen] = per_prompt.T
    ranking = chosen[np.argsort(-np.abs(effect[chosen]), kind="stable")]
    return Effects(effect, absolute, ranking, {}, by_prompt=by_prompt)


def learned_mask(problem: Problem) -> Effects:
    """Nodes ranked by a mask learned through the ablation (see `sfc.circuits.learned_mask`), attribution beside it.

    The effects are those of attribution, which also warm-starts the mask. Attributes: `mask`, between 0 and 1, and
    `held`, the step until which the node was kept.
    """
    effects = attribution(problem)
    with progress_bar("learning a mask", problem.config.mask_steps, "steps") as progress:
        learned = learn_mask(problem, np.abs(effects.effect), progress)
    return effects._replace(ranking=_ranked(learned.held, problem.ablation), attributes=learned._asdict())


def _mean_effects(problem: Problem, of_batch: Callable[[Problem, Batch, Prefix], BatchEffects]) -> Effects:
    """Means over the prompts of effects that come batch by batch."""
    nodes, n_prompts = problem.ablation.nodes, problem.runs.n_prompts
    by_prompt = np.zeros((n_prompts, nodes.n_nodes), dtype=np.float32)
    by_slot = torch.zeros(problem.ablation.reference.layout.n_slots, nodes.n_nodes, dtype=torch.float64)
    for batch, prefix in problem.runs:
        effects = of_batch(problem, batch, prefix)
        by_prompt[batch.prompts.cpu().numpy()] = effects.by_prompt.cpu().numpy()
        by_slot += effects.by_slot.double().cpu()
    by_slot = (by_slot / n_prompts).numpy()
    mean = by_slot.sum(0)
    ranking = _ranked(np.abs(mean), problem.ablation)
    absolute = np.abs(by_prompt).mean(0, dtype=np.float64)
    return Effects(mean, absolute, ranking, {}, by_slot=by_slot, by_prompt=by_prompt)


def correlation(problem: Problem) -> Effects:
    """Pearson correlation of each feature, aggregated over the sequence, with the label of the prompts.

    Ranked are features with |r| of at least the threshold, or the strongest n of each layer. Error nodes have no value
    to correlate and are never ranked. Attributes: `p_value` against permuted labels (see `sfc.circuits.permutation`),
    and `q_value` after Benjamini and Hochberg (1995).

    Raises:
        UserError: all prompts have the same label.
    """
    labels = problem.labels
    if labels.all() or not labels.any():
        raise UserError("correlation needs toxic and safe prompts; where all labels agree use --method magnitude")
    nodes, config = problem.ablation.nodes, problem.config
    features = np.concatenate(list(problem.features.values()), axis=1)
    test = permutation_test(features, labels, problem.pairs, config.permutations, config.min_firing, seed=0)
    r = np.zeros(nodes.n_nodes)
    r[~nodes.is_error] = pearson(features, labels[:, None])[:, 0]
    p_value, q_value = np.ones((2, nodes.n_nodes))
    p_value[~nodes.is_error], q_value[~nodes.is_error] = test.p_value, test.q_value
    by_strength = np.argsort(-np.abs(r), kind="stable")
    if config.top_per_layer:
        eligible = _strongest_per_site(np.abs(r), nodes, config.top_per_layer)
    else:
        eligible = (np.abs(r) >= config.threshold) & ~nodes.is_error
    ranking = by_strength[eligible[by_strength]]
    return Effects(r, np.abs(r), ranking, {"p_value": p_value, "q_value": q_value}, unit="Pearson's r with the label")


def magnitude(problem: Problem) -> Effects:
    """How strongly each feature fires on the population's prompts: `0.7 mean |f| + 0.3 variance`.

    For prompts that all have the same label, where nothing can be correlated; as in the published pipeline.
    """
    wanted = problem.labels == problem.config.explains_positives
    per_site = [0.7 * np.abs(f[wanted]).mean(0) + 0.3 * f[wanted].var(0) for f in problem.features.values()]
    effect = _with_error_nodes(per_site, 0.0)
    ranking = np.argsort(-effect, kind="stable")
    return Effects(effect, effect, ranking[effect[ranking] > 0], {}, unit="magnitude")


def _ranked(importance: Float[np.ndarray, " nodes"], ablation: Ablation) -> Int[np.ndarray, " ranked"]:
    """The nodes that a circuit can choose to keep, best first: not the errors where the error mode decides on them."""
    ranking = np.argsort(-importance, kind="stable")
    return ranking if ablation.error_mode == "node" else ranking[~ablation.nodes.is_error[ranking]]


def _with_error_nodes(per_site: list[np.ndarray], value: float) -> np.ndarray:
    return np.concatenate([np.append(site, value) for site in per_site])


def _strongest_per_site(strength: np.ndarray, nodes: Nodes, count: int) -> np.ndarray:
    eligible = np.zeros(nodes.n_nodes, dtype=bool)
    for site in range(len(nodes.sites)):
        members = np.flatnonzero((nodes.site_numbers == site) & ~nodes.is_error & (strength > 0))
        eligible[members[np.argsort(-strength[members], kind="stable")[:count]]] = True
    return eligible


METHODS: dict[str, Callable[[Problem], Effects]] = {
    "learned-mask": learned_mask,
    "attribution": attribution,
    "integrated-gradients": integrated_gradients,
    "exact": exact,
    "correlation": correlation,
    "magnitude": magnitude,
}
