"""The page of a refusal dial: how its direction was chosen, what it does at every alpha, and what chance does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.sites import short_site
from sfc.viewer.document import figure_html, guide_html, header_html, write_document
from sfc.viewer.steering_condition import conditional_figure, matched_html
from sfc.viewer.steering_trade_off import alpha_title, trade_off_figure, types_figure
from sfc.viewer.style import AMBER, BLUE, GREEN, INK, LINE, PINK, QUIET, VERMILION, axis, styled_figure
from sfc.viewer.table import figures_table
from sfc.viewer.text import hover_text, number_text

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
        tables: `candidates` as `sfc.steering.select.candidate_table` makes it; `rates` of the sweep per site, alpha and
            label, with `loss_rise` and `later_loss_rise`; `controls`, rates of the control directions per alpha;
            `directions` as `sfc.steering.controls.subspace_table` makes it; `writers` and, where asked for, `features`
            as `sfc.steering.writers` makes them; and where XSTest was steered its `trade_off` (see
            `sfc.steering.trade_off`) and `xstest_rates` per label, category and alpha; with a condition `conditional`
            (see `sfc.steering.conditional`), per `data`.
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
