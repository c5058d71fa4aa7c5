"""The dial: every prompt under every setting, its score, its reply and the judgement of it."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from sfc.config_study import SteeringConfig
from sfc.evaluation.intervals import wilson
from sfc.models.judge import is_refusal
from sfc.sites import layer_of
from sfc.steering.bench import Bench, Progress, SteeredReplies, plain_replies, steered_replies
from sfc.steering.directions import Vector
from sfc.steering.edits import Edit, residual_sites
from sfc.steering.select import Candidate

FORCE, SUPPRESS, NONE = "force", "suppress", ""
INTENDED_LABEL = {FORCE: "safe", SUPPRESS: "toxic"}
"""on which prompts a turn of the dial is judged"""
Intent = Literal["force", "suppress", ""]


class Setting(NamedTuple):
    """A direction at a site, and how far the dial is turned."""

    name: str
    site: str
    token: int | None
    alpha: float
    edit: Edit

    @property
    def intent(self) -> Intent:
        """What turning the dial so is for."""
        if self.edit.kind == "project-out":
            return SUPPRESS if self.alpha > 0 else NONE
        if self.edit.kind == "clamp":
            return FORCE if self.alpha > 0 else SUPPRESS
        return FORCE if self.alpha > 0 else SUPPRESS if self.alpha < 0 else NONE


def setting(
    bench: Bench,
    candidate: Candidate,
    alpha: float,
    config: SteeringConfig,
    vector: Vector | None = None,
    name: str = "chosen",
) -> Setting:
    """The dial at an alpha; another `vector` takes the place of the candidate's at an equal amount."""
    everywhere = config.edit == "project-out" and config.everywhere
    sites = residual_sites(bench.model) if everywhere else (candidate.site,)
    edit = Edit(config.edit, sites, candidate.vector if vector is None else vector, candidate.amount(alpha, config))
    return Setting(name, candidate.site, candidate.token, alpha, edit)


def sweep(
    bench: Bench, prompts: pd.DataFrame, settings: Sequence[Setting], reply_tokens: int, progress: Progress
) -> pd.DataFrame:
    """One row per setting and prompt.

    Columns: `direction`, `site`, `layer`, `token`, `alpha`, `intent`, the columns of `prompts`, `unsteered_score`,
    `score`, `unsteered_refused`, `refused`, `changed` (a change in the intended direction, against the unsteered reply;
    False where there is none), `eligible` (a prompt on which one was possible) and `reply`.

    Args:
        prompts: what is on the bench, in its order.
    """
    plain = plain_replies(bench, reply_tokens)
    steered = steered_replies(bench, [each.edit for each in settings], reply_tokens, progress)
    before = _judged(plain)[0]
    tables = []
    for each, scores, refused, replies in zip(settings, steered.scores, _judged(steered), steered.texts, strict=True):
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


def _judged(replies: SteeredReplies) -> np.ndarray:
    return np.array([[is_refusal(text) for text in texts] for texts in replies.texts], dtype=bool)


def rates(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Refusals and changes per group of a sweep's rows, with Wilson intervals of 95 %.

    Columns: those of `by`, `n`, `refusals`, `rate`, `low`, `high`, `score` and `score_change` (means, in nats),
    `eligible`, `changed`, `changed_rate` (None where no prompt could change), `changed_low`, `changed_high`.
    """
    groups = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        n, refusals = len(group), int(group["refused"].sum())
        eligible, changed = int(group["eligible"].sum()), int(group["changed"].sum())
        groups.append(
            dict(zip(by, key, strict=True))  # pyright: ignore[reportArgumentType]
            | {"n": n, "refusals": refusals, "rate": refusals / n}
            | wilson(refusals, n)._asdict()
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
    for intent, group in changes[changes["intent"] != NONE].groupby("intent"):
        within = group[group["loss_rise"] <= max_loss]
        order = ["changed_rate", "loss_rise"] if len(within) else ["loss_rise"]
        best = (within if len(within) else group).sort_values(
            order, ascending=[name != "changed_rate" for name in order]
        )
        chosen[str(intent)] = float(best["alpha"].iloc[0])
    return chosen
