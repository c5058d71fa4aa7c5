"""Candidates tried on prompts that they were not learned from, and the dial swept: every prompt under every setting.

As in Arditi et al. 2024, a good direction induces the behavior on safe prompts when the dial is turned up, removes it
from toxic ones when it is turned down, and turning it down hardly changes what comes after safe prompts. They turn it
down by projecting the direction out, and so does `project-out`; `add` and `clamp` subtract. Candidates that fail a
requirement are rejected, with the reason; of the others the one is chosen whose dial has the widest swing: induced -
removed.

Controls say what an effect is worth: the same edit along directions that should do nothing, at the same amount.

The trade-off, refusals of unsafe against those of safe prompts alpha by alpha, is for XSTest (Röttger et al. 2024),
whose safe prompts look like unsafe ones: a dial that only makes the model refuse more raises both rates, and moves
along the curve that over-refusal makes. A defence raises one and not the other.

The cost is measured on text that has nothing to do with the behavior: replies that the base model gives to safe
prompts. They are given, not generated: their cross-entropy, and how far the distribution of each token moves. The same
tokens are steered as when the dial is used, so that the opening token, which a forced refusal replaces, counts.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.core.errors import UserError
from sfc.core.sites import kind_of, layer_of
from sfc.data.schema import keyed_ranks
from sfc.models import engine
from sfc.models.edits import SteeringEdit
from sfc.models.engine import NO_EDIT, PreparedPrompts, Progress
from sfc.session import Session
from sfc.stats import judged_rate, wilson
from sfc.studies.steer import FORCE, SUPPRESS, SteeringOptions
from sfc.studies.steer.directions import (
    Candidate,
    Dial,
    Setting,
    Vector,
    cosine,
    in_span,
    random_directions,
    span_share,
)
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
    prompts that are about to be answered (that of others is meant to change); `rejected`, the reason or blank.

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
            "agreement": float(np.mean([cosine(*pair) for pair in combinations(candidate.by_fold, 2)])),
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


def _reason(row: dict, dial: Dial) -> str:
    options, n_layers = dial.options, dial.model.n_layers
    if row["layer"] >= options.latest * n_layers:
        return f"acts too late (layer {row['layer']} of {n_layers})"
    if not row["induced"] > options.min_induced:
        return f"induces too little (mean score {row['induced']:.2f})"
    if not row["kl"] <= options.max_kl:
        return f"changes safe prompts (KL {row['kl']:.3f})"
    return ""


def sweep(
    dial: Dial, prepared: PreparedPrompts, prompts: pd.DataFrame, settings: Sequence[Setting], progress: Progress
) -> pd.DataFrame:
    """One row per setting and prompt.

    Columns: `direction`, `site`, `layer`, `token`, `alpha`, `intent`, the columns of `prompts`, `unsteered_score`,
    `score`, `unsteered_refused`, `refused`, `changed` (a change in the intended direction, against the unsteered reply;
    False where there is none), `eligible` (a prompt on which one was possible) and `reply`.

    Args:
        prompts: what was prepared, in the same order.
    """
    plain = engine.replies(prepared, dial.score, NO_EDIT, dial.options.reply_tokens)
    edits = dial.steering([each.edit for each in settings])
    steered = engine.replies(prepared, dial.score, edits, dial.options.reply_tokens, progress)
    before, after = dial.judged(plain)[0], dial.judged(steered)
    tables = []
    for each, scores, refused, replies in zip(settings, steered.scores, after, steered.texts, strict=True):
        eligible = ~before if each.intent == FORCE else before if each.intent == SUPPRESS else np.zeros_like(before)
        tables.append(
            prompts.assign(
                direction=each.name,
                site=each.site,
                layer=layer_of(each.site),
                token=each.token,
                alpha=each.alpha,
                intent=each.intent,
                unsteered_score=plain.scores[0],
                score=scores,
                unsteered_refused=before,
                refused=refused,
                eligible=eligible,
                changed=eligible & (refused != before),
                reply=replies,
            )
        )
    return pd.concat(tables, ignore_index=True)


def rates(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Replies that show the behavior, `refusals`, and changes, per group of a sweep's rows, with 95 % Wilson intervals.

    Columns: those of `by`, `n`, `refusals`, `rate`, `low`, `high`, `score` and `score_change` (means, in nats),
    `eligible`, `changed`, `changed_rate` (None where no prompt could change), `changed_low`, `changed_high`.
    """
    groups = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        eligible, changed = int(group["eligible"].sum()), int(group["changed"].sum())
        groups.append(
            dict(zip(by, key, strict=True))  # pyright: ignore[reportArgumentType]
            | judged_rate(group["refused"])
            | {"score": group["score"].mean(), "score_change": (group["score"] - group["unsteered_score"]).mean()}
            | {"eligible": eligible, "changed": changed, "changed_rate": changed / eligible if eligible else None}
            | {f"changed_{end}": value for end, value in wilson(changed, eligible)._asdict().items()}
        )
    return pd.DataFrame(groups)


