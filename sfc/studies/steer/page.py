"""What a conditional dial refuses beside an unconditional one: a figure, and both at equal refusal of toxic prompts.

Figures of what a dial costs: refusal of unsafe prompts against refusal of safe ones, and by type of prompt.

The page of a refusal dial: how its direction was chosen, what it does at every alpha, and what chance does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.core.sites import short_site
from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import AMBER, BLUE, GREEN, INK, LINE, PINK, QUIET, VERMILION, axis, remark, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import hover_text, number_text

_DIALS = {"unconditional": BLUE, "conditional": VERMILION}
_TOXIC = "toxic"


def conditional_figure(table: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """Refusal of toxic against that of other prompts, a panel per set of prompts and group; a point per alpha."""
    panels = [
        (data, group)
        for data, part in table.groupby("data", sort=False)
        for group in part["group"].unique()
        if group != _TOXIC
    ]
    condition = f"{result['conditional']['feature']} > {number_text(result['conditional']['above'])}"
    figure = styled_figure(f"Both dials: always, and where {condition}", 460)
    titles = [f"{data}: toxic against {group}" for data, group in panels]
    make_subplots(rows=1, cols=len(panels), figure=figure, subplot_titles=titles)
    for column, (data, group) in enumerate(panels, start=1):
        for dial, colour in _DIALS.items():
            of_dial = table[(table["data"] == data) & (table["dial"] == dial)]
            path = of_dial.pivot(index="alpha", columns="group", values=["rate", "refusals", "n", "steered"])
            trace = go.Scatter(
                x=path["rate"][group],
                y=path["rate"][_TOXIC],
                mode="lines+markers",
                line={"color": colour},
                marker={"size": 7},
                name=dial,
                legendgroup=dial,
                showlegend=column == 1,
                customdata=[
                    f"{dial}, alpha {number_text(float(alpha), signed=True)}<br>"  # pyright: ignore[reportArgumentType]
                    + "<br>".join(
                        f"{hover_text(name)}: refused {row['refusals'][name]:.0f} of {row['n'][name]:.0f}, steered"
                        f" {row['steered'][name]:.0f}"
                        for name in (_TOXIC, group)
                    )
                    for alpha, row in path.iterrows()
                ],
                hovertemplate="%{customdata}<extra></extra>",
            )
            figure.add_trace(trace, 1, column)
        still = table[(table["data"] == data) & (table["alpha"] == 0) & (table["dial"] == "unconditional")]
        if len(still):
            rates = still.set_index("group")["rate"]
            as_it_is = go.Scatter(
                x=[rates[group]],
                y=[rates[_TOXIC]],
                mode="markers",
                marker={"color": INK, "symbol": "x", "size": 12},
                name="as it is",
                showlegend=column == 1,
                hovertemplate="as it is<extra></extra>",
            )
            figure.add_trace(as_it_is, 1, column)
        shares = {"tickformat": ".0%", "range": [-0.03, 1.03]}
        figure.update_xaxes(axis(f"{group} prompts refused", **shares), row=1, col=column)
        figure.update_yaxes(axis("toxic prompts refused", **shares), row=1, col=column)
    return figure.update_layout(margin={"t": 120}, legend={"y": 1.1})


def matched_html(result: Mapping[str, Any]) -> str:
    """The shares that both dials refuse of each group where they refuse equally many toxic prompts, as tables."""
    parts = []
    for data, rows in result["conditional"]["matched"].items():
        columns = [name for name in rows[0] if name != _TOXIC]
        titles = [f"{data}: toxic refused", *(name.replace("_", ", ") for name in columns)]
        cells = [[_share(row[name]) for name in (_TOXIC, *columns)] for row in rows]
        parts.append(figures_table(titles, cells))
    return "".join(parts)


def _share(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0%}"


def alpha_title(result: Mapping[str, Any]) -> str:
    """What a dial's alpha is, for an axis."""
    if result["edit"] == "project-out":
        return "alpha: share of the component that is removed"
    unit = "of the mean residual norm" if result["units"] == "norm" else "of the direction's own length"
    return f"alpha: {'component set to' if result['edit'] == 'clamp' else 'added'}, in units {unit}"


