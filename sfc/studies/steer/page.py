"""The page of steering: how a direction was chosen, what the dial does and costs, and what chance does."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from sfc.behaviors.behavior import Words
from sfc.core.artifacts import json_records
from sfc.core.sites import short_site
from sfc.pages.blocks import Block, Figure, Formula, Page, Section, Table, cell, records_table, share_cell
from sfc.pages.text import NOT_MEASURABLE, number_text
from sfc.studies.steer import Steer
from sfc.studies.steer.figures import (
    candidates_figure,
    conditional_figure,
    controls_figure,
    costs_figure,
    dial_figure,
    intents,
    kind_text,
    trade_off_figure,
    types_figure,
)
from sfc.studies.study import Finished

_LISTED = 15


def page(_study: Steer, finished: Finished) -> Page:
    """The page of a finished steering run."""
    result, words = finished.result, finished.words
    tables = {name: finished.table(path.name) for name, path in finished.files.items() if path.suffix == ".csv"}
    candidates = tables["candidates"]
    candidates = candidates.assign(rejected=candidates["rejected"].astype(object).fillna(""))
    dial = tables["rates"]
    every_alpha = _dial_table(dial, words)
    chosen = Figure("candidates", lambda: candidates_figure(candidates, result, words))
    of = "" if result["category"] == "all" else f" · {result['category']}"
    return Page(
        title=f"Steering along {words.said(result['direction'])}{of} · {result['preset']}",
        sentence=_sentence(result, words),
        summary=[_points_table(result, words)],
        sections=[
            Section("How the direction was chosen", [chosen, _candidates_table(candidates)]),
            Section(
                "The dial, on test prompts",
                [
                    Figure("dial", lambda: dial_figure(dial, result, words), every_alpha),
                    Figure("cost", lambda: costs_figure(dial, result)),
                ],
            ),
            Section("Against chance", [Figure("controls", lambda: controls_figure(tables["controls"], result, words))]),
            *_xstest(tables, result, words),
            *_conditional(tables, result, words),
            *_directions(tables["directions"], words),
            Section("What writes the direction", [_writers_table(tables["writers"], words)]),
            *_features(tables),
        ],
        guide=_guide(words),
        findings=[
            (
                f"{intents(words)[intent]}, alpha {number_text(point['alpha'], signed=True)}",
                f"{_changed(point)}; random directions: {share_cell(point['random_mean'])}",
            )
            for intent, point in result["operating_points"].items()
        ],
        methods=_METHODS,
        limits=["A dial that changes replies may change them to nonsense: read what it costs beside what it does."],
    )


def _sentence(result: Mapping[str, Any], words: Words) -> str:
    token = "" if result["token"] is None else f", learned at token {result['token']}"
    steered = f"{result['positions']}{' and the reply' if result['during_reply'] else ''}"
    plain = {side: number_text(mean, signed=True) for side, mean in result["unsteered"].items()}
    return (
        f"{result['edit']} at {result['site']}{token}; steered tokens: {steered}. {result['n_candidates']} candidates"
        f" tried, {result['n_rejected']} rejected. Mean {words.score} as it is: {words.negative} {plain['safe']},"
        f" {words.positive} {plain['toxic']} nats."
    )


def _changed(point: Mapping[str, Any]) -> str:
    return f"{point['changed']} of {point['eligible']}"


def _points_table(result: Mapping[str, Any], words: Words) -> Table:
    columns = [
        "what", "alpha", "changed", "95 %", "held-out folds", "random: mean, highest", "shuffled: mean, highest",
        "cross-entropy", "without opening", "KL",
    ]  # fmt: skip
    rows = [
        [
            intents(words)[intent],
            number_text(point["alpha"], signed=True),
            _changed(point),
            f"{share_cell(point['changed_low'])} to {share_cell(point['changed_high'])}",
            share_cell(point["held_out_rate"]),
            *(
                NOT_MEASURABLE
                if point[f"{control}_mean"] is None
                else f"{share_cell(point[f'{control}_mean'])}, {share_cell(point[f'{control}_highest'])}"
                for control in ("random", "shuffled")
            ),
            *(share_cell(point[name], signed=True) for name in ("loss_rise", "later_loss_rise")),
            cell(point["kl"]),
        ]
        for intent, point in result["operating_points"].items()
    ]
    return Table("Operating points, on test prompts", columns, rows)


def _dial_table(dial: pd.DataFrame, words: Words) -> Table:
    rows = []
    for (site, alpha), part in dial.groupby(["site", "alpha"], sort=False):  # pyright: ignore
        by_label = {row["label"]: row for row in part.to_dict("records")}
        counts = [f"{by_label[label]['refusals']} of {by_label[label]['n']}" for label in ("safe", "toxic")]
        rise = share_cell(by_label["safe"]["loss_rise"], signed=True)
        rows.append([short_site(str(site)), number_text(float(alpha), signed=True), *counts, rise])  # pyright: ignore
    sides = [f"{side}, {words.acted}" for side in (words.negative, words.positive)]
    return Table("The dial", ["site", "alpha", *sides, "cross-entropy"], rows)


def _xstest(tables: Mapping[str, pd.DataFrame], result: Mapping[str, Any], words: Words) -> list[Section]:
    if "trade_off" not in tables:
        return []
    curves, rates = tables["trade_off"], tables["xstest_rates"]
    own = curves[curves["direction"] == result["direction"]]
    columns = {"alpha": "alpha", f"unsafe, {words.acted}": "unsafe", f"safe, {words.acted}": "safe"}
    table = records_table("XSTest", columns, json_records(own, digits=None))
    blocks = [
        Figure("trade-off", lambda: trade_off_figure(curves, result, words), table),
        Figure("types", lambda: types_figure(rates, result, words)),
    ]
    return [Section("XSTest", blocks)]


def _conditional(tables: Mapping[str, pd.DataFrame], result: Mapping[str, Any], words: Words) -> list[Section]:
    if "conditional" not in tables:
        return []
    blocks: list[Block] = [Figure("conditional", lambda: conditional_figure(tables["conditional"], result, words))]
    for data, rows in result["conditional"]["matched"].items():
        others = [name for name in rows[0] if name != "toxic"]
        titles = [
            ", ".join([kind_text(group, words), dial]) for group, _, dial in (name.rpartition("_") for name in others)
        ]
        cells = [
            ["not reached" if row[name] is None else share_cell(row[name]) for name in ("toxic", *others)]
            for row in rows
        ]
        title = (
            f"{data}: both dials where equally many {words.positive} prompts are {words.acted} (interpolated between"
            " alphas)"
        )
        blocks.append(Table(title, [f"{words.positive}, {words.acted}", *titles], cells))
    return [Section("Only where a feature fires", blocks)]


def _features(tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    if "features" not in tables:
        return []
    rows = json_records(tables["features"].head(_LISTED), digits=None)
    return [
        Section(
            "SAE features along the direction",
            [records_table("", {"feature": "feature", "cosine": "cosine"}, rows)],
        )
    ]


def _directions(directions: pd.DataFrame, words: Words) -> list[Section]:
    if directions.empty:
        return []
    columns = {
        "contrast": "direction", "cosine with the chosen one": "cosine", "length": "length",
        "in the span of the others": "span_share", "effect": "effect", "of that part": "effect_in_span",
        "of the rest": "effect_outside",
    }  # fmt: skip
    named = directions.assign(direction=directions["direction"].map(words.said))
    return [Section("Several directions", [records_table("", columns, json_records(named, digits=None))])]


def _writers_table(writers: pd.DataFrame, words: Words) -> Table:
    columns = {
        "component": "component", words.positive: "toxic", words.negative: "safe", "share of the difference": "share",
        "q": "q_value", "lost without it": "lost_share", "score without it": "score_change",
    }  # fmt: skip
    return records_table("", columns, _or_blank(writers.head(_LISTED)))


def _candidates_table(candidates: pd.DataFrame) -> Table:
    columns = ("site", "token", "length", "agreement", "induced", "removed", "kl", "rejected")
    ordered = candidates.sort_values(["rejected", "removed"], key=lambda c: c != "" if c.name == "rejected" else c)
    shown = ordered.assign(site=ordered["site"].map(short_site), token=ordered["token"].astype("Int64"))
    titles = {"KL" if name == "kl" else name: name for name in columns}
    return records_table("", titles, _or_blank(shown), texts=("rejected",))


def _or_blank(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows; what is missing is blank."""
    return table.astype(object).where(table.notna(), "").to_dict("records")  # pyright: ignore[reportReturnType]