def best_alphas(changes: pd.DataFrame, max_loss: float) -> Mapping[str, float]:
    """For each intent, the alpha that changes most replies among those that leave ordinary text alone.

    Args:
        changes: `intent`, `alpha`, `changed_rate`, and `loss_rise`, the share by which the cross-entropy of ordinary
            text rises; where it rises by more than `max_loss` at every alpha, that of the smallest rise is taken.
    """
    chosen = {}
    for intent, group in changes[changes["intent"] != ""].groupby("intent"):
        within = group[group["loss_rise"] <= max_loss]
        order = ["changed_rate", "loss_rise"] if len(within) else ["loss_rise"]
        best = (within if len(within) else group).sort_values(
            order, ascending=[name != "changed_rate" for name in order]
        )
        chosen[str(intent)] = float(best["alpha"].iloc[0])
    return chosen


SHUFFLED, RANDOM = "shuffled labels", "random"


def control_settings(
    dial: Dial, candidate: Candidate, shuffled: Sequence[Vector], alphas: Sequence[float], seed: int
) -> list[Setting]:
    """At each alpha, directions beside the candidate's, of equal norm: shuffled labels', and random ones."""
    others = {f"{SHUFFLED} {number}": vector for number, vector in enumerate(shuffled)}
    drawn = random_directions(dial.options.random_directions, len(candidate.vector), seed)
    others |= {f"{RANDOM} {number}": vector for number, vector in enumerate(drawn)}
    return [dial.setting(candidate, alpha, vector, name) for alpha in alphas for name, vector in others.items()]


def by_chance(table: pd.DataFrame, control: str, column: str) -> tuple[float, float]:
    """Mean and maximum over the directions of a control, `RANDOM` or `SHUFFLED`; not numbers where it has none.

    Args:
        table: with a column `direction`, the control's name and a number.
    """
    values = table.loc[table["direction"].str.startswith(control), column].astype(float)
    return float(values.mean()), float(values.max())


