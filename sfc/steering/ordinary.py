"""What steering costs on text that has nothing to do with refusing: replies that the base model gives to safe prompts.

The replies are given, not generated: their cross-entropy, and how far the distribution of each token moves. What is
steered is what the dial steers when it is used, so that the opening token, which a forced refusal replaces, counts.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sfc.models.batches import PACKED_TOKENS
from sfc.models.generation import generate_ids
from sfc.models.loading import Model
from sfc.prompts.render import Role, TokenizedPrompt
from sfc.steering.bench import Bench, Progress, effect_on_replies
from sfc.steering.sweep import Setting


def with_replies(base: Model, prompts: Sequence[TokenizedPrompt], reply_tokens: int) -> list[TokenizedPrompt]:
    """The prompts with a model's greedy replies after them."""
    replies = generate_ids(base, prompts, reply_tokens, PACKED_TOKENS)
    return [
        TokenizedPrompt(
            np.concatenate([prompt.ids, np.array(reply, dtype=prompt.ids.dtype)]),
            np.concatenate([prompt.roles, np.full(len(reply), Role.REPLY)]),
        )
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


def ordinary_effect(bench: Bench, settings: Sequence[Setting], progress: Progress) -> pd.DataFrame:
    """One row per setting.

    Columns: `direction`, `site`, `alpha`; `loss`, the mean cross-entropy of reply tokens in nats, and `plain_loss` of
    the model as it is; `loss_rise`, the share by which it rises; `later_loss_rise`, the same without the opening
    tokens; `kl`, the mean divergence per token.

    Args:
        bench: prompts with replies, as `with_replies` makes them.
    """
    effect = effect_on_replies(bench, [each.edit for each in settings], progress)
    losses, later = effect.losses.mean(1), effect.losses[:, ~effect.is_first].mean(1)
    return pd.DataFrame(
        {
            "direction": [each.name for each in settings],
            "site": [each.site for each in settings],
            "alpha": [each.alpha for each in settings],
            "loss": losses[1:],
            "plain_loss": losses[0],
            "loss_rise": losses[1:] / losses[0] - 1,
            "later_loss_rise": later[1:] / later[0] - 1,
            "kl": effect.divergence[1:].mean(1),
        }
    )
