"""Scores: what a model is about to say, as a differentiable scalar per prompt.

Log-odds say how strongly it is about to open its reply with some tokens, such as those of a refusal; the answer
difference says which of two answers it prefers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor

from sfc.core.errors import UserError
from sfc.models.batches import Batch, TemplateLayout
from sfc.models.interventions import Intervention
from sfc.models.model import Model, not_finite
from sfc.models.running import CachedResidual, last_logits


class Score(Protocol):
    """What circuits are found and judged by: a number per prompt, from the logits at its last position."""

    def __call__(self, logits: Float[Tensor, "batch vocab"], batch: Batch, /) -> Float[Tensor, " batch"]:
        """The score of each row of the batch, in nats. Differentiable."""
        ...


@dataclass(frozen=True)
class LogOdds:
    """Token ids whose logits at the last prompt position make the score.

    With `against` empty, the log-odds of the tokens T: `logsumexp(log p over T) - logsumexp(log p over all others)`.
    Otherwise `logsumexp(T) - logsumexp(against)`, which for one token each is the plain logit difference.
    """

    tokens: Int[Tensor, " n_tokens"]
    against: Int[Tensor, " n_against"]

    @classmethod
    def of_tokens(cls, model: Model, tokens: Sequence[str], against: Sequence[str] = ()) -> Self:
        """The score of tokens by their texts.

        Raises:
            UserError: a text is not one token of this model.
        """
        ids = [_single_tokens(model, texts) for texts in (tokens, against)]
        return cls(*(torch.tensor(i, dtype=torch.long, device=model.device) for i in ids))

    def __call__(self, logits: Float[Tensor, "batch vocab"], _batch: Batch | None = None, /) -> Float[Tensor, " batch"]:
        """The score of each row, in nats, whatever its prompt. Differentiable."""
        wanted = logits[:, self.tokens].logsumexp(-1)
        if len(self.against):
            return wanted - logits[:, self.against].logsumexp(-1)
        return wanted - logits.index_fill(-1, self.tokens, -torch.inf).logsumexp(-1)


class RefusalScore(LogOdds):
    """The log-odds of the tokens that open a refusal (Arditi et al. 2024)."""

    @classmethod
    def of(cls, model: Model) -> Self:
        """The score of the tokens that the model's configuration names.

        Raises:
            UserError: a token of it is not one token of this model.
        """
        return cls.of_tokens(model, model.config.refusal_tokens, model.config.against_tokens)


@dataclass(frozen=True)
class AnswerDifference:
    """The logit of the one answer less that of the other, each pair of prompts having its own two answers.

    A row's pair is that of the reference it is compared with: its template positions are those of the pair's table.
    """

    layout: TemplateLayout
    answers: Int[Tensor, "pairs 2"]
    """token ids"""

    def __call__(self, logits: Float[Tensor, "batch vocab"], batch: Batch, /) -> Float[Tensor, " batch"]:
        """The score of each row, in nats. Differentiable."""
        own, other = logits.gather(1, self.answers[batch.tables(self.layout)]).unbind(1)
        return own - other


@dataclass(frozen=True)
class DirectedScore:
    """A score as each row's own side would have it: negated where a higher one speaks for the other side.

    Rows are pairs of a prompt and its counterfactual. Under this score a prompt is above its counterfactual wherever
    the model tells the two sides apart, whichever of them it is on, so that effects, faithfulness and completeness add
    up over both directions.
    """

    score: Score
    direction: Float[Tensor, " pairs"]
    """1 where the prompt of a pair is of the positive side, -1 where it is of the negative"""

    def __call__(self, logits: Float[Tensor, "batch vocab"], batch: Batch, /) -> Float[Tensor, " batch"]:
        """The score of each row, in nats. Differentiable.

        Raises:
            ValueError: the rows are not pairs.
        """
        if batch.pair is None:
            raise ValueError("a directed score is of pairs; these prompts have no counterfactuals")
        return self.direction[batch.pair] * self.score(logits, batch)


def _single_tokens(model: Model, tokens: Sequence[str]) -> list[int]:
    ids = []
    for token in tokens:
        encoded = model.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(encoded) != 1:
            pieces = model.tokenizer.convert_ids_to_tokens(encoded)
            raise UserError(
                f"the score's token {token!r} is {len(encoded)} tokens of this model ({pieces}); name single tokens"
            )
        ids.extend(encoded)
    return sorted(set(ids))


def score_batch(
    model: Model,
    score: Score,
    batch: Batch,
    interventions: Mapping[str, Intervention] | None = None,
    cached: CachedResidual | None = None,
) -> Float[Tensor, " batch"]:
    """The score of each prompt of a batch; arguments as `last_logits`."""
    return score(last_logits(model, batch, interventions, cached), batch)


@torch.no_grad()
def score_prompts(model: Model, score: Score, batches: Sequence[Batch]) -> Float[np.ndarray, " prompts"]:
    """Scores of all prompts of the batches, in the order of the list that was batched.

    Raises:
        UserError: one is not finite.
    """
    scores = np.full(sum(len(batch.prompts) for batch in batches), np.nan)
    for batch in batches:
        scores[batch.prompts.cpu().numpy()] = score_batch(model, score, batch).cpu().numpy()
    if not np.isfinite(scores).all():
        raise not_finite("the scores of some prompts", model.dtype)
    return scores


def auroc(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> float | None:
    """Probability that a positive scores above a negative, ties counted half; None where one side is empty."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    rank_sum = rankdata(scores)[labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))