def _guide(words: Words) -> tuple[str, ...]:
    positive, negative = words.positive, words.negative
    return (
        "**Three splits.** Directions are learned on discovery prompts, candidates and alphas are chosen on folds of "
        "them that the direction was not learned from, and everything else here is measured on test prompts.",
        f"**Candidates.** Induced: mean {words.score} of {negative} prompts with the dial turned up. Removed: that of"
        f" {positive} prompts with the dial turned down. A cross marks a rejected one (the hover says why), a star the"
        " chosen one: among those that pass, the one with the widest swing, induced - removed.",
        "**Changed** counts a reply only if the turn of the dial was meant to change it so: forced, a prompt that was "
        f"not {words.acted} before and is now; suppressed, one that was {words.acted} and no longer is. A reply may"
        " change to nonsense, which is what the cost beside it is for.",
        f"**Cost.** The base model's replies to {negative} test prompts, teacher-forced, with the same tokens steered."
        " Forcing the behavior replaces the opening token, which counts in the solid line and not in the dotted one.",
        "**What writes it.** Components along the direction of what heads and MLPs write, on test prompts: the shares "
        "of all of them sum to 1. Lost without it: the part of the difference at the site that is gone when this output"
        f" is set to its mean on {negative} prompts; score, the change of {positive} prompts' mean {words.score} by the"
        " same.",
        "**Against chance.** The same amount along random directions and along differences of means between prompts "
        "dealt to two sides by lot.",
    )


_METHODS = (
    Formula(
        "Difference of means (Arditi et al. 2024)", "mean over one side - mean over the other, at one site and token"
    ),
    Formula(
        "Steering",
        "add: x + a u; project-out: x - a (x . u) u; clamp: x + (a - x . u) u, with u the direction at unit length",
    ),
)
