"""The page of activation patching: heat maps of effects by layer and position, and by layer and head."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import INK, QUIET, axis, signs, styled_figure
from sfc.pages.text import hover_text, number_text, printable

_KINDS = {"resid": "residual stream", "attn": "attention output", "mlp": "MLP output", "head": "heads"}
_DIRECTIONS = {"denoise": "Denoising: clean into corrupted", "noise": "Noising: corrupted into clean"}
_RAISES, _LOWERS, _ = (sign.colour for sign in signs(nx.DiGraph()))
_SCALE = [[0, _LOWERS], [0.5, "#ffffff"], [1, _RAISES]]
_COLOURS = dict(zip(_KINDS, (INK, "#009e73", "#cc79a7", _LOWERS), strict=True))
_SIGNIFICANT = 0.05
_HEADS_A_ROW = 4


def write_patching_page(path: Path, effects: pd.DataFrame, result: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all.

    Args:
        effects: as `sfc.studies.patch.ranking.effect_table` makes it.
        result: what `patch --json` prints.
    """
    title = f"Activation patching · {result['pairs']} · {result['preset']}"
    sets = list(result["n_pairs_at"])
    single, ranges = effects[~effects["is_range"]], effects[effects["is_range"]]
    figures = [
        *(figure for direction in single["direction"].unique() for figure in _maps(single, str(direction), sets)),
        *([cumulative_figure(ranges)] if len(ranges) else []),
        agreement_figure(single, result["agreement"]),
    ]
    cards = "".join(
        f'<section class="card scroll">{figure_html(f"figure-{number}", figure)}</section>\n'
        for number, figure in enumerate(figures)
    )
    body = f"""{header_html(title, _sentence(result))}
<section class="card"><h2>How to read this page</h2>{guide_html(_GUIDE)}</section>
{cards}<section class="card scroll"><h2>Critical components</h2>{_table(result["critical"])}</section>"""
    write_document(path, title, body)


def positions_figure(effects: pd.DataFrame, direction: str, sets: Sequence[str]) -> go.Figure:
    """One heat map per kind but heads: layers against position sets, in this order; the colour scale common to all."""
    kinds = [kind for kind in _KINDS if kind in set(effects["kind"]) and kind != "head"]
    rows = effects[(effects["direction"] == direction) & effects["kind"].isin(kinds)]
    figure = _grid([_KINDS[kind] for kind in kinds], len(kinds), direction, _height(rows))
    for column, kind in enumerate(kinds, start=1):
        of_kind = rows[rows["kind"] == kind]
        figure.add_trace(_heat_map(of_kind, "positions", sets, _largest(rows)), 1, column)
        figure.update_xaxes(axis("positions", showgrid=False, type="category"), row=1, col=column)
        figure.update_yaxes(axis("layer" if column == 1 else "", showgrid=False), row=1, col=column)
    return figure


def heads_figure(effects: pd.DataFrame, direction: str, sets: Sequence[str]) -> go.Figure:
    """One heat map per position set, in this order: layers against heads."""
    rows = effects[(effects["direction"] == direction) & (effects["kind"] == "head")]
    heads = list(range(int(rows["head"].max()) + 1))
    figure = _grid([f"heads at {name}" for name in sets], min(len(sets), _HEADS_A_ROW), direction, _height(rows))
    for number, name in enumerate(sets):
        row, column = number // _HEADS_A_ROW + 1, number % _HEADS_A_ROW + 1
        figure.add_trace(_heat_map(rows[rows["positions"] == name], "head", heads, _largest(rows)), row, column)
        figure.update_xaxes(axis("head", showgrid=False, tickformat="d"), row=row, col=column)
        figure.update_yaxes(axis("layer" if column == 1 else "", showgrid=False), row=row, col=column)
    return figure


