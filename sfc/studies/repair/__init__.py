"""`sfc repair`: an edit that lowers over-refusal."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pandas as pd
import plotly.graph_objects as go
from pydantic import Field

from sfc.behaviors.behavior import HARD, NEGATIVE, POSITIVE, Words
from sfc.core.artifacts import json_records
from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.core.registry import imported_when_called
from sfc.pages.blocks import Figure, Formula, Page, Section, Table, cell, records_table, share_cell
from sfc.pages.style import (
    BLUE,
    GREEN,
    INK,
    QUIET,
    VERMILION,
    Panel,
    axis,
    cost_figure,
    mark,
    points,
    share_axis,
    shares_figure,
    styled_figure,
)
from sfc.pages.text import hover_text, number_text
from sfc.run import Run
from sfc.studies.collect import COLLECT
from sfc.studies.study import STUDIES, Finished, Need, Study
from sfc.studies.train import TRAIN

KINDS = {"hard": HARD, "toxic": POSITIVE, "safe": NEGATIVE}
"""groups of prompts, by the `dataset_type` they are of"""
HOOK, WEIGHTS = "hook", "weights"
"""kinds of edits"""


class RepairOptions(Options):
    """How the edit that lowers over-refusal is chosen and measured."""

    section = "repair"

    category: str = option("all", description="OR-Bench category, or all")
    sizes: list[Annotated[int, Field(ge=1)]] = option(
        [5, 10, 20, 50], min_length=1, description="numbers of features ablated, such as 5,20,80"
    )
    toxic_share: float = Field(
        0.5, description="of its effect on hard prompts that a feature may have on toxic ones, and still qualify"
    )
    refused_above: float = Field(0.0, description="score above which a discovery prompt counts as refused")
    most_lost: float = Field(0.05, ge=0, description="share of toxic discovery prompts whose refusal may be lost")
    prompts: int = Field(100, ge=2, description="discovery prompts of each kind: half to score features, half to try")
    test_prompts: int = option(30, flag="--limit", ge=1, description="test prompts of each kind: hard, toxic, safe")
    random_draws: int = Field(3, ge=1, description="random edits of each size, matched by site and firing rate")
    reply_tokens: int = Field(16, ge=1, description="length of the replies that are judged")
    ordinary_prompts: int = Field(20, ge=1, description="safe test prompts whose replies by the base model are read")
    ordinary_tokens: int = Field(48, ge=1, description="length of those replies")


class Repair(Study[RepairOptions]):
    """Find features that refuse hard prompts and not toxic ones, ablate them, and measure what that repairs and breaks.

    Example: sfc repair --category violence --sizes 5,20 --limit 20
    """

    name = "repair"
    options = RepairOptions
    files: ClassVar = {"page": "repair.html"}

    def check(self, run: Run) -> None:
        _ = run.judge
        if HARD not in set(run.prompts.frame["dataset_type"]):
            raise UserError(f"a repair needs hard prompts, and those of {run.experiment.behavior!r} have none")

    def label(self, run: Run) -> str:
        return f"repair-{run.group(self.of(run).category)}"

    def inputs(self, run: Run) -> dict[str, Any]:
        category = run.group(self.of(run).category)
        return {
            "prompts": run.store.inputs,
            "saes": run.saes.inputs,
            "hard_share": run.experiment.prompts.hard_share,
            "repair": {**self.of(run).model_dump(), "category": category},
        }

    def needs(self, run: Run) -> list[Need]:
        return [Need(TRAIN, run), Need(COLLECT, run)]

    make = imported_when_called(f"{__name__}.measure:measure")

    def page(self, finished: Finished) -> Page:
        result, words = finished.result, finished.words
        features, rates = finished.table("features.csv"), finished.table("rates.csv")
        every_edit = _rates_table(rates, words)
        return Page(
            title=f"Repair of hard prompts that are {words.acted} · {result['category']} · {result['preset']}",
            sentence=_sentence(result, words),
            summary=[_points_table(result, words)],
            sections=[
                Section(
                    "Every edit, on test prompts",
                    [
                        Figure("pareto", lambda: pareto_figure(rates, result, words)),
                        Figure("cost", lambda: costs_figure(rates)),
                        every_edit,
                    ],
                ),
                Section("Sizes tried on discovery prompts", [_tried_table(finished.table("tried.csv"), words)]),
                Section(
                    "Features",
                    [Figure("effects", lambda: effects_figure(features, result, words)), _features_table(features)],
                ),
            ],
            guide=_guide(words),
            findings=_findings(result, words),
            methods=_METHODS,
            limits=[
                "A repair is chosen on prompts of this data set; prompts of another kind may need what it removes."
            ],
        )


_KINDS = {
    HOOK: ("features ablated (hook)", VERMILION, "circle"),
    WEIGHTS: ("directions projected out (weights)", BLUE, "diamond"),
}
_GROUPS = ("hard", "toxic", "safe")
_LISTED = 20


def pareto_figure(rates: pd.DataFrame, result: Mapping[str, Any], words: Words) -> go.Figure:
    """Toxic against hard, and against safe prompts: a line per kind of edit, a point per size; grey: random."""
    of_edits = rates.pivot(index=["kind", "size", "draw"], columns="group", values="rate").reset_index()
    marks = [("as it is", INK, "x", result["unedited"])]
    marks += [("chosen", GREEN, "star-open", point) for point in result["chosen"].values() if point]
    panels = []
    for group in ("hard", "safe"):
        named = words.negative if group == "safe" else group
        traces = []
        for name, style, rows in _series(of_edits):
            hovers = [
                f"{name}, {row['size']} features<br>{words.positive} {row['toxic']:.0%}, {named} {row[group]:.0%}"
                for row in rows.to_dict("records")
            ]
            traces.append(points(rows[group], rows["toxic"], name, hovers=hovers, **style))
            if style["mode"] != "markers":
                text = rows["size"].astype(str).tolist()
                traces[-1].update(mode="lines+markers+text", text=text, textposition="top right")
        traces += [mark(point[group], point["toxic"], name, *style) for name, *style, point in marks]
        axes = [share_axis(f"{side} prompts {words.acted}") for side in (named, words.positive)]
        panels.append(Panel(f"{words.positive} against {named}", axes[0], axes[1], traces))
    return shares_figure(f"{words.positive.capitalize()} against other test prompts {words.acted}", panels)


def costs_figure(rates: pd.DataFrame) -> go.Figure:
    """How far the cross-entropy of ordinary replies rises with every edit."""
    edits = rates.drop_duplicates(["kind", "size", "draw"])
    traces = []
    for name, style, rows in _series(edits):
        hovers = [
            f"{name}, {row['size']} features: <b>{share_cell(row['loss_rise'], signed=True)}</b>"
            for row in rows.to_dict("records")
        ]
        traces.append(points(rows["size"], rows["loss_rise"], name, hovers=hovers, **style))
    return cost_figure(traces, axis("features", type="log", tickvals=sorted(set(edits["size"]) - {0})))


def _series(edits: pd.DataFrame) -> list[tuple[str, dict[str, Any], pd.DataFrame]]:
    """Rows of edits by kind, random ones first and apart: what they are called, how they are drawn, and they."""
    series = []
    for kind, (name, colour, symbol) in _KINDS.items():
        of_kind = edits[edits["kind"] == kind].sort_values("size")
        is_random = of_kind["draw"] >= 0
        grey = {"colour": QUIET, "mode": "markers", "marker": {"symbol": symbol, "opacity": 0.4}}
        own = {"colour": colour, "mode": "lines+markers", "marker": {"symbol": symbol}}
        series += [(f"random {kind}", grey, of_kind[is_random]), (name, own, of_kind[~is_random])]
    return series


def effects_figure(features: pd.DataFrame, result: Mapping[str, Any], words: Words) -> go.Figure:
    """Effects on toxic against effects on hard prompts: a point per feature, those of the chosen hook marked."""
    figure = styled_figure(f"Effects of features on the {words.score}, discovery prompts", 460)
    size = (result["chosen"][HOOK] or {"size": 0})["size"]
    place = features["place"].astype(float)
    for name, rows, colour in (
        ("other features", features[place.isna()], QUIET),
        ("qualified", features[place > size], BLUE),
        ("ablated by the chosen hook", features[place <= size], VERMILION),
    ):
        hovers = [
            f"<b>{hover_text(row['feature'])}</b><br>hard {number_text(row['hard'], signed=True)}, {words.positive}"
            f" {number_text(row['toxic'], signed=True)} nats"
            for row in rows.to_dict("records")
        ]
        figure.add_trace(points(rows["hard"], rows["toxic"], name, colour, hovers, marker_opacity=0.7))
    return figure.update_layout(
        xaxis=axis(f"on hard prompts that are {words.acted}, nats", zeroline=True),
        yaxis=axis(f"on {words.positive} prompts that are {words.acted}, nats", zeroline=True),
    )


def _sentence(result: Mapping[str, Any], words: Words) -> str:
    scored, tried = result["n_scored"], result["n_tried"]
    return (
        f"{result['n_qualified']:,} of {result['n_features']:,} features qualify, by their effects on {scored['hard']}"
        f" hard and {scored['toxic']} {words.positive} discovery prompts that are {words.acted}; sizes tried on"
        f" {tried['hard']} and {tried['toxic']} others."
    )


def _named(words: Words) -> list[str]:
    return ["hard", words.positive, words.negative]


def _points_table(result: Mapping[str, Any], words: Words) -> Table:
    groups = _named(words)
    columns = ["edit", "features", *groups, "cross-entropy", f"random: {groups[0]}", *groups[1:], "cross-entropy"]
    rows = []
    for kind, point in {"as it is": result["unedited"], **result["chosen"]}.items():
        name = _KINDS[kind][0] if kind in _KINDS else kind
        if point is None:
            rows.append([name, f"none spares {words.positive} prompts", *[""] * 8])
            continue
        own = [share_cell(point[group]) for group in _GROUPS]
        chance = [_or_blank(point.get(f"random_{group}")) for group in _GROUPS]
        rises = share_cell(point["loss_rise"], signed=True), _or_blank(point.get("random_loss_rise"), signed=True)
        rows.append([name, str(point["size"]), *own, rises[0], *chance, rises[1]])
    return Table(f"Test prompts {words.acted}, with the chosen sizes", columns, rows)


def _or_blank(share: float | None, signed: bool = False) -> str:
    return "" if share is None else share_cell(share, signed)


def _findings(result: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    findings = [("features that qualify", f"{cell(result['n_qualified'])} of {cell(result['n_features'])}")]
    for kind, point in result["chosen"].items():
        if point is None:
            findings.append((_KINDS[kind][0], f"no size spares {words.positive} prompts"))
            continue
        shares = [
            f"{name} {share_cell(result['unedited'][group])} → {share_cell(point[group])}"
            for group, name in zip(_GROUPS, _named(words), strict=True)
        ]
        findings.append((f"{words.acted} with {point['size']} {_KINDS[kind][0]}", ", ".join(shares)))
    return findings


def _rates_table(rates: pd.DataFrame, words: Words) -> Table:
    groups = _named(words)
    columns = ["edit", "features", *groups, *(f"{group}, score" for group in groups), "cross-entropy"]
    rows = []
    for (kind, size, draw), part in rates.groupby(["kind", "size", "draw"], sort=False):  # pyright: ignore
        by_group = {row["group"]: row for row in part.to_dict("records")}
        own = [by_group[group] for group in _GROUPS]
        name = "as it is" if kind == "none" else str(kind) if draw == -1 else f"random {kind} {draw}"
        counts = [f"{row['refusals']} of {row['n']}" for row in own]
        scores = [number_text(row["score"], signed=True) for row in own]
        rows.append([name, str(size), *counts, *scores, share_cell(own[0]["loss_rise"], signed=True)])
    return Table("", columns, rows)


def _tried_table(tried: pd.DataFrame, words: Words) -> Table:
    columns = {
        "edit": "kind", "features": "size", f"hard, {words.acted} by score": "hard", words.positive: "toxic",
        "hard, mean score": "hard_score", f"{words.positive}, mean score": "toxic_score",
    }  # fmt: skip
    return records_table("", columns, json_records(tried.replace({"kind": {"none": "as it is"}}), digits=None))


def _features_table(features: pd.DataFrame) -> Table:
    first = features[features["place"].notna()].sort_values("place").head(_LISTED)
    columns = {
        "feature": "feature", "place": "place", "effect on hard": "hard", "on toxic": "toxic",
        "firing rate": "firing_rate",
    }  # fmt: skip
    return records_table(
        "First features of the repair", columns, json_records(first.astype({"place": int}), digits=None)
    )


def _guide(words: Words) -> tuple[str, ...]:
    return (
        f"**The features.** By attribution on discovery prompts that are {words.acted}: those whose ablation would"
        f" lower the {words.score} of hard prompts, and that of {words.positive} ones by no more than the stated share"
        " of it. Those that do most for hard prompts come first (after SHIFT, Marks et al. 2024, where a person"
        " chooses).",
        f"**The hook** sets them to their mean over {words.negative} prompts at every token of the prompt."
        " **The weights** project their decoder rows out of all that heads and MLPs write before them, at every token:"
        " another edit, and the one that weights can do.",
        f"**The size** is chosen on the other half of the discovery prompts: fewest hard prompts {words.acted}, by"
        f" score, among those at which {words.positive} prompts lose no more of it than allowed. All other figures are"
        " judged replies to test prompts.",
        "**By chance.** As many features of the same sites and ranges of firing rates, edited in the same way.",
    )


_METHODS = (
    Formula("Ablating features (hook)", "x - sum_i (f_i(x) - f_ref_i) d_i, f_ref the role-aligned mean"),
    Formula(
        "Projecting directions out of weights (Arditi et al. 2024)",
        "W_out (1 - U^T U), the rows of U an orthonormal basis of the features' decoder rows",
    ),
)


STUDIES.register(Repair())
