"""One run of the prompts that directions are learned from, recorded at all sites that matter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.models.batches import PACKED_TOKENS
from sfc.models.interventions import recorder
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.models.tails import make_tails
from sfc.prompts.render import TokenizedPrompt


@dataclass(frozen=True)
class Recording:
    """Activations at the last tokens of prompts; every direction is learned from these."""

    prompts: pd.DataFrame
    """`prompt`, `category`, `dataset_type`, `refusal_label`, a row per prompt"""
    tokenized: list[TokenizedPrompt]
    scores: Float[np.ndarray, " prompts"]
    activations: dict[str, Float[Tensor, "prompts token d_model"]]
    """by site, in float32, on the CPU; the last token comes last"""

    @property
    def n_tokens(self) -> int:
        return next(iter(self.activations.values())).shape[1]

    def at(self, site: str, token: int) -> Float[Tensor, "prompts d_model"]:
        """The activations at one token, counted from the end (-1 is the last), in float64."""
        return self.activations[site][:, token].double()

    def norm(self, site: str) -> float:
        """Mean norm of the residual stream over prompts and recorded tokens: the unit of a dial's `alpha`."""
        return float(self.activations[site].double().norm(dim=-1).mean())


@torch.no_grad()
def record(
    model: Model,
    prompts: pd.DataFrame,
    tokenized: Sequence[TokenizedPrompt],
    sites: Sequence[str],
    n_tokens: int,
    progress: Callable[[int], object] = lambda prompts: None,
) -> Recording:
    """Run the prompts once and keep the last `n_tokens` tokens at each site.

    Args:
        progress: called with the number of prompts done since the last call.

    Raises:
        UserError: the model has no such site.
    """
    score = RefusalScore.of(model)
    scores = np.empty(len(tokenized))
    kept = {site: torch.empty(len(tokenized), n_tokens, model.d_model) for site in sites}
    rows = max(1, PACKED_TOKENS // max(len(prompt.ids) for prompt in tokenized))
    order = sorted(range(len(tokenized)), key=lambda i: len(tokenized[i].ids))
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        seen: dict[str, Tensor] = {}
        tails = make_tails(model, [tokenized[i] for i in part], n_tokens)
        logits = last_logits(model, tails, {site: recorder(seen, site) for site in sites})
        scores[part] = score(logits).cpu().numpy()
        for site, activation in seen.items():
            kept[site][part] = activation.float().cpu()
        progress(len(part))
    return Recording(prompts.reset_index(drop=True), list(tokenized), scores, kept)
