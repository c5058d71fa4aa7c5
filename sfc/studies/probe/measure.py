"""Where the model tells the two sides of prompts apart: the direction between them at each layer, and a linear probe.

The direction is the difference of the two sides' mean residual streams at the last prompt position, where the model
decides (Arditi et al. 2024). It is taken from one set of prompts and judged on another. The probe says what any
direction could do: ridge regression on labels of -1 and 1, always judged on prompts it was not fitted to. With labels
shuffled, the same procedure says what it finds where there is nothing (Hewitt and Liang 2019).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.behaviors.behavior import Words
from sfc.core.artifacts import json_records, write_csv
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar
from sfc.core.sites import site_of
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention
from sfc.models.loading import Model
from sfc.models.running import run_to
from sfc.models.score import auroc
from sfc.session import Session
from sfc.stats import DRAWS, Interval, resampled_counts, wilson
from sfc.studies.collect.fill import batched
from sfc.studies.probe import Probe
from sfc.studies.study import Made

SHUFFLES = 200
_FOLDS = 5
_PENALTY = 1.0
"""of the ridge regression, in units of a row's mean square"""


@torch.no_grad()
def measure(study: Probe, session: Session, folder: Path) -> Made:
    """Run one category's prompts, or all, once, and measure every layer.

    Raises:
        UserError: a side lacks prompts.
    """
    experiment, model = session.run.experiment, session.model
    category = session.run.group(study.of(session.run).category)
    prompts, batches = batched(session, session.run.balanced(category))
    _check_sides(prompts, session.run.behavior.words)
    with progress_bar("running", len(prompts), "prompts") as progress:
        residuals = last_residuals(model, batches, progress)
    positive = prompts["refusal_label"].to_numpy(dtype=bool)
    layers = probe_table(residuals, positive, prompts["split"].tolist(), experiment.seed)
    write_csv(folder / study.files["layers"], layers, digits=6)
    counts = prompts["split"].value_counts()
    return Made(
        {
            "preset": experiment.name,
            "category": category,
            "n_prompts": len(prompts),
            "n_discovery": int(counts["discovery"]),
            "n_test": int(counts["test"]),
            "n_folds": n_folds(positive),
            "n_shuffles": SHUFFLES,
            "layers": json_records(layers),
        }
    )


def _check_sides(prompts: pd.DataFrame, words: Words) -> None:
    for split in ("discovery", "test"):
        positive = prompts.loc[prompts["split"] == split, "refusal_label"].astype(bool)
        for side, count in ((words.positive, positive.sum()), (words.negative, (~positive).sum())):
            if count < 2:
                raise UserError(f"a direction needs two {side} {split} prompts that are short enough, not {count}")


def last_residuals(
    model: Model, batches: Sequence[Batch], progress: Callable[[int], None]
) -> Float[np.ndarray, "layers prompts d_model"]:
    """The residual stream after every block at the last position of each prompt, in the order that was batched.

    Args:
        progress: called with the number of prompts done since the last call.
    """
    sites = [site_of("resid_post", layer) for layer in range(model.n_layers)]
    residuals = np.empty((len(sites), sum(len(batch.prompts) for batch in batches), model.d_model), dtype=np.float32)
    for batch in batches:
        keeping = {site: _keep_last(residuals[layer], batch) for layer, site in enumerate(sites)}
        run_to(model, batch, keeping, sites[-1])
        progress(len(batch.prompts))
    return residuals


def _keep_last(into: Float[np.ndarray, "prompts d_model"], batch: Batch) -> Intervention:
    rows, prompts = torch.arange(len(batch.prompts), device=batch.prompts.device), batch.prompts.cpu().numpy()

    def keep(activation: Tensor) -> None:
        into[prompts] = activation[rows, batch.lengths - 1].float().cpu().numpy()

    return keep


def probe_table(
    residuals: Float[np.ndarray, "layers prompts d_model"],
    positive: Bool[np.ndarray, " prompts"],
    split: Sequence[str],
    seed: int,
) -> pd.DataFrame:
    """One row per layer.

    Columns: `layer`; of the direction, which is of unit length and comes from the prompts of the split `discovery`:
    `norm` of the difference of means and `relative_norm`, its share of the residual streams' mean norm; on the prompts
    of the split `test`, `separation` with `separation_low` and `separation_high` (95 % bootstrap) and `auroc`; of the
    probe, over all prompts: `accuracy`, `accuracy_low`, `accuracy_high` (Wilson, 95 %), and of probes with shuffled
    labels `control` (mean accuracy), `control_high` (95th percentile) and `p_value`.

    Raises:
        ValueError: discovery or test prompts lack a side.
    """
    discovery, test = (np.array(split) == name for name in ("discovery", "test"))
    rows = []
    for layer, of_layer in enumerate(residuals.astype(np.float64)):
        difference = difference_of_means(of_layer[discovery], positive[discovery])
        norm = float(np.linalg.norm(difference))
        projections = of_layer[test] @ (difference / (norm or 1.0))
        ends = separation_interval(projections, positive[test], seed)
        probe = cross_validated_probe(of_layer, positive, seed)
        rows.append(
            {
                "layer": layer,
                "norm": norm,
                "relative_norm": norm / float(np.linalg.norm(of_layer[discovery], axis=1).mean()),
                "separation": separation(projections, positive[test]),
                "separation_low": ends.low,
                "separation_high": ends.high,
                "auroc": auroc(projections, positive[test]),
                **probe._asdict(),
            }
        )
    return pd.DataFrame(rows)


