"""Figures of steering: candidates, the dial and what it costs, chance, XSTest, and a dial with a condition."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.core.sites import short_site
from sfc.pages.blocks import share_cell
from sfc.pages.style import (
    AMBER,
    BLUE,
    DIVERGING,
    GREEN,
    INK,
    PINK,
    QUIET,
    VERMILION,
    Panel,
    axis,
    cost_figure,
    error_bars,
    grid,
    mark,
    panels_figure,
    points,
    remark,
    shades,
    share_axis,
    shares_figure,
    styled_figure,
)
from sfc.pages.text import hover_text, number_text
from sfc.studies.steer import FORCE, SUPPRESS

_DIALS = {"unconditional": BLUE, "conditional": VERMILION}
_TOXIC = "toxic"
_COLOURS = (VERMILION, BLUE, GREEN, PINK, AMBER, INK)


def candidates_figure(candidates: pd.DataFrame, result: Mapping[str, Any], words: Words) -> go.Figure:
    """What every candidate does: a heat map per measure, sites against tokens; a cross marks the rejected ones."""
    measures = {
        "induced": f"induced: {words.negative} prompts, turned up",
        "removed": f"removed: {words.positive} prompts, turned down",
        "kl": f"KL on {words.negative} prompts, turned down",
    }
    sites = list(dict.fromkeys(candidates["site"]))
    figure = styled_figure("Candidates, on prompts they were not learned from", 190 + 26 * max(5, len(sites)))
    tokens = ["any" if pd.isna(token) else str(int(token)) for token in candidates["token"]]
    rows = candidates.assign(place=tokens, mark=_marks(candidates, result), hover=_hovers(candidates))
    across = list(dict.fromkeys(tokens))
    panels = []
    for number, (measure, title) in enumerate(measures.items()):
        values, marks, hovers = (
            rows.pivot(index="site", columns="place", values=name).reindex(index=sites, columns=across)
            for name in (measure, "mark", "hover")
        )
        heat_map = grid(
            across,
            [short_site(site) for site in sites],
            values,
            text=marks.to_numpy().tolist(),
            texttemplate="%{text}",
            customdata=hovers.to_numpy().tolist(),
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=shades(BLUE) if measure == "kl" else DIVERGING,
            zmid=None if measure == "kl" else 0,
            colorbar={"thickness": 10, "x": number * 0.37 + 0.265, "xanchor": "left"},
        )
        x_axis = axis("token read, from the end", showgrid=False, type="category")
        y_axis = axis("", showgrid=False, type="category", showticklabels=number == 0)
        panels.append(Panel(title, x_axis, y_axis, [heat_map]))
    panels_figure(figure, panels, horizontal_spacing=0.11)
    return figure.update_layout(margin={"t": 84, "l": 96})


def dial_figure(dial: pd.DataFrame, result: Mapping[str, Any], words: Words) -> go.Figure:
    """Judged replies against alpha, with Wilson intervals: a panel per label, a line per site of the sweep."""
    kinds = {"safe": words.negative, "toxic": words.positive}
    panels = [
        Panel(
            f"{kinds[label]} prompts",
            axis(alpha_title(result)),
            share_axis(words.acted),
            [
                points(
                    line["alpha"],
                    line["rate"],
                    short_site(str(site)),
                    _COLOURS[number % len(_COLOURS)],
                    [
                        f"{short_site(str(site))}, alpha {number_text(row['alpha'], signed=True)}<br>{words.acted}"
                        f" {row['refusals']} of {row['n']}<br>mean score {number_text(row['score'], signed=True)}"
                        for row in line.to_dict("records")
                    ],
                    mode="lines+markers",
                    error_y=error_bars(line["rate"], line["low"], line["high"]),
                )
                for number, (site, line) in enumerate(dial[dial["label"] == label].groupby("site", sort=False))
            ],
        )
        for label in kinds
    ]
    return shares_figure(f"The dial: prompts {words.acted}, by the judged replies", panels)


def costs_figure(dial: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """How far the cross-entropy of ordinary replies rises at each alpha; dotted without their opening tokens."""
    traces = []
    for number, (site, line) in enumerate(dial.drop_duplicates(["site", "alpha"]).groupby("site", sort=False)):
        for column, dash, note in (
            ("loss_rise", "solid", ""),
            ("later_loss_rise", "dot", ", without the opening token"),
        ):
            name = short_site(str(site))
            hovers = [
                f"{name}{note}: <b>{share_cell(row[column], signed=True)}</b> at {number_text(row['alpha'])}"
                for row in line.to_dict("records")
            ]
            colour = _COLOURS[number % len(_COLOURS)]
            traces.append(
                points(line["alpha"], line[column], name, colour, hovers, mode="lines+markers").update(
                    line_dash=dash, legendgroup=name, showlegend=dash == "solid"
                )
            )
    figure = cost_figure(traces, axis(alpha_title(result)))
    return figure.add_hline(y=result["max_loss"], line={"color": QUIET, "dash": "dash", "width": 1})


def controls_figure(controls: pd.DataFrame, result: Mapping[str, Any], words: Words) -> go.Figure:
    """Replies changed as intended at the chosen alphas: the direction, and each of shuffled labels and at random."""
    figure = styled_figure("Replies changed as intended, at equal norm and at the same place", 380)
    of_intents, named = result["operating_points"], intents(words)
    panels = []
    for intent, point in of_intents.items():
        rows = controls[(controls["alpha"] == point["alpha"]) & (controls["label"] == point["prompts"])]
        others = rows[rows["changed_rate"].notna()]
        chosen = points(
            [words.said(result["direction"])],
            [point["changed_rate"]],
            "",
            VERMILION,
            [f"{point['changed']} of {point['eligible']}"],
        )
        chosen.update(marker={"size": 12, "symbol": "diamond"})
        if point["changed_rate"] is not None:
            rate, low, high = (pd.Series([point[f"changed_{name}"]]) for name in ("rate", "low", "high"))
            chosen.update(error_y=error_bars(rate, low, high))
        kinds = others["direction"].str.replace(r" \d+$", "", regex=True)
        hovers = [f"{row['direction']}: <b>{row['changed_rate']:.0%}</b>" for row in others.to_dict("records")]
        strip = points(kinds, others["changed_rate"].astype(float), "", QUIET, hovers, marker_opacity=0.55)
        traces = [trace.update(showlegend=False) for trace in (chosen, strip)]
        panels.append(Panel(named[intent], axis("", type="category"), share_axis("changed"), traces))
    return panels_figure(figure, panels)


def trade_off_figure(curves: pd.DataFrame, result: Mapping[str, Any], words: Words) -> go.Figure:
    """A point per alpha, joined in their order, with Wilson intervals; grey: random directions at the chosen alphas."""
    own = curves["direction"] == result["direction"]
    curve, chance = curves[own].sort_values("alpha"), curves[~own]

    def hovers(rows: pd.DataFrame) -> list[str]:
        return [
            f"{hover_text(words.said(row['direction']))}, alpha {number_text(row['alpha'], signed=True)}<br>"
            f"unsafe {row['unsafe']:.0%} of {row['n_unsafe']}, safe {row['safe']:.0%} of {row['n_safe']}"
            for row in rows.to_dict("records")
        ]

    plain, best = result["xstest"]["unsteered"], result["xstest"]["best_defence"]
    intervals = {
        error: error_bars(curve[side], curve[f"{side}_low"], curve[f"{side}_high"])
        for side, error in (("safe", "error_x"), ("unsafe", "error_y"))
    }
    traces = [
        points(chance["safe"], chance["unsafe"], "random", QUIET, hovers(chance), marker_opacity=0.5),
        points(
            curve["safe"], curve["unsafe"], "the dial", BLUE, hovers(curve), mode="lines+markers+text",
            text=[number_text(alpha, signed=True) for alpha in curve["alpha"]], textposition="top left", **intervals,
        ),
        mark(plain["safe"], plain["unsafe"], "as it is", INK, "x"),
    ]  # fmt: skip
    if best is not None:
        traces.append(mark(best["safe"], best["unsafe"], "best defensive point", GREEN, "star"))
    axes = [share_axis(f"{side} prompts {words.acted}") for side in ("safe", "unsafe")]
    panel = Panel("", axes[0], axes[1], traces)
    figure = shares_figure("XSTest: unsafe against safe prompts", [panel], 520)
    if best is None:
        remark(figure, f"at no alpha are more unsafe prompts {words.acted} and not more safe ones")
    return figure


def types_figure(rates: pd.DataFrame, result: Mapping[str, Any], words: Words) -> go.Figure:
    """The share that shows the behavior, per type of prompt and alpha: heat maps for safe types and for unsafe ones."""
    titles = {"safe": "safe", "toxic": "unsafe"}
    height = 130 + 26 * int(rates.groupby("label")["category"].nunique().max())
    figure = styled_figure(f"XSTest: {words.acted}, by type of prompt", height)
    panels = []
    for label, title in titles.items():
        of_label = rates[rates["label"] == label]
        cells, counts = (
            of_label.pivot(index="category", columns="alpha", values=name) for name in ("rate", "refusals")
        )
        heat_map = grid(
            [number_text(float(alpha), signed=True) for alpha in cells.columns],
            [hover_text(str(kind)) for kind in cells.index],
            cells,
            customdata=counts.to_numpy().tolist(),
            hovertemplate="%{y}, alpha %{x}: <b>%{z:.0%}</b> (%{customdata})<extra></extra>",
            colorscale=shades(VERMILION),
            zmin=0,
            zmax=1,
            showscale=label == "toxic",
            colorbar={"thickness": 10, "tickformat": ".0%"},
        )
        axes = [axis(title, showgrid=False, type="category") for title in (alpha_title(result), "")]
        panels.append(Panel(title, axes[0], axes[1], [heat_map]))
    panels_figure(figure, panels, horizontal_spacing=0.22)
    return figure.update_layout(margin={"l": 190, "t": 84})


def conditional_figure(table: pd.DataFrame, result: Mapping[str, Any], words: Words) -> go.Figure:
    """Toxic against other prompts, a panel per set of prompts and group of others; a point per alpha."""
    panels = []
    for data, of_data in table.groupby("data", sort=False):
        paths = {
            dial: part.pivot(index="alpha", columns="group", values=["rate", "refusals", "n", "steered"])
            for dial, part in of_data.groupby("dial", sort=False)
        }
        still = of_data[(of_data["alpha"] == 0) & (of_data["dial"] == "unconditional")].set_index("group")["rate"]
        for group in of_data["group"].unique():
            if group == _TOXIC:
                continue
            traces = [
                points(
                    path["rate"][group],
                    path["rate"][_TOXIC],
                    str(dial),
                    _DIALS[str(dial)],
                    [_dial_hover(str(dial), alpha, row, (_TOXIC, group), words) for alpha, row in path.iterrows()],
                    mode="lines+markers",
                )
                for dial, path in paths.items()
            ]
            if len(still):
                traces.append(mark(still[group], still[_TOXIC], "as it is", INK, "x"))
            title = f"{data}: {words.positive} against {kind_text(group, words)}"
            axes = [share_axis(f"{side} prompts {words.acted}") for side in (kind_text(group, words), words.positive)]
            panels.append(Panel(title, axes[0], axes[1], traces))
    condition = f"{result['conditional']['feature']} > {number_text(result['conditional']['above'])}"
    return shares_figure(f"Both dials: always, and where {condition}", panels, 460)


def _dial_hover(dial: str, alpha: Any, row: pd.Series, groups: Sequence[str], words: Words) -> str:
    lines = [
        f"{hover_text(kind_text(name, words))}: {words.acted} {row['refusals'][name]:.0f} of {row['n'][name]:.0f},"
        f" steered {row['steered'][name]:.0f}"
        for name in groups
    ]
    return "<br>".join([f"{dial}, alpha {number_text(float(alpha), signed=True)}", *lines])


def alpha_title(result: Mapping[str, Any]) -> str:
    """What a dial's alpha is, for an axis."""
    if result["edit"] == "project-out":
        return "alpha: share of the component that is removed"
    unit = "of the mean residual norm" if result["units"] == "norm" else "of the direction's own length"
    return f"alpha: {'component set to' if result['edit'] == 'clamp' else 'added'}, in units {unit}"


