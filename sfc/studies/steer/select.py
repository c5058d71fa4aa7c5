"""Which direction to steer along: candidates tried on prompts that they were not learned from.

As in Arditi et al. 2024, a good direction induces the behavior on safe prompts when the dial is turned up, removes it
from toxic ones when it is turned down, and turning it down hardly changes what comes after safe prompts. They turn it
down by projecting the direction out, and so does `project-out`; `add` and `clamp` subtract. Candidates that fail a
requirement are rejected, with the reason; of the others the one is chosen whose dial has the widest swing: induced -
removed.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.core.errors import UserError
from sfc.core.sites import kind_of, layer_of
from sfc.data.schema import keyed_ranks
from sfc.models import engine
from sfc.models.edits import SteeringEdit
from sfc.models.engine import PreparedPrompts, Progress
from sfc.session import Session
from sfc.studies.steer import SteeringOptions
from sfc.studies.steer.dial import Candidate, Dial
from sfc.studies.steer.directions import Vector, cosine
from sfc.studies.steer.learning import Learned
from sfc.studies.steer.prompts import prepared


class Fold(NamedTuple):
    """Prompts that a direction was not learned from."""

    safe: PreparedPrompts
    toxic: PreparedPrompts


def folds_of(session: Session, learned: Learned) -> list[Fold]:
    """For each fold, some of its safe and toxic prompts, ready to be steered."""
    options = SteeringOptions.of(session.run.experiment)
    toxic = learned.recording.prompts["refusal_label"].to_numpy(dtype=bool)
    place = keyed_ranks(learned.recording.prompts, ["refusal_label"], f"fold {session.run.experiment.seed}").to_numpy()
    # Prompts are dealt to folds by place, so that the first places hold equally many of each fold.
    tried = place < max(options.tried_prompts, options.folds)

    def some(side: np.ndarray, number: int) -> PreparedPrompts:
        chosen = np.flatnonzero(side & tried & (learned.fold == number))
        return prepared(session, [learned.recording.tokenized[i] for i in chosen])

    return [Fold(some(~toxic, number), some(toxic, number)) for number in range(options.folds)]


def candidate_table(
    dial: Dial, candidates: Sequence[Candidate], folds: Sequence[Fold], progress: Progress
) -> pd.DataFrame:
    """What each candidate does, in the order of the candidates, by the edit that the dial will use.

    Columns: `site`, `kind`, `layer`, `token`; `length`, of the direction in units of the residual norm;
    `agreement`, the mean cosine between the folds' directions; `induced`, the mean score of safe prompts with the dial
    turned up; `removed`, that of toxic prompts with it turned down; `kl` under the same of the next token after safe
    prompts that are about to be answered (of others, turning down shall change it); `rejected`, the reason or blank.

    Args:
        progress: called with the number of runs done since the last call: `3 * candidates * prompts per side`.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("induced", "removed", "kl")}
    answered = dial.plain_scores([fold.safe for fold in folds]) < 0
    for number, (safe, toxic) in enumerate(folds):
        up, down = ([_tried(dial, each, number, up) for each in candidates] for up in (True, False))
        columns["induced"].append(dial.scores(safe, up, progress))
        columns["removed"].append(dial.scores(toxic, down, progress))
        columns["kl"].append(engine.next_token_kl(safe, dial.steering(down), progress))
    joined = {name: np.concatenate(parts, axis=1) for name, parts in columns.items()}
    figures = {name: values[:, answered if name == "kl" else slice(None)].mean(1) for name, values in joined.items()}
    facts = [
        {
            "site": candidate.site,
            "kind": kind_of(candidate.site),
            "layer": layer_of(candidate.site),
            "token": candidate.token,
            "length": candidate.length,
            "agreement": _agreement(candidate.by_fold),
        }
        for candidate in candidates
    ]
    table = pd.DataFrame(facts).assign(**figures)
    return table.assign(rejected=[_reason(row, dial) for row in table.to_dict("records")])


def _tried(dial: Dial, candidate: Candidate, fold: int, up: bool) -> SteeringEdit:
    """The edit that turns a candidate's dial up or down; up is an addition also where down is a projection."""
    vector, edit = candidate.by_fold[fold], dial.options.edit
    if edit == "project-out" and not up:
        return SteeringEdit("project-out", dial.sites(candidate.site), vector, 1.0)
    amount = dial.options.tried_alpha * candidate.norm
    return SteeringEdit("clamp" if edit == "clamp" else "add", (candidate.site,), vector, amount if up else -amount)


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The candidates that are not rejected, the best first.

    Raises:
        UserError: all are rejected.
    """
    swing = table["induced"] - table["removed"]
    kept = table.assign(swing=swing)[table["rejected"] == ""].sort_values("swing", ascending=False, kind="stable")
    if kept.empty:
        reasons = table["rejected"].str.split(" (", regex=False).str[0].value_counts()
        raise UserError(
            f"no direction passes, of {len(table)}: {'; '.join(f'{n} {why}' for why, n in reasons.items())}; loosen"
            " --set steering.min_induced=…, steering.max_kl=… or steering.latest=…, or learn from more prompts"
        )
    return kept


def best_per_layer(kept: pd.DataFrame, n_layers: int) -> list[int]:
    """The best candidate of each of the layers with the best ones, by index, in the order of the layers."""
    best = kept.drop_duplicates("layer").head(n_layers)
    return [int(i) for i in best.sort_values("layer").index]


def _agreement(vectors: Sequence[Vector]) -> float:
    return float(np.mean([cosine(*pair) for pair in combinations(vectors, 2)]))


def _reason(row: dict, dial: Dial) -> str:
    options, n_layers = dial.options, dial.model.n_layers
    if row["layer"] >= options.latest * n_layers:
        return f"acts too late (layer {row['layer']} of {n_layers})"
    if not row["induced"] > options.min_induced:
        return f"induces too little (mean score {row['induced']:.2f})"
    if not row["kl"] <= options.max_kl:
        return f"changes safe prompts (KL {row['kl']:.3f})"
    return ""