def difference_of_means(
    rows: Float[np.ndarray, "n d_model"], positive: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " d_model"]:
    """Mean of the positive rows minus mean of the others.

    Raises:
        ValueError: one side is empty.
    """
    if positive.all() or not positive.any():
        raise ValueError("a difference of means needs both sides")
    return rows[positive].mean(0) - rows[~positive].mean(0)


def separation(projections: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float | None:
    """Distance of the two sides' means in pooled standard deviations (Cohen's d); None where nothing varies."""
    sides = projections[positive], projections[~positive]
    squares = sum(((side - side.mean()) ** 2).sum() for side in sides)
    if squares == 0 or len(projections) < 3:
        return None
    return float((sides[0].mean() - sides[1].mean()) / np.sqrt(squares / (len(projections) - 2)))


def separation_interval(projections: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], seed: int) -> Interval:
    """Ends of the 95 % interval of `separation`: percentiles over both sides drawn again; NaN where nothing varies."""
    random = np.random.default_rng(seed)
    means, squares = [], 0.0
    for side in (projections[positive], projections[~positive]):
        weights = resampled_counts(len(side), DRAWS, random)
        centred = side - side.mean()
        means.append(weights @ centred / len(side))
        squares = squares + weights @ centred**2 - len(side) * means[-1] ** 2
    gap = projections[positive].mean() - projections[~positive].mean()
    pooled = np.sqrt(np.maximum(squares, 0) / max(len(projections) - 2, 1))
    varies = pooled > 0
    if not varies.any():
        return Interval(np.nan, np.nan)
    low, high = np.percentile(((gap + means[0] - means[1])[varies] / pooled[varies]), [2.5, 97.5])
    return Interval(float(low), float(high))


class FoldedProbe(NamedTuple):
    """Accuracy of a linear probe on prompts it was not fitted to, and of the same with shuffled labels."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    control: float
    control_high: float
    p_value: float


def cross_validated_probe(
    rows: Float[np.ndarray, "n d_model"], positive: Bool[np.ndarray, " n"], seed: int
) -> FoldedProbe:
    """Fit on all folds but one, judge on that one, in turn; the features are standardised by the rows fitted to.

    Labels are shuffled within folds, so that every fold keeps as many of either side: were a side overrepresented where
    the probe is fitted, it would be underrepresented where it is judged, and chance would lie below one half.

    Raises:
        ValueError: a side has fewer than two rows.
    """
    random = np.random.default_rng(seed)
    folds = stratified_folds(positive, random)
    signs = np.where(positive, 1.0, -1.0)
    labels = np.stack([signs, *(_shuffled_within(signs, folds, random) for _ in range(SHUFFLES))], 1)
    predicted = np.empty_like(labels)
    for fold in np.unique(folds):
        held_out = folds == fold
        predicted[held_out] = ridge(rows[~held_out], labels[~held_out], rows[held_out])
    hits = (predicted > 0) == (labels > 0)
    accuracy, *shuffled = hits.mean(0).tolist()
    at_least = sum(value >= accuracy for value in shuffled)
    return FoldedProbe(
        accuracy,
        *wilson(int(hits[:, 0].sum()), len(rows)),
        float(np.mean(shuffled)),
        float(np.quantile(shuffled, 0.95)),
        (at_least + 1) / (SHUFFLES + 1),
    )


def n_folds(positive: Bool[np.ndarray, " n"]) -> int:
    """How many folds there are: five, or as many as the smaller side has rows."""
    return int(min(_FOLDS, positive.sum(), (~positive).sum()))


def stratified_folds(positive: Bool[np.ndarray, " n"], random: np.random.Generator) -> Int[np.ndarray, " n"]:
    """A fold for each row, at random; each has its share of both sides.

    Raises:
        ValueError: a side has fewer than two rows.
    """
    count = n_folds(positive)
    if count < 2:
        raise ValueError("cross-validation needs two rows of either side")
    folds = np.empty(len(positive), dtype=np.int64)
    for side in (positive, ~positive):
        folds[side] = random.permutation(int(side.sum())) % count
    return folds


def ridge(
    rows: Float[np.ndarray, "n d"], labels: Float[np.ndarray, "n labellings"], others: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "m labellings"]:
    """Predictions for other rows by ridge regression of each labelling, all from one factorisation (the dual form)."""
    mean, deviation = rows.mean(0), rows.std(0)
    scale = np.where(deviation > 1e-12 * np.abs(rows).max(0), deviation, np.inf) * np.sqrt(rows.shape[1])
    fitted, wanted = (rows - mean) / scale, (others - mean) / scale
    kernel = fitted @ fitted.T + _PENALTY * np.eye(len(rows))
    return labels.mean(0) + wanted @ fitted.T @ np.linalg.solve(kernel, labels - labels.mean(0))


def _shuffled_within(
    values: Float[np.ndarray, " n"], folds: Int[np.ndarray, " n"], random: np.random.Generator
) -> Float[np.ndarray, " n"]:
    shuffled = values.copy()
    for fold in np.unique(folds):
        shuffled[folds == fold] = random.permutation(values[folds == fold])
    return shuffled