def cumulative_figure(ranges: pd.DataFrame) -> go.Figure:
    """Effect of patching all layers up to each, with the 95 % interval: a line per direction, kind and position set."""
    figure = styled_figure("All layers from the first to this one at once", 460)
    for (direction, kind, positions), group in ranges.groupby(["direction", "kind", "positions"], sort=False):
        line = group.sort_values("layer")
        figure.add_trace(
            go.Scatter(
                x=line["layer"],
                y=line["effect"],
                error_y={
                    "type": "data",
                    "array": line["high"] - line["effect"],
                    "arrayminus": line["effect"] - line["low"],
                    "thickness": 1,
                    "width": 0,
                },
                mode="lines+markers",
                line={"color": _COLOURS[str(kind)], "dash": "solid" if direction == "denoise" else "dot"},
                name=f"{direction}, {_KINDS[str(kind)]}, {hover_text(str(positions))}",
                customdata=_hovers(line),
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    return figure.update_layout(
        margin={"t": 120}, xaxis=axis("last layer of the range", tickformat="d"), yaxis=axis("effect", zeroline=True)
    )


def agreement_figure(effects: pd.DataFrame, agreement: list[dict[str, Any]]) -> go.Figure:
    """Exact against first-order effects, one panel per direction, with the line on which they are equal."""
    directions = list(dict.fromkeys(effects["direction"]))
    titles = [_DIRECTIONS[direction] for direction in directions]
    figure = make_subplots(
        rows=1, cols=len(directions), subplot_titles=titles, figure=styled_figure("Exact and first-order effects", 520)
    )
    correlations = {(row["direction"], row["kind"]): row["pearson"] for row in agreement}
    for column, direction in enumerate(directions, start=1):
        rows = effects[effects["direction"] == direction].dropna(subset=["effect", "first_order"])
        ends = [float(rows[["effect", "first_order"]].min().min()), float(rows[["effect", "first_order"]].max().max())]
        equal = go.Scatter(x=ends, y=ends, mode="lines", line={"color": QUIET, "width": 1}, showlegend=False)
        figure.add_trace(equal.update(hoverinfo="skip"), 1, column)
        for kind, group in rows.groupby("kind", sort=False):
            name = f"{_KINDS[str(kind)]}, {direction}: r = {number_text(correlations.get((direction, kind)))}"
            points = go.Scatter(
                x=group["effect"],
                y=group["first_order"],
                mode="markers",
                marker={"color": _COLOURS[str(kind)], "size": 7, "opacity": 0.7},
                name=name,
                customdata=_hovers(group),
                hovertemplate="%{customdata}<extra></extra>",
            )
            figure.add_trace(points, 1, column)
        figure.update_xaxes(axis("exact effect"), row=1, col=column)
        figure.update_yaxes(axis("first-order effect" if column == 1 else ""), row=1, col=column)
    return figure.update_layout(margin={"t": 140}, legend={"y": 1.08})


def _maps(effects: pd.DataFrame, direction: str, sets: Sequence[str]) -> Iterator[go.Figure]:
    kinds = set(effects["kind"])
    if kinds - {"head"}:
        yield positions_figure(effects, direction, sets)
    if "head" in kinds:
        yield heads_figure(effects, direction, sets)


def _grid(titles: list[str], columns: int, direction: str, height: int) -> go.Figure:
    rows = -(-len(titles) // columns)
    escaped = [hover_text(title) for title in titles]
    frame = styled_figure(_DIRECTIONS[direction], 40 + rows * (height + 90))
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=escaped, figure=frame, vertical_spacing=0.2 / rows)
    return figure.update_layout(margin={"t": 84})


def _heat_map(rows: pd.DataFrame, across: str, columns: Sequence[Any], largest: float) -> go.Heatmap:
    """Effects, layers upwards; a dot marks those with q of at most 0.05."""
    cells = rows.assign(hover=_hovers(rows), mark=np.where(rows["q_value"] <= _SIGNIFICANT, "•", ""))
    tables = {
        name: cells.pivot(index="layer", columns=across, values=name)[list(columns)]
        for name in ("effect", "hover", "mark")
    }
    return go.Heatmap(
        x=[hover_text(column) if isinstance(column, str) else column for column in columns],
        y=[int(layer) for layer in tables["effect"].index],
        z=tables["effect"].astype(object).where(tables["effect"].notna(), None).to_numpy().tolist(),
        customdata=tables["hover"].to_numpy().tolist(),
        text=tables["mark"].to_numpy().tolist(),
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=_SCALE,
        zmin=-largest,
        zmax=largest,
        zmid=0,
        colorbar={"title": {"text": "effect"}, "thickness": 12},
        xgap=1,
        ygap=1,
    )


def _hovers(rows: pd.DataFrame) -> list[str]:
    return [
        f"<b>{hover_text(row['component'])}</b> at {hover_text(row['positions'])}<br>"
        f"effect <b>{number_text(row['effect'], signed=True)}</b>"
        f" (95 %: {number_text(row['low'], signed=True)} to {number_text(row['high'], signed=True)})<br>"
        f"first order {number_text(row['first_order'], signed=True)}<br>"
        f"q = {number_text(row['q_value'])}, {row['n_pairs']} pairs"
        for row in rows.to_dict("records")
    ]


def _largest(rows: pd.DataFrame) -> float:
    largest = float(rows["effect"].abs().max()) if rows["effect"].notna().any() else 1.0
    return max(largest, 1e-3)


def _height(rows: pd.DataFrame) -> int:
    return max(220, 16 * rows["layer"].nunique())


def _sentence(result: Mapping[str, Any]) -> str:
    lost = "; ".join(f"{count}: {reason}" for reason, count in result["lost"].items())
    requirement = {
        "behaviour": "The clean prompt of each was refused and the corrupted one was not, by the judged replies.",
        "score": "Chosen by the refusal score alone: what the model says was NOT asked, so that this page is about the"
        " score and not about behaviour.",
    }
    return (
        f"{result['n_pairs']} of {result['n_tried']} pairs used" + (f" (lost {lost})" if lost else "") + ". "
        f"{requirement[result['require']]} Mean refusal score: clean "
        f"{number_text(result['clean_score'], signed=True)}, corrupted "
        f"{number_text(result['corrupted_score'], signed=True)} nats. {result['n_critical']} of "
        f"{result['n_components']} components have q ≤ {_SIGNIFICANT}."
    )


_GUIDE = (
    "<b>Effect</b> = (s_patched − s_base) / (s_source − s_base), means over pairs above and below the line. Denoising "
    "puts activations of the clean (refused) run into the corrupted one: 0 leaves it corrupted, 1 brings the clean "
    "score back: what suffices. Noising goes the other way: what is needed. Orange carries refusal, blue opposes it.",
    "<b>Certainty.</b> Intervals of 95 % come from resampling pairs. q is the false discovery rate at which a "
    "component counts, over all components of its kind and direction (sign-flip test, Benjamini and Hochberg); a dot "
    f"marks q ≤ {_SIGNIFICANT}.",
    "<b>Positions</b> correspond by role: last is where the reply begins, suffix the template after the prompt, "
    "content the prompt. A pair counts only at positions where both prompts correspond; the hover says how many do.",
    "<b>First order</b>: the gradient at the base run times the difference of the activations. Where it strays from "
    "the line, the model is not linear between the two runs, and the exact effect counts.",
)


def _table(critical: list[dict[str, Any]]) -> str:
    if not critical:
        return "<p>None: no component is told from chance.</p>"
    head = "".join(
        f'<th scope="col" class="{style}">{name}</th>'
        for name, style in (
            ("direction", ""), ("component", ""), ("positions", ""), ("pairs", "number"), ("effect", "number"),
            ("95 %", "number"), ("q", "number"), ("first order", "number"),
        )
    )  # fmt: skip
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(_table_row, critical))}</tbody></table>"


def _table_row(row: dict[str, Any]) -> str:
    texts = [row["direction"], row["component"], row["positions"]]
    numbers = [
        str(row["n_pairs"]),
        number_text(row["effect"], signed=True),
        f"{number_text(row['low'], signed=True)} to {number_text(row['high'], signed=True)}",
        number_text(row["q_value"]),
        number_text(row["first_order"], signed=True),
    ]
    cells = [f"<td>{escape(printable(str(text)))}</td>" for text in texts]
    cells += [f'<td class="number">{escape(text)}</td>' for text in numbers]
    return f"<tr>{''.join(cells)}</tr>"