def kind_text(group: str, words: Words) -> str:
    """A group of prompts in the words of the behavior."""
    return {"toxic": words.positive, "safe": words.negative}.get(group, group)


def intents(words: Words) -> dict[str, str]:
    """What turns of the dial are for."""
    return {
        FORCE: f"forced: {words.negative} prompts, newly {words.acted}",
        SUPPRESS: f"suppressed: {words.positive} prompts, no longer {words.acted}",
    }


def _marks(candidates: pd.DataFrame, result: Mapping[str, Any]) -> list[str]:
    def mark(row: Mapping[Any, Any]) -> str:
        token = None if pd.isna(row["token"]) else int(row["token"])
        if (short_site(row["site"]), token) == (result["site"], result["token"]):
            return "★"
        return "×" if row["rejected"] else ""

    return [mark(row) for row in candidates.to_dict("records")]


def _hovers(candidates: pd.DataFrame) -> list[str]:
    return [
        f"<b>{short_site(row['site'])}</b>"
        + ("" if pd.isna(row["token"]) else f", token {int(row['token'])}")
        + f"<br>induced {number_text(row['induced'], signed=True)}, removed {number_text(row['removed'], signed=True)}"
        f" nats, KL {number_text(row['kl'])}"
        f"<br>{hover_text(row['rejected'] or 'passes')}"
        for row in candidates.to_dict("records")
    ]
