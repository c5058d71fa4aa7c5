"""The refusal logit difference: a linear stand-in for the refusal score, which only a linear target can be split into.

The refusal score is a log-odds, and no sum of parts. Its linear relative is the mean logit of the refusal-opening
tokens minus the mean logit of the tokens with which the model opens its answers when it complies: those that
`model.against_tokens` names, else the ones it finds most likely after harmless prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfc.models.batches import Batch
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore

N_AGAINST = 10


@dataclass(frozen=True)
class LogitDifference:
    """Mean over the tokens `refusal` minus mean over the tokens `against`."""

    refusal: Int[Tensor, " n_refusal"]
    against: Int[Tensor, " n_against"]

    def __call__(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
        """The difference along the last axis. Linear: of logits it is in nats, of the columns of the unembedding
        [d_model, vocab] it is the direction in the residual stream that it reads."""
        return logits[..., self.refusal].mean(-1) - logits[..., self.against].mean(-1)

    def tokens(self, model: Model) -> dict[str, list[str]]:
        """Both sets of tokens as text, for people and manifests."""
        sides = {"refusal": self.refusal, "against": self.against}
        return {name: [model.tokenizer.decode([token]) for token in ids.tolist()] for name, ids in sides.items()}


@torch.no_grad()
def refusal_logit_difference(model: Model, harmless: Sequence[Batch], count: int = N_AGAINST) -> LogitDifference:
    """The difference that the model's configuration names, or that its own answers to harmless prompts suggest.

    Args:
        harmless: prompts that the model answers; not read where the configuration has `against_tokens`.
        count: how many tokens to take from the mean distribution of the first token of those answers.

    Raises:
        UserError: a configured token is not one token of this model.
    """
    score = RefusalScore.of(model)
    if len(score.against):
        return LogitDifference(score.refusal, score.against)
    likely = torch.stack([last_logits(model, batch).softmax(-1).sum(0) for batch in harmless]).sum(0)
    return LogitDifference(score.refusal, likely.index_fill(0, score.refusal, -1.0).topk(count).indices.sort().values)
