"""Features nearest a refusal direction, filtered by integrated gradients and cut to a minimal set (Yeo et al. 2025).

Three steps, all on discovery prompts (*Understanding Refusal in Language Models with Sparse Autoencoders*):

    direction     at each site the mean over positive prompts minus the mean over the others, at the last token; taken
                  is the one of them whose projection out of every site lowers the score of positive prompts most
    candidates    at each site the features whose decoder rows have the largest cosine with it
    minimal set   of these, best first by |integrated-gradients effect|, the fewest whose ablation takes away as much
                  of the score as a share of what ablating all candidates does

Only the minimal set is ranked. It is what the behavior cannot do without, of what points along one direction: nothing
asks whether it can do with it alone, which is what circuits are proved by.

The paper leaves open what "minimal" is measured by, where the path of its gradients starts, and what replaces an
ablated feature (it multiplies them by a negative number). Here it is the score, and the experiment's own baseline for
both. Its sweep is over all layers; here only the circuit's sites are tried, whose activations are stored.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.circuits.faithfulness import ablated_scores, top_circuits
from sfc.circuits.methods import Effects, RefusalDirectionOptions
from sfc.circuits.methods.attribution import mean_integrated_effects
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention
from sfc.models.score import DirectedScore, score_batch

_BLOCK_ROWS = 4096
_SIZES_TRIED = 24


def rank(problem: Problem) -> Effects:
    """The minimal set, ranked by |integrated-gradients effect|; effects are those of integrated gradients.

    Attributes: `cosine` of each feature's decoder row with the direction.

    Raises:
        UserError: nodes have no features, sites are not of one width, or all prompts are on one side.
    """
    options = RefusalDirectionOptions.of(problem.experiment)
    cosine = cosines(problem, refusal_direction(problem))
    effects = mean_integrated_effects(problem, options.steps)
    candidates = nearest_features(problem, cosine, options.per_site)
    candidates = candidates[np.argsort(-np.abs(effects.effect[candidates]), kind="stable")]
    sizes = [0, *np.unique(np.geomspace(1, len(candidates), _SIZES_TRIED).round().astype(int)).tolist()]
    sets = top_circuits(candidates, sizes, problem.ablation.nodes.n_nodes)
    with progress_bar("cutting to a minimal set", len(sets) * problem.runs.n_prompts, "runs") as progress:
        scores = scores_without(problem, sets, progress)
    taken = (scores[0] - scores)[1:]
    enough = sizes[1 + int(np.argmax(taken >= options.share * taken[-1]))]
    return effects._replace(ranking=candidates[:enough], attributes={"cosine": cosine})


def refusal_direction(problem: Problem) -> Float[Tensor, " d_model"]:
    """The difference of means, of those at each site, that lowers the score of positive prompts most if projected out.

    Raises:
        UserError: see `rank`.
    """
    labels, nodes = problem.labels, problem.ablation.nodes
    if not nodes.is_feature.any():
        raise UserError("a refusal direction is compared with features: nodes of this kind have none")
    if len({space.d_in for space in problem.ablation.dictionaries.values()}) > 1:
        raise UserError("a refusal direction needs sites of one width: leave hook_z out of activations.kind")
    if labels.all() or not labels.any():
        raise UserError("a refusal direction needs prompts of both sides")
    of_sites = [last_tokens(problem, site) for site in nodes.sites]
    positive = torch.tensor(labels, device=problem.model.device)
    directions = [last[positive].mean(0) - last[~positive].mean(0) for last in of_sites]
    falls = [_fall(problem, direction / direction.norm()) for direction in directions]
    return directions[int(np.argmax(falls))]


def last_tokens(problem: Problem, site: str) -> Float[Tensor, "prompts d_in"]:
    """The stored activation at the last token of each of the problem's prompts, in their order."""
    store, tokens = problem.store, problem.store.tokens
    wanted = problem.prompts["store_index"].to_numpy()
    last = np.full(int(max(tokens.prompt.max(), wanted.max())) + 1, -1)
    np.maximum.at(last, tokens.prompt, tokens.position)
    is_last = tokens.position == last[tokens.prompt]
    rows = np.zeros((len(last), store.width(site)), dtype=np.float32)
    for start, stop in store.blocks(_BLOCK_ROWS):
        here = is_last[start:stop]
        if here.any():
            rows[tokens.prompt[start:stop][here]] = (
                store.read(site, start, stop)[torch.from_numpy(here)].float().numpy()
            )
    return torch.from_numpy(rows[wanted]).to(problem.model.device)


@torch.no_grad()
def _fall(problem: Problem, unit: Float[Tensor, " d_model"]) -> float:
    """How far the mean score of positive prompts falls if a direction is projected out at every site and token."""

    def projecting(touchable: Bool[Tensor, "batch pos"]) -> Intervention:
        def project(activation: Tensor) -> Tensor:
            along = (activation.float() @ unit)[..., None] * unit * touchable[..., None]
            return activation - along.to(activation.dtype)

        return project

    falls = []
    for batch, cached in problem.runs:
        acting = dict.fromkeys(problem.ablation.nodes.sites, projecting(batch.touchable))
        plain = score_batch(problem.model, problem.score, batch, cached=cached)
        fall = plain - score_batch(problem.model, problem.score, batch, acting, cached)
        falls.append(fall[_is_positive(problem, batch)])
    return float(torch.cat(falls).mean())


def _is_positive(problem: Problem, batch: Batch) -> Bool[Tensor, " batch"]:
    """Which rows are prompts of the positive side: of pairs there are both."""
    if isinstance(problem.score, DirectedScore) and batch.pair is not None:
        return problem.score.direction[batch.pair] > 0
    return torch.ones_like(batch.lengths, dtype=torch.bool)


@torch.no_grad()
def cosines(problem: Problem, direction: Float[Tensor, " d_model"]) -> Float[np.ndarray, " nodes"]:
    """Of each feature's decoder row with a direction; 0 for nodes that are not features."""
    unit = direction / direction.norm().clamp_min(1e-12)
    of_sites = (
        (space.W_dec.float() @ unit / space.W_dec.float().norm(dim=1).clamp_min(1e-12)).cpu().numpy()
        for space in problem.ablation.dictionaries.values()
    )
    return problem.ablation.nodes.of_features(of_sites, elsewhere=0.0)


def nearest_features(
    problem: Problem, cosine: Float[np.ndarray, " nodes"], per_site: int
) -> Int[np.ndarray, " candidates"]:
    """At each site the features of largest cosine, in the order of the sites."""
    nodes = problem.ablation.nodes
    members = [np.flatnonzero((nodes.site_numbers == site) & nodes.is_feature) for site in range(len(nodes.sites))]
    return np.concatenate([here[np.argsort(-cosine[here], kind="stable")[:per_site]] for here in members])


def scores_without(
    problem: Problem, sets: Bool[np.ndarray, "sets nodes"], progress: Callable[[int], None] = lambda _runs: None
) -> Float[np.ndarray, " sets"]:
    """The mean score with each set of nodes ablated and all else as it is, errors included, in nats.

    Args:
        progress: called with the number of pairs of a set and a prompt that are done since the last call.
    """
    ablation = replace(problem.ablation, error_mode="node")
    return ablated_scores(problem.model, problem.score, ablation, problem.runs, ~sets, progress).mean(1)
