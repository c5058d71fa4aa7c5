"""What a dial's effect is worth: the same edit along directions that should do nothing, at the same amount."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.config_study import SteeringConfig
from sfc.steering.bench import Bench, plain_scores, steered_scores
from sfc.steering.directions import Vector, cosine, in_span, random_directions, span_share
from sfc.steering.edits import Edit
from sfc.steering.select import Candidate, Fold
from sfc.steering.sweep import Setting, setting

SHUFFLED, RANDOM = "shuffled labels", "random"


def control_settings(
    bench: Bench,
    candidate: Candidate,
    shuffled: Sequence[Vector],
    alphas: Sequence[float],
    config: SteeringConfig,
    seed: int,
) -> list[Setting]:
    """At each alpha, directions beside the candidate's, of equal norm: shuffled labels', and random ones."""
    others = {f"{SHUFFLED} {number}": vector for number, vector in enumerate(shuffled)}
    drawn = random_directions(config.random_directions, len(candidate.vector), seed)
    others |= {f"{RANDOM} {number}": vector for number, vector in enumerate(drawn)}
    return [
        setting(bench, candidate, alpha, config, vector, name) for alpha in alphas for name, vector in others.items()
    ]


class Band(NamedTuple):
    """Where the directions of a control end up."""

    mean: float
    low: float
    high: float


def band(table: pd.DataFrame, control: str, column: str) -> Band:
    """Mean and extremes over the directions of a control, `RANDOM` or `SHUFFLED`; not numbers where it has none.

    Args:
        table: with a column `direction`, the control's name and a number.
    """
    values = table.loc[table["direction"].str.startswith(control), column].astype(float)
    return Band(float(values.mean()), float(values.min()), float(values.max()))


def subspace_table(
    directions: Mapping[str, Vector], candidate: Candidate, folds: Sequence[Fold], alpha: float
) -> pd.DataFrame:
    """How much of each direction, and of its effect, lies in the span of the others.

    Columns: `direction`, `cosine` with the candidate's, `length` in units of the residual norm, `span_share` (of its
    squared length), `effect` (mean change of the safe prompts' score, in nats, with the whole added at `alpha`),
    `effect_in_span` and `effect_outside` (with its part in the span, and with the rest, each at its share of the
    amount). The two parts' effects need not sum to the whole's: the model is not linear.
    """
    rows = []
    plain = np.concatenate([plain_scores(fold.safe) for fold in folds])
    for name, vector in directions.items():
        others = [other for key, other in directions.items() if key != name]
        inside = in_span(vector, others)
        parts = [vector, inside, vector - inside]
        lengths = [float(part.norm() / vector.norm()) for part in parts]
        edits = [
            # A part of no length has no direction, and an amount of zero along any other.
            Edit("add", (candidate.site,), part if length else vector, alpha * candidate.norm * length)
            for part, length in zip(parts, lengths, strict=True)
        ]
        scores = np.concatenate([steered_scores(fold.safe, edits) for fold in folds], axis=1)
        effects = (scores - plain).mean(1)
        rows.append(
            {
                "direction": name,
                "cosine": cosine(vector, candidate.vector),
                "length": float(vector.norm()) / candidate.norm,
                "span_share": span_share(vector, others),
                **dict(zip(("effect", "effect_in_span", "effect_outside"), effects.tolist(), strict=True)),
            }
        )
    return pd.DataFrame(rows)
