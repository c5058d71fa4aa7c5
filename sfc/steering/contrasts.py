"""Two sides of prompts, equally many on each, whose difference of means is a direction.

toxic-safe        what the data set expects: toxic prompts against safe and hard ones
refused-complied  what the model did: judged refusals against compliances
hard-score        among hard prompts alone: the upper half by refusal score against the lower half
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from sfc.config_study import ContrastKind
from sfc.errors import UserError
from sfc.prompts.keyed import keyed_numbers

_FEWEST = 4


class Contrast(NamedTuple):
    """Rows of a recording, and on which side each stands."""

    rows: Int[np.ndarray, " chosen"]
    positive: Bool[np.ndarray, " chosen"]

    def among(self, wanted: Bool[np.ndarray, " prompts"]) -> "Contrast":
        """The contrast without the rows that are not wanted."""
        kept = wanted[self.rows]
        return Contrast(self.rows[kept], self.positive[kept])

    def shuffled(self, seed: int) -> "Contrast":
        """The same rows, dealt to the two sides by lot."""
        return Contrast(self.rows, np.random.default_rng(seed).permutation(self.positive))


def make_contrast(
    kind: ContrastKind,
    prompts: pd.DataFrame,
    scores: Float[np.ndarray, " prompts"],
    refused: Bool[np.ndarray, " prompts"] | None,
    seed: int,
) -> Contrast:
    """Choose the rows of each side; of the longer side, some by hash.

    Args:
        prompts: `prompt`, `dataset_type` and `refusal_label`, a row per prompt.
        refused: judged replies; only `refused-complied` asks for them.

    Raises:
        UserError: a side has fewer than four prompts.
    """
    toxic = prompts["refusal_label"].to_numpy(dtype=bool)
    if kind == "toxic-safe":
        sides = toxic, ~toxic
    elif kind == "refused-complied":
        if refused is None:
            raise ValueError("refused-complied needs judged replies")
        sides = refused, ~refused
    else:
        hard = (prompts["dataset_type"] == "hard").to_numpy()
        middle = np.median(scores[hard]) if hard.any() else 0.0
        sides = hard & (scores > middle), hard & (scores < middle)
    size = min(int(side.sum()) for side in sides)
    if size < _FEWEST:
        raise UserError(
            f"the contrast {kind} has {int(sides[0].sum())} against {int(sides[1].sum())} discovery prompts, and needs"
            f" {_FEWEST} on each side: raise --set steering.prompts=…, or choose other --contrasts"
        )
    numbers = keyed_numbers(prompts["prompt"], f"contrast {kind} {seed}")
    chosen = [np.flatnonzero(side)[np.argsort(numbers[side], kind="stable")[:size]] for side in sides]
    return Contrast(np.concatenate(chosen), np.repeat([True, False], size))
