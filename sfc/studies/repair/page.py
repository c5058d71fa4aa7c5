"""The page of a repair: which features were ablated, and what that does to hard, toxic, safe and ordinary prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import BLUE, GREEN, INK, QUIET, VERMILION, axis, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import hover_text, number_text

_KINDS = {"hook": ("features ablated (hook)", VERMILION), "weights": ("directions projected out (weights)", BLUE)}
_LISTED = 20


def write_repair_page(path: Path, tables: Mapping[str, pd.DataFrame], result: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all.

    Args:
        tables: `features` (effects in nats, `place` among the qualified), `tried` (shares refused by score, on
            discovery prompts) and `rates` (judged refusals of test prompts per kind, size, draw and group, with
            `loss_rise`).
        result: what `repair --json` prints.
    """
    title = f"Repair of over-refusal · {result['category']} · {result['preset']}"
    figures = [
        pareto_figure(tables["rates"], result),
        cost_figure(tables["rates"]),
        effects_figure(tables["features"], result),
    ]
    cards = "".join(
        f'<section class="card scroll">{figure_html(f"figure-{number}", figure)}</section>\n'
        for number, figure in enumerate(figures)
    )
    body = f"""{header_html(title, _sentence(result))}
<section class="card scroll"><h2>Chosen sizes, measured on test prompts</h2>{_points_table(result)}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_GUIDE)}</section>
{cards}<section class="card scroll"><h2>Every edit, on test prompts</h2>{_rates_table(tables["rates"])}</section>
<section class="card scroll"><h2>Sizes tried on discovery prompts</h2>{_tried_table(tables["tried"])}</section>
<section class="card scroll"><h2>First features of the repair</h2>{_features_table(tables["features"])}</section>"""
    write_document(path, title, body)


def pareto_figure(rates: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """Toxic against hard, and against safe prompts refused: a line per kind of edit, a point per size; grey: random."""
    figure = styled_figure("Refusal of toxic against that of harmless test prompts", 480)
    others = ("hard", "safe")
    make_subplots(rows=1, cols=2, figure=figure, subplot_titles=[f"toxic against {group}" for group in others])
    points = rates.pivot(index=["kind", "size", "draw"], columns="group", values="rate").reset_index()
    for column, group in enumerate(others, start=1):
        for kind, (name, colour) in _KINDS.items():
            of_kind = points[points["kind"] == kind]
            for own, mode in ((False, "markers"), (True, "lines+markers+text")):
                rows = of_kind[(of_kind["draw"] < 0) == own].sort_values("size")
                trace = go.Scatter(
                    x=rows[group],
                    y=rows["toxic"],
                    mode=mode,
                    line={"color": colour},
                    marker={
                        "color": colour if own else QUIET,
                        "size": 9 if own else 7,
                        "symbol": "circle" if kind == "hook" else "diamond",
                        "opacity": 1 if own else 0.4,
                    },
                    text=rows["size"].astype(str).tolist() if own else None,
                    textposition="top right",
                    name=name if own else f"random {kind}",
                    legendgroup=f"{kind}{own}",
                    showlegend=column == 1,
                    customdata=[
                        f"{name if own else f'random {kind}'}, {row['size']} features<br>toxic {row['toxic']:.0%},"
                        f" {group} {row[group]:.0%}"
                        for row in rows.to_dict("records")
                    ],
                    hovertemplate="%{customdata}<extra></extra>",
                )
                figure.add_trace(trace, 1, column)
        marks = [("as it is", INK, "x", result["unedited"])]
        marks += [("chosen", GREEN, "star-open", point) for point in result["chosen"].values() if point]
        for number, (name, colour, symbol, point) in enumerate(marks):
            marked = go.Scatter(
                x=[point[group]],
                y=[point["toxic"]],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 16, "line": {"width": 2}},
                name=name,
                legendgroup=name,
                showlegend=column == 1 and number < 2,
                hovertemplate=f"{name}<extra></extra>",
            )
            figure.add_trace(marked, 1, column)
        shares = {"tickformat": ".0%", "range": [-0.03, 1.03]}
        figure.update_xaxes(axis(f"{group} prompts refused", **shares), row=1, col=column)
        figure.update_yaxes(axis("toxic prompts refused", **shares), row=1, col=column)
    return figure.update_layout(margin={"t": 130}, legend={"y": 1.1})


def cost_figure(rates: pd.DataFrame) -> go.Figure:
    """How far the cross-entropy of ordinary replies rises with every edit."""
    figure = styled_figure("What it costs: cross-entropy of ordinary replies", 360)
    edits = rates.drop_duplicates(["kind", "size", "draw"])
    for kind, (name, colour) in _KINDS.items():
        for own in (False, True):
            rows = edits[(edits["kind"] == kind) & ((edits["draw"] < 0) == own)].sort_values("size")
            trace = go.Scatter(
                x=rows["size"],
                y=rows["loss_rise"],
                mode="lines+markers" if own else "markers",
                line={"color": colour},
                marker={
                    "color": colour if own else QUIET,
                    "symbol": "circle" if kind == "hook" else "diamond",
                    "size": 8,
                    "opacity": 1 if own else 0.4,
                },
                name=name if own else f"random {kind}",
                hovertemplate="%{x} features: <b>%{y:+.1%}</b><extra></extra>",
            )
            figure.add_trace(trace)
    return figure.update_layout(
        margin={"t": 100},
        xaxis=axis("features", type="log", tickvals=sorted(set(edits["size"]) - {0})),
        yaxis=axis("rise", tickformat="+.0%", zeroline=True),
    )