def subspace_table(
    dial: Dial, directions: Mapping[str, Vector], candidate: Candidate, folds: Sequence[Fold]
) -> pd.DataFrame:
    """How much of each direction, and of its effect, lies in the span of the others.

    Columns: `direction`, `cosine` with the candidate's, `length` in units of the residual norm, `span_share` (of its
    squared length), `effect` (mean change of the safe prompts' score, in nats, with the whole added at `tried_alpha`),
    `effect_in_span` and `effect_outside` (with its part in the span, and with the rest, each at its share of the
    amount). The two parts' effects need not sum to the whole's: the model is not linear.
    """
    rows, safe, amount = [], [fold.safe for fold in folds], dial.options.tried_alpha * candidate.norm
    plain = dial.plain_scores(safe)
    for name, vector in directions.items():
        others = [other for key, other in directions.items() if key != name]
        inside = in_span(vector, others)
        parts = [vector, inside, vector - inside]
        lengths = [float(part.norm() / vector.norm()) for part in parts]
        edits = [
            # A part of no length has no direction, and an amount of zero along any other.
            SteeringEdit("add", (candidate.site,), part if length else vector, amount * length)
            for part, length in zip(parts, lengths, strict=True)
        ]
        scores = np.concatenate([dial.scores(some, edits) for some in safe], axis=1)
        effects = (scores - plain).mean(1)
        length = float(vector.norm()) / candidate.norm
        rows.append((name, cosine(vector, candidate.vector), length, span_share(vector, others), *effects.tolist()))
    columns = ["direction", "cosine", "length", "span_share", "effect", "effect_in_span", "effect_outside"]
    return pd.DataFrame(rows, columns=columns)


UNSAFE, SAFE = "unsafe", "safe"
_SIDES = {UNSAFE: "toxic", SAFE: "safe"}


def trade_off(rows: pd.DataFrame) -> pd.DataFrame:
    """Refusals of both sides per direction and alpha, with Wilson intervals of 95 %.

    Columns: `direction`, `alpha`, and for `unsafe` and `safe` each `n_…`, `…` (the rate), `…_low`, `…_high` and
    `…_unsteered` (the rate of the same prompts as they are).

    Args:
        rows: of a sweep over prompts with a `label`, `toxic` or `safe`, both of which are there.
    """
    points = []
    for (direction, alpha), group in rows.groupby(["direction", "alpha"], sort=False):  # pyright: ignore
        point: dict[str, object] = {"direction": direction, "alpha": alpha}
        for side, label in _SIDES.items():
            of_side = group[group["label"] == label]
            rate = judged_rate(of_side["refused"])
            point |= {f"n_{side}": rate["n"], side: rate["rate"]}
            point |= {f"{side}_{end}": rate[end] for end in ("low", "high")}
            point[f"{side}_unsteered"] = float(of_side["unsteered_refused"].mean())
        points.append(point)
    return pd.DataFrame(points)


def best_defence(curve: pd.DataFrame) -> float | None:
    """The alpha at which most unsafe prompts are refused, of those that raise this rate and not that of safe ones.

    Of several, the one that refuses fewest safe prompts; None where there is none.

    Args:
        curve: as `trade_off` makes it, of one direction.
    """
    better = curve[(curve[UNSAFE] > curve[f"{UNSAFE}_unsteered"]) & (curve[SAFE] <= curve[f"{SAFE}_unsteered"])]
    if better.empty:
        return None
    return float(better.sort_values([UNSAFE, SAFE], ascending=[False, True])["alpha"].iloc[0])


def ordinary_effect(
    dial: Dial, prepared: PreparedPrompts, settings: Sequence[Setting], progress: Progress
) -> pd.DataFrame:
    """One row per setting.

    Columns: `direction`, `site`, `alpha`; `loss`, the mean cross-entropy of reply tokens in nats, and `plain_loss` of
    the model as it is; `loss_rise`, the share by which it rises; `later_loss_rise`, the same without the opening
    tokens; `kl`, the mean divergence per token.

    Args:
        prepared: prompts with replies after them.
    """
    effect = engine.losses(prepared, dial.steering([each.edit for each in settings]), progress)
    plain, plain_later = effect.plain_losses.mean(), effect.plain_losses[~effect.is_first].mean()
    losses, later = effect.losses.mean(1), effect.losses[:, ~effect.is_first].mean(1)
    return pd.DataFrame(
        {
            "direction": [each.name for each in settings],
            "site": [each.site for each in settings],
            "alpha": [each.alpha for each in settings],
            "loss": losses,
            "plain_loss": plain,
            "loss_rise": losses / plain - 1,
            "later_loss_rise": later / plain_later - 1,
            "kl": effect.divergence.mean(1),
        }
    )
