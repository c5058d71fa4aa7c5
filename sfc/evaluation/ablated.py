"""Scores of many circuits on the same prompts, in packed batches that share their cached prefixes."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float

from sfc.ablation.ablate import Ablation
from sfc.circuits.problem import PromptRuns
from sfc.models.batches import PACKED_TOKENS
from sfc.models.loading import Model
from sfc.models.score import Score, score_batch


@torch.no_grad()
def ablated_scores(
    model: Model,
    score: Score,
    ablation: Ablation,
    runs: PromptRuns,
    keep: Bool[np.ndarray, "circuits nodes"],
    progress: Callable[[int], None] = lambda _steps: None,
) -> Float[np.ndarray, "circuits prompts"]:
    """The score of every prompt with everything outside each circuit ablated.

    Several circuits go through in one batch, `PACKED_TOKENS` tokens at a time.

    Args:
        keep: the nodes of each circuit.
        progress: called with the number of circuit-and-batch pairs done since the last call.
    """
    scores = np.full((len(keep), runs.n_prompts), np.nan)
    for batch, prefix in runs:
        at_once = batch.copies_in(PACKED_TOKENS)
        of_batch = ablation.for_batch(model, batch, prefix)
        for first in range(0, len(keep), at_once):
            masks = torch.from_numpy(keep[first : first + at_once]).to(model.device, torch.float32)
            packed = batch.repeat(len(masks))
            circuit = torch.arange(len(masks), device=model.device).repeat_interleave(len(batch.lengths))
            interventions = of_batch.interventions(masks, circuit, packed)
            result = score_batch(model, score, packed, interventions, prefix.repeat(len(masks)))
            columns = batch.prompts.cpu().numpy()
            scores[first : first + len(masks), columns] = result.view(len(masks), -1).cpu().numpy()
            progress(len(masks))
    return scores


@torch.no_grad()
def full_scores(model: Model, score: Score, runs: PromptRuns) -> Float[np.ndarray, " prompts"]:
    """The score of every prompt in the model as it is."""
    scores = np.full(runs.n_prompts, np.nan)
    for batch, prefix in runs:
        scores[batch.prompts.cpu().numpy()] = score_batch(model, score, batch, prefix=prefix).cpu().numpy()
    return scores