def trade_off_figure(points: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """A point per alpha, joined in their order, with Wilson intervals; grey: random directions at the chosen alphas."""
    figure = styled_figure("XSTest: refusal of unsafe against refusal of safe prompts", 520)
    own = points["direction"] == result["direction"]
    curve, chance = points[own].sort_values("alpha"), points[~own]
    for rows, name, mode, colour in (
        (chance, "random", "markers", QUIET),
        (curve, "the dial", "lines+markers+text", BLUE),
    ):
        trace = go.Scatter(
            x=rows["safe"],
            y=rows["unsafe"],
            mode=mode,
            marker={"color": colour, "size": 8, "opacity": 0.5 if name == "random" else 1},
            text=[number_text(alpha, signed=True) for alpha in rows["alpha"]] if name == "the dial" else None,
            textposition="top left",
            name=name,
            customdata=[
                f"{hover_text(row['direction'])}, alpha {number_text(row['alpha'], signed=True)}<br>"
                f"unsafe {row['unsafe']:.0%} of {row['n_unsafe']}, safe {row['safe']:.0%} of {row['n_safe']}"
                for row in rows.to_dict("records")
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
        if name == "the dial":
            for side, ends in (("safe", "error_x"), ("unsafe", "error_y")):
                high, low = rows[f"{side}_high"] - rows[side], rows[side] - rows[f"{side}_low"]
                trace.update({ends: {"type": "data", "array": high, "arrayminus": low, "thickness": 0.7, "width": 0}})
        figure.add_trace(trace)
    for name, colour, symbol, point in (
        ("as it is", INK, "x", result["xstest"]["unsteered"]),
        ("best defensive point", GREEN, "star", result["xstest"]["best_defence"]),
    ):
        if point is not None:
            marker = {"color": colour, "symbol": symbol, "size": 14}
            figure.add_trace(
                go.Scatter(x=[point["safe"]], y=[point["unsafe"]], mode="markers", marker=marker, name=name)
            )
    if result["xstest"]["best_defence"] is None:
        remark(figure, "no alpha raises the refusal of unsafe prompts and not that of safe ones")
    shares = {"tickformat": ".0%", "range": [-0.03, 1.03]}
    return figure.update_layout(
        xaxis=axis("safe prompts refused", **shares), yaxis=axis("unsafe prompts refused", **shares)
    )


def types_figure(rates: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """Share refused, per type of prompt and alpha: a heat map for safe types and one for unsafe ones."""
    labels = [label for label in ("safe", "toxic") if label in set(rates["label"])]
    height = 130 + 26 * int(rates.groupby("label")["category"].nunique().max())
    figure = styled_figure("XSTest: refused, by type of prompt", height)
    titles = [{"safe": "safe", "toxic": "unsafe"}[label] for label in labels]
    make_subplots(rows=1, cols=len(labels), figure=figure, subplot_titles=titles, horizontal_spacing=0.22)
    for column, label in enumerate(labels, start=1):
        cells = rates[rates["label"] == label].pivot(index="category", columns="alpha", values="rate")
        counts = rates[rates["label"] == label].pivot(index="category", columns="alpha", values="refusals")
        heat_map = go.Heatmap(
            x=[number_text(float(alpha), signed=True) for alpha in cells.columns],
            y=[hover_text(str(kind)) for kind in cells.index],
            z=cells.to_numpy().tolist(),
            customdata=counts.to_numpy().tolist(),
            hovertemplate="%{y}, alpha %{x}: <b>%{z:.0%}</b> (%{customdata})<extra></extra>",
            colorscale=[[0, "#ffffff"], [1, VERMILION]],
            zmin=0,
            zmax=1,
            showscale=column == len(labels),
            colorbar={"thickness": 10, "tickformat": ".0%"},
            xgap=1,
            ygap=1,
        )
        figure.add_trace(heat_map, 1, column)
        figure.update_xaxes(axis(alpha_title(result), showgrid=False, type="category"), row=1, col=column)
        figure.update_yaxes(axis("", showgrid=False, type="category"), row=1, col=column)
    return figure.update_layout(margin={"l": 190, "t": 84})


_LISTED = 15
_COLOURS = (VERMILION, BLUE, GREEN, PINK, AMBER, INK)
_MEASURES = {
    "induced": "induced: safe prompts, turned up",
    "removed": "removed: toxic prompts, turned down",
    "kl": "KL on safe prompts, turned down",
}
_CONTROLS = ("held_out_rate", "random_mean", "random_highest", "shuffled_mean", "shuffled_highest")
_INTENTS = {"force": "refusal forced on safe prompts", "suppress": "refusal suppressed on toxic prompts"}


def write_steering_page(path: Path, tables: Mapping[str, pd.DataFrame], result: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all.

    Args:
        tables: `candidates` as `candidate_table` makes it; `rates` of the sweep per site, alpha and label, with
            `loss_rise` and `later_loss_rise`; `controls`, rates of the control directions per alpha; `directions` as
            `subspace_table` makes it; `writers` and, where asked for, `features` as `sfc.studies.steer.writers` makes
            them; where XSTest was steered its `trade_off` (see `sfc.studies.steer.sweep`) and `xstest_rates` per label,
            category and alpha; with a condition `conditional` (see `sfc.studies.steer.conditional`), per `data`.
        result: what `steer --json` prints.
    """
    candidates, dial, controls = tables["candidates"], tables["rates"], tables["controls"]
    title = f"Refusal dial · {result['direction']} · {result['preset']}"
    figures = [
        candidates_figure(candidates, result),
        dial_figure(dial, result),
        cost_figure(dial, result),
        *([controls_figure(controls, result)] if result["operating_points"] else []),
        *([trade_off_figure(tables["trade_off"], result)] if "trade_off" in tables else []),
        *([types_figure(tables["xstest_rates"], result)] if "xstest_rates" in tables else []),
        *([conditional_figure(tables["conditional"], result)] if "conditional" in tables else []),
    ]
    cards = "".join(
        f'<section class="card scroll">{figure_html(f"figure-{number}", figure)}</section>\n'
        for number, figure in enumerate(figures)
    )
    body = f"""{header_html(title, _sentence(result))}
<section class="card scroll"><h2>Operating points, on test prompts</h2>{_points_table(result)}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_GUIDE)}</section>
{cards}{_matched_card(result)}
<section class="card scroll"><h2>Several directions</h2>{_directions_table(tables["directions"])}</section>
<section class="card scroll"><h2>What writes the direction</h2>{_writers_table(tables["writers"])}</section>
{_features_card(tables["features"]) if "features" in tables else ""}
<section class="card scroll"><h2>Candidates</h2>{_candidates_table(candidates)}</section>"""
    write_document(path, title, body)


def candidates_figure(candidates: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """What every candidate does: a heat map per measure, sites against tokens; a cross marks the rejected ones."""
    sites = list(dict.fromkeys(candidates["site"]))
    labels = [short_site(site) for site in sites]
    figure = styled_figure("Candidates, on prompts they were not learned from", 190 + 26 * max(5, len(sites)))
    make_subplots(rows=1, cols=3, figure=figure, subplot_titles=list(_MEASURES.values()), horizontal_spacing=0.11)
    tokens = ["any" if pd.isna(token) else str(int(token)) for token in candidates["token"]]
    rows = candidates.assign(place=tokens, mark=_marks(candidates, result), hover=_hovers(candidates))
    across = list(dict.fromkeys(tokens))
    for column, measure in enumerate(_MEASURES, start=1):
        cells = {
            name: rows.pivot(index="site", columns="place", values=name).reindex(index=sites, columns=across)
            for name in (measure, "mark", "hover")
        }
        heat_map = go.Heatmap(
            x=across,
            y=labels,
            z=cells[measure].astype(object).where(cells[measure].notna(), None).to_numpy().tolist(),
            text=cells["mark"].to_numpy().tolist(),
            texttemplate="%{text}",
            customdata=cells["hover"].to_numpy().tolist(),
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=[[0, "#ffffff"], [1, BLUE]]
            if measure == "kl"
            else [[0, BLUE], [0.5, "#ffffff"], [1, VERMILION]],
            zmid=None if measure == "kl" else 0,
            colorbar={"thickness": 10, "x": (column - 1) * 0.37 + 0.265, "xanchor": "left"},
            xgap=1,
            ygap=1,
        )
        figure.add_trace(heat_map, 1, column)
        figure.update_xaxes(axis("token read, from the end", showgrid=False, type="category"), row=1, col=column)
        figure.update_yaxes(axis("", showgrid=False, type="category", showticklabels=column == 1), row=1, col=column)
    return figure.update_layout(margin={"t": 84, "l": 96})


def dial_figure(dial: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """Judged refusals against alpha, with Wilson intervals: a panel per label, a line per site of the sweep."""
    labels = [label for label in ("safe", "toxic") if label in set(dial["label"])]
    figure = styled_figure("The dial: judged refusals on test prompts", 460)
    titles = [f"{label} prompts" for label in labels]
    make_subplots(rows=1, cols=len(labels), figure=figure, subplot_titles=titles)
    for column, label in enumerate(labels, start=1):
        for number, (site, line) in enumerate(dial[dial["label"] == label].groupby("site", sort=False)):
            trace = go.Scatter(
                x=line["alpha"],
                y=line["rate"],
                error_y={
                    "type": "data",
                    "array": line["high"] - line["rate"],
                    "arrayminus": line["rate"] - line["low"],
                    "thickness": 1,
                    "width": 0,
                },
                mode="lines+markers",
                line={"color": _COLOURS[number % len(_COLOURS)]},
                name=short_site(str(site)),
                legendgroup=str(site),
                showlegend=column == 1,
                customdata=[
                    f"{short_site(str(site))}, alpha {number_text(row['alpha'], signed=True)}<br>"
                    f"refused {row['refusals']} of {row['n']}<br>mean score {number_text(row['score'], signed=True)}"
                    for row in line.to_dict("records")
                ],
                hovertemplate="%{customdata}<extra></extra>",
            )
            figure.add_trace(trace, 1, column)
        figure.update_xaxes(axis(alpha_title(result)), row=1, col=column)
        figure.update_yaxes(axis("refused", tickformat=".0%", range=[-0.02, 1.02]), row=1, col=column)
    return figure.update_layout(margin={"t": 120}, legend={"y": 1.1})


def cost_figure(dial: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """How far the cross-entropy of ordinary replies rises at each alpha; dotted without their opening tokens."""
    figure = styled_figure("What it costs: cross-entropy of ordinary replies", 380)
    for number, (site, line) in enumerate(dial.drop_duplicates(["site", "alpha"]).groupby("site", sort=False)):
        for column, dash, note in (
            ("loss_rise", "solid", ""),
            ("later_loss_rise", "dot", ", without the opening token"),
        ):
            trace = go.Scatter(
                x=line["alpha"],
                y=line[column],
                mode="lines+markers",
                line={"color": _COLOURS[number % len(_COLOURS)], "dash": dash},
                name=short_site(str(site)),
                legendgroup=str(site),
                showlegend=dash == "solid",
                hovertemplate=f"{short_site(str(site))}{note}: <b>%{{y:+.1%}}</b> at %{{x}}<extra></extra>",
            )
            figure.add_trace(trace)
    figure.add_hline(y=result["max_loss"], line={"color": QUIET, "dash": "dash", "width": 1})
    return figure.update_layout(
        margin={"t": 84}, xaxis=axis(alpha_title(result)), yaxis=axis("rise", tickformat="+.0%", zeroline=True)
    )


def controls_figure(controls: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """Replies changed as intended at the chosen alphas: the direction, and each of shuffled labels and at random."""
    points = result["operating_points"]
    figure = styled_figure("Against chance: replies changed as intended, equal norm at the same place", 380)
    make_subplots(rows=1, cols=len(points), figure=figure, subplot_titles=[_INTENTS[intent] for intent in points])
    for column, point in enumerate(points.values(), start=1):
        rows = controls[(controls["alpha"] == point["alpha"]) & (controls["label"] == point["prompts"])]
        others = rows[rows["changed_rate"].notna()]
        chosen = go.Scatter(
            x=[result["direction"]],
            y=[point["changed_rate"]],
            error_y={
                "type": "data",
                "array": [(point["changed_high"] or 0) - (point["changed_rate"] or 0)],
                "arrayminus": [(point["changed_rate"] or 0) - (point["changed_low"] or 0)],
                "thickness": 1,
            },
            mode="markers",
            marker={"color": VERMILION, "size": 12, "symbol": "diamond"},
            hovertemplate=f"{point['changed']} of {point['eligible']}<extra></extra>",
        )
        strip = go.Scatter(
            x=others["direction"].str.replace(r" \d+$", "", regex=True),
            y=others["changed_rate"].astype(float),
            mode="markers",
            marker={"color": QUIET, "size": 8, "opacity": 0.55},
            customdata=others["direction"],
            hovertemplate="%{customdata}: <b>%{y:.0%}</b><extra></extra>",
        )
        for trace in (chosen, strip):
            figure.add_trace(trace.update(showlegend=False), 1, column)
        figure.update_xaxes(axis("", type="category", gridcolor=LINE), row=1, col=column)
        figure.update_yaxes(axis("changed", tickformat=".0%", range=[-0.03, 1.03]), row=1, col=column)
    return figure


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


def _sentence(result: Mapping[str, Any]) -> str:
    token = "" if result["token"] is None else f", learned at token {result['token']}"
    steered = f"{result['positions']}{' and the reply' if result['during_reply'] else ''}"
    return (
        f"{result['edit']} at {result['site']}{token}; steered tokens: {steered}. "
        f"{result['n_candidates']} candidates tried, {result['n_rejected']} rejected. Mean refusal score as it is: safe"
        f" {number_text(result['unsteered']['safe'], signed=True)}, toxic "
        f"{number_text(result['unsteered']['toxic'], signed=True)} nats."
    )


_GUIDE = (
    "<b>Three splits.</b> Directions are learned on discovery prompts, candidates and alphas are chosen on folds of "
    "them that the direction was not learned from, and everything else here is measured on test prompts.",
    "<b>Candidates.</b> Induced: mean refusal score of safe prompts with the dial turned up. Removed: that of toxic "
    "prompts with the dial turned down. A cross marks a rejected one (the hover says why), a star the chosen one: "
    "among those that pass, the one with the widest swing, induced - removed.",
    "<b>Changed</b> counts a reply only if the turn of the dial was meant to change it so: forced, a prompt that was "
    "not refused before and is now; suppressed, one that was refused and no longer is. A reply may change to nonsense,"
    " which is what the cost beside it is for.",
    "<b>Cost.</b> The base model's replies to safe test prompts, teacher-forced, with the same tokens steered. A forced"
    " refusal replaces the opening token, which counts in the solid line and not in the dotted one.",
    "<b>What writes it.</b> Components along the direction of what heads and MLPs write, on test prompts: the shares "
    "of all of them sum to 1. Lost without it: the part of the difference at the site that is gone when this output is "
    "set to its mean on safe prompts; score, the change of toxic prompts' mean refusal score by the same.",
    "<b>Against chance.</b> The same amount along random directions and along differences of means between prompts "
    "dealt to two sides by lot.",
)


def _points_table(result: Mapping[str, Any]) -> str:
    titles = [
        "what", "alpha", "changed", "95 %", "held-out folds", "random, mean", "random, highest", "shuffled, mean",
        "shuffled, highest", "cross-entropy", "without opening", "KL",
    ]  # fmt: skip
    rows = [
        [
            _INTENTS[intent],
            number_text(point["alpha"], signed=True),
            f"{point['changed']} of {point['eligible']}",
            f"{_percent(point['changed_low'])} to {_percent(point['changed_high'])}",
            *(_percent(point[name]) for name in _CONTROLS),
            *(_percent(point[name], signed=True) for name in ("loss_rise", "later_loss_rise")),
            number_text(point["kl"]),
        ]
        for intent, point in result["operating_points"].items()
    ]
    return figures_table(titles, rows)


def _matched_card(result: Mapping[str, Any]) -> str:
    if not result["conditional"]:
        return ""
    title = "Both dials at equal refusal of toxic prompts (interpolated between alphas)"
    return f'<section class="card scroll"><h2>{title}</h2>{matched_html(result)}</section>\n'


def _directions_table(directions: pd.DataFrame) -> str:
    titles = [
        "contrast", "cosine with the chosen one", "length", "in the span of the others", "effect", "of that part",
        "of the rest",
    ]  # fmt: skip
    rows = [
        [
            str(row["direction"]),
            number_text(row["cosine"], signed=True),
            number_text(row["length"]),
            _percent(row["span_share"]),
            *(number_text(row[name], signed=True) for name in ("effect", "effect_in_span", "effect_outside")),
        ]
        for row in directions.to_dict("records")
    ]
    return figures_table(titles, rows)


def _writers_table(writers: pd.DataFrame) -> str:
    titles = ["component", "toxic", "safe", "share of the difference", "q", "lost without it", "score without it"]
    rows = [
        [
            str(row["component"]),
            *(number_text(row[name], signed=True) for name in ("toxic", "safe")),
            _percent(row["share"], signed=True),
            number_text(row["q_value"]),
            _percent(row["lost_share"], signed=True) if pd.notna(row["lost_share"]) else "",
            number_text(row["score_change"], signed=True) if pd.notna(row["score_change"]) else "",
        ]
        for row in writers.head(_LISTED).to_dict("records")
    ]
    return figures_table(titles, rows)


def _features_card(features: pd.DataFrame) -> str:
    rows = [
        [str(row["feature"]), number_text(row["cosine"], signed=True)]
        for row in features.head(_LISTED).to_dict("records")
    ]
    table = figures_table(["feature", "cosine"], rows)
    return f'<section class="card scroll"><h2>SAE features along the direction</h2>{table}</section>'


def _candidates_table(candidates: pd.DataFrame) -> str:
    titles = ["site", "token", "length", "agreement", "induced", "removed", "KL", "rejected"]
    ordered = candidates.sort_values(["rejected", "removed"], key=lambda c: c != "" if c.name == "rejected" else c)
    rows = [
        [
            short_site(row["site"]),
            "" if pd.isna(row["token"]) else str(int(row["token"])),
            number_text(row["length"]),
            number_text(row["agreement"]),
            *(number_text(row[name], signed=True) for name in ("induced", "removed")),
            number_text(row["kl"]),
            row["rejected"],
        ]
        for row in ordered.to_dict("records")
    ]
    return figures_table(titles, rows)


def _percent(value: float | None, signed: bool = False) -> str:
    if value is None or pd.isna(value):
        return "not measurable"
    return f"{value:{'+.1' if signed else '.0'}%}".replace("-", "−")
