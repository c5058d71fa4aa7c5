"""What a model loses when a dictionary's reconstruction replaces the activation itself.

Two yardsticks: the cross-entropy of the prompts' tokens, and the refusal score after each prompt. Both are compared
with what is left when the activation is replaced by its mean or by zero instead. Padding and the attention sink keep
their activation throughout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sfc.models.batches import Batch
from sfc.models.interventions import Intervention, recorder
from sfc.models.loading import Model
from sfc.models.running import CachedResidual, cached_residual_after, layer_before, losses_and_last_logits
from sfc.models.score import Score
from sfc.saes.dictionary import Dictionary, reconstruction

MIN_DAMAGE = 0.01
"""nats; where an ablation does less harm than this there is next to nothing to recover, and the share is NaN"""


class SplicingQuality(NamedTuple):
    """Cross-entropy of the next prompt token, means over tokens; refusal score, means over prompts; all in nats.

    Recovered shares are 1 for a perfect dictionary and 0 for one that is no better than the ablation.
    """

    cross_entropy: float
    """the model as it is"""
    cross_entropy_spliced: float
    """with the reconstruction in place of the activation"""
    cross_entropy_mean_ablated: float
    """with the activation replaced by its mean over all tokens"""
    cross_entropy_zero_ablated: float
    loss_recovered: float
    """`(mean-ablated - spliced) / (mean-ablated - as it is)`"""
    loss_recovered_zero: float
    """the same against zero-ablation"""
    score: float
    score_spliced: float
    score_mean_ablated: float
    score_zero_ablated: float
    score_change_spliced: float
    """mean over prompts of |s_spliced - s|"""
    score_change_mean_ablated: float
    score_change_zero_ablated: float
    score_recovered: float
    """`1 - mean |s_spliced - s| / mean |s_mean-ablated - s|`"""
    score_recovered_zero: float
    """the same against zero-ablation"""


class Outcome(NamedTuple):
    """What runs of all prompts end with."""

    losses: Float[Tensor, " tokens"]
    scores: Float[Tensor, " prompts"]


@dataclass(frozen=True)
class CleanRuns:
    """Prompts run once as they are, with what all dictionaries are compared with."""

    batches: Sequence[Batch]
    cached_residuals: Sequence[CachedResidual]
    """for each batch, the residual stream from which runs that change these sites start"""
    outcome: Outcome
    means: Mapping[str, Float[Tensor, " d_in"]]
    """for each site, the mean activation over all tokens but padding and sinks"""


@torch.no_grad()
def run_clean(model: Model, score: Score, batches: Sequence[Batch], sites: Sequence[str]) -> CleanRuns:
    """Run the prompts as they are, and take the mean activation at each site."""
    cached_residuals = [cached_residual_after(model, batch, min(map(layer_before, sites))) for batch in batches]
    sums: dict[str, Tensor] = {}
    outcomes = []
    for batch, cached in zip(batches, cached_residuals, strict=True):
        seen: dict[str, Tensor] = {}
        outcomes.append(_outcome(model, score, batch, cached, {site: recorder(seen, site) for site in sites}))
        for site, activation in seen.items():
            sums[site] = sums.get(site, 0) + activation[batch.touchable].double().sum(dim=0)
    n_tokens = sum(int(batch.touchable.sum()) for batch in batches)
    means = {site: (total / n_tokens).float() for site, total in sums.items()}
    return CleanRuns(batches, cached_residuals, _joined(outcomes), means)


@torch.no_grad()
def splicing_quality(model: Model, score: Score, dictionary: Dictionary, clean: CleanRuns) -> SplicingQuality:
    """Run the prompts with the dictionary spliced in at its site, and with the site's mean and zero in its place."""
    mean = clean.means[dictionary.site]

    def replaced(function: Callable[[Tensor, Tensor], Tensor]) -> Outcome:
        return _joined(
            [
                _outcome(model, score, batch, cached, _replacing(dictionary, batch, function))
                for batch, cached in zip(clean.batches, clean.cached_residuals, strict=True)
            ]
        )

    spliced = replaced(lambda x, read: reconstruction(dictionary, dictionary.encode_sparse(read), read, x))
    mean_ablated = replaced(lambda x, _: mean.expand_as(x))
    zero_ablated = replaced(lambda x, _: torch.zeros_like(x))
    runs = (clean.outcome, spliced, mean_ablated, zero_ablated)
    loss, loss_spliced, loss_mean, loss_zero = (_mean(outcome.losses) for outcome in runs)
    change_spliced, change_mean, change_zero = (_mean((o.scores - clean.outcome.scores).abs()) for o in runs[1:])
    scores = [_mean(outcome.scores) for outcome in runs]
    return SplicingQuality(
        *(loss, loss_spliced, loss_mean, loss_zero),
        loss_recovered=_recovered(loss_spliced - loss, loss_mean - loss),
        loss_recovered_zero=_recovered(loss_spliced - loss, loss_zero - loss),
        score=scores[0],
        score_spliced=scores[1],
        score_mean_ablated=scores[2],
        score_zero_ablated=scores[3],
        score_change_spliced=change_spliced,
        score_change_mean_ablated=change_mean,
        score_change_zero_ablated=change_zero,
        score_recovered=_recovered(change_spliced, change_mean),
        score_recovered_zero=_recovered(change_spliced, change_zero),
    )


def _outcome(
    model: Model, score: Score, batch: Batch, cached: CachedResidual, interventions: Mapping[str, Intervention]
) -> Outcome:
    losses, logits = losses_and_last_logits(model, batch, interventions, cached)
    return Outcome(losses, score(logits, batch))


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(*(torch.cat(parts) for parts in zip(*outcomes, strict=True)))


def _replacing(
    dictionary: Dictionary, batch: Batch, function: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Intervention]:
    """Put a function of what is written and of what is read in the place of what is written."""
    read: dict[str, Tensor] = {}

    def replace(activation: Tensor) -> Tensor:
        x, encoded = (each[batch.touchable].float() for each in (activation, read.get(dictionary.reads, activation)))
        return activation.masked_scatter(batch.touchable[..., None], function(x, encoded).to(activation.dtype))

    recorders = {} if dictionary.reads == dictionary.site else {dictionary.reads: recorder(read, dictionary.reads)}
    return {**recorders, dictionary.site: replace}


def _mean(values: Float[Tensor, " n"]) -> float:
    return float(values.double().mean())


def _recovered(damage_spliced: float, damage_ablated: float) -> float:
    """The share of an ablation's damage that splicing does not do."""
    return 1 - damage_spliced / damage_ablated if damage_ablated > MIN_DAMAGE else float("nan")