def effects_figure(features: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """Effects on toxic against effects on hard prompts: a point per feature, those of the chosen hook marked."""
    figure = styled_figure("Effects of features on the refusal score, discovery prompts", 460)
    size = (result["chosen"]["hook"] or {"size": 0})["size"]
    place = features["place"].astype(float)
    for name, rows, colour in (
        ("other features", features[place.isna()], QUIET),
        ("qualified", features[place > size], BLUE),
        ("ablated by the chosen hook", features[place <= size], VERMILION),
    ):
        trace = go.Scatter(
            x=rows["hard"],
            y=rows["toxic"],
            mode="markers",
            marker={"color": colour, "size": 7, "opacity": 0.7},
            name=name,
            customdata=[
                f"<b>{hover_text(row['feature'])}</b><br>hard {number_text(row['hard'], signed=True)}, toxic"
                f" {number_text(row['toxic'], signed=True)} nats"
                for row in rows.to_dict("records")
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
        figure.add_trace(trace)
    return figure.update_layout(
        xaxis=axis("on over-refused hard prompts, nats", zeroline=True),
        yaxis=axis("on refused toxic prompts, nats", zeroline=True),
    )


def _sentence(result: Mapping[str, Any]) -> str:
    scored, tried = result["n_scored"], result["n_tried"]
    return (
        f"{result['n_qualified']:,} of {result['n_features']:,} features qualify, by their effects on {scored['hard']}"
        f" over-refused hard and {scored['toxic']} refused toxic discovery prompts; sizes tried on {tried['hard']} and"
        f" {tried['toxic']} others."
    )


_GUIDE = (
    "<b>The features.</b> By attribution on refused discovery prompts: those whose ablation would lower the refusal "
    "score of hard prompts, and that of toxic ones by no more than the stated share of it. Those that do most for "
    "hard prompts come first (after SHIFT, Marks et al. 2024, where a person chooses).",
    "<b>The hook</b> sets them to their mean over safe prompts at every token of the prompt. <b>The weights</b> "
    "project their decoder rows out of all that heads and MLPs write before them, at every token: another edit, and "
    "the one that weights can do.",
    "<b>The size</b> is chosen on the other half of the discovery prompts: fewest hard prompts refused, by score, "
    "among those at which toxic prompts lose no more refusals than allowed. All other figures are judged replies to "
    "test prompts.",
    "<b>By chance.</b> As many features of the same sites and ranges of firing rates, edited in the same way.",
)


def _points_table(result: Mapping[str, Any]) -> str:
    titles = [
        "edit", "features", "hard", "toxic", "safe", "cross-entropy", "random: hard", "toxic", "safe", "cross-entropy",
    ]  # fmt: skip
    rows = []
    for name, point in {"as it is": result["unedited"], **result["chosen"]}.items():
        shown = _KINDS[name][0] if name in _KINDS else name
        if point is None:
            rows.append([shown, "none spares toxic prompts", *[""] * 8])
            continue
        own = [_percent(point[group]) for group in ("hard", "toxic", "safe")] + [_percent(point["loss_rise"], True)]
        chance = [_percent(point.get(f"random_{group}")) for group in ("hard", "toxic", "safe")]
        rows.append([shown, str(point["size"]), *own, *chance, _percent(point.get("random_loss_rise"), True)])
    return figures_table(titles, rows)


def _rates_table(rates: pd.DataFrame) -> str:
    titles = [
        "edit",
        "features",
        "hard",
        "toxic",
        "safe",
        "hard, score",
        "toxic, score",
        "safe, score",
        "cross-entropy",
    ]
    rows = []
    for (kind, size, draw), part in rates.groupby(["kind", "size", "draw"], sort=False):  # pyright: ignore
        by_group = {row["group"]: row for row in part.to_dict("records")}
        own = [by_group[group] for group in ("hard", "toxic", "safe")]
        name = "as it is" if kind == "none" else str(kind) if draw == -1 else f"random {kind} {draw}"
        counts = [f"{row['refusals']} of {row['n']}" for row in own]
        scores = [number_text(row["score"], signed=True) for row in own]
        rows.append([name, str(size), *counts, *scores, _percent(own[0]["loss_rise"], True)])
    return figures_table(titles, rows)


def _tried_table(tried: pd.DataFrame) -> str:
    titles = ["edit", "features", "hard refused, by score", "toxic", "hard, mean score", "toxic"]
    rows = [
        [
            "as it is" if row["kind"] == "none" else row["kind"],
            str(row["size"]),
            *(_percent(row[name]) for name in ("hard", "toxic")),
            *(number_text(row[f"{name}_score"], signed=True) for name in ("hard", "toxic")),
        ]
        for row in tried.to_dict("records")
    ]
    return figures_table(titles, rows)


def _features_table(features: pd.DataFrame) -> str:
    first = features[features["place"].notna()].sort_values("place").head(_LISTED)
    rows = [
        [
            row["feature"],
            str(row["place"]),
            *(number_text(row[name], signed=True) for name in ("hard", "toxic")),
            number_text(row["firing_rate"]),
        ]
        for row in first.to_dict("records")
    ]
    return figures_table(["feature", "place", "effect on hard", "on toxic", "firing rate"], rows)


def _percent(value: float | None, signed: bool = False) -> str:
    if value is None or pd.isna(value):
        return ""
    return f"{value:{'+.1' if signed else '.0'}%}".replace("-", "−")
