"""The page of a comparison of categories: overlaps with their dendrogram, transfer of circuits, the shared core."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from scipy.cluster.hierarchy import dendrogram

from sfc.circuits.overlap import MEASURES, Overlaps, cluster
from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import INK, QUIET, axis, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import hover_text, number_text, printable

_CELL, _FRAME = 44, 190
_GUIDE = (
    "<b>Overlap</b> is Jaccard's index of the nodes of two circuits of equal size: shared nodes over all of both. "
    "Off the diagonal it is the mean over the halves of two categories, on it that of the two halves of one: the most "
    "that can be expected, since all are found on as many prompts.",
    "<b>The tree</b> joins categories whose circuits are most alike first (average linkage of 1 − overlap).",
    "<b>Transfer</b>: how faithful the circuit of one category (rows) is on the test prompts of another (columns). "
    "1 is as good as the model itself.",
    "<b>The shared core</b> holds the nodes of more than half of the circuits. Kept alone it has the faithfulness of "
    "the first column; ablated it leaves the share in the second, 0 where nothing works without it. Beside it "
    "the share of replies to test prompts that refuse, with these nodes ablated and as the model is.",
    "<b>Edges</b> are the strongest by attribution between a circuit's nodes, as many of each circuit. Two circuits "
    "can only share an edge whose two ends they share.",
)


def write_comparison_page(
    path: Path, result: Mapping[str, Any], overlaps: Overlaps, transfer: pd.DataFrame, core: pd.DataFrame
) -> None:
    """Write the page, whole or not at all.

    Args:
        result: what `compare --json` prints.
        overlaps: by Jaccard's index, in the order of `result["categories"]`.
        transfer: columns `circuit, prompts, faithfulness, faithfulness_low, faithfulness_high`.
        core: columns `circuit, prompts, nodes, faithfulness, completeness_normalised` and their intervals; where
            replies were judged `n_replies, refused, refused_ablated` and the last one's interval.
    """
    title = f"Circuits of {len(result['categories'])} categories · {result['preset']}"
    sentence = f"{result['verdict']} Circuits of {result['size']} nodes by {result['method']}."
    body = f"""{header_html(title, sentence)}
<section class="card graph">{figure_html("overlap", overlap_figure(result, overlaps.between))}</section>
<section class="card graph">{figure_html("transfer", transfer_figure(result, transfer))}</section>
<section class="card scroll"><h2>Overlaps</h2>{_overlap_table(result)}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_GUIDE)}</section>
<section class="card scroll"><h2>The shared core and the rest, on test prompts</h2>{_core_table(core)}</section>"""
    write_document(path, title, body)


def overlap_figure(result: Mapping[str, Any], between: Float[np.ndarray, "categories categories"]) -> go.Figure:
    """The heat map in the order of the clustering, its tree above it.

    Args:
        between: overlaps by Jaccard's index, in the order of `result["categories"]`.
    """
    names = [hover_text(result["categories"][i]) for i in result["order"]]
    table = between[np.ix_(result["order"], result["order"])]
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.2, 0.8], vertical_spacing=0.01)
    height = round(_CELL * len(names) * 1.25) + _FRAME
    figure.update_layout(styled_figure("Overlap of circuits found on half of the prompts", height).layout)
    tree = dendrogram(cluster(between), no_plot=True)
    for x, y in zip(tree["icoord"], tree["dcoord"], strict=True):
        # scipy sets leaves at 5, 15, 25 …
        line = {"color": QUIET, "width": 1.5}
        figure.add_scatter(
            x=[(value - 5) / 10 for value in x],
            y=y,
            mode="lines",
            line=line,
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=1,
        )
    figure.add_trace(
        _heat_map(list(range(len(names))), names, table, "Jaccard's index", 0, float(np.nanmax(table))), 2, 1
    )
    figure.update_xaxes(axis("", showgrid=False, showticklabels=False), row=1, col=1)
    figure.update_yaxes(axis("1 − overlap", showgrid=False), row=1, col=1)
    figure.update_xaxes(
        axis("", showgrid=False, tickvals=list(range(len(names))), ticktext=names, tickangle=-40), row=2, col=1
    )
    figure.update_yaxes(axis("", showgrid=False, autorange="reversed"), row=2, col=1)
    return figure.update_layout(margin={"l": 110, "b": 100})


def transfer_figure(result: Mapping[str, Any], transfer: pd.DataFrame) -> go.Figure:
    """Faithfulness of each circuit (rows) on the prompts of each category (columns), in the order of the clustering."""
    order = [result["categories"][i] for i in result["order"]]
    table = transfer.pivot(index="circuit", columns="prompts", values="faithfulness").loc[order, order].astype(float)
    names = [hover_text(name) for name in order]
    figure = styled_figure(
        "Faithfulness of a category's circuit on another's test prompts", _CELL * len(order) + _FRAME
    )
    figure.add_trace(_heat_map(names, names, table.to_numpy(), "faithfulness", 0, 1.2))
    figure.update_xaxes(axis("prompts of", showgrid=False, tickangle=-40))
    figure.update_yaxes(axis("circuit of", showgrid=False, autorange="reversed"))
    return figure.update_layout(margin={"l": 110, "b": 120})


def _heat_map(x: list, y: list[str], table: np.ndarray, name: str, low: float, high: float) -> go.Heatmap:
    hovers = [[f"{a} and {b}" for b in y] for a in y]
    return go.Heatmap(
        x=x,
        y=y,
        z=[[None if np.isnan(value) else float(value) for value in row] for row in table],
        customdata=hovers,
        texttemplate="%{z:.2f}",
        colorscale="Cividis",
        zmin=low,
        zmax=high,
        colorbar={"title": {"text": name}, "outlinewidth": 0, "tickfont": {"color": INK}},
        hovertemplate=f"%{{customdata}}<br>{name} <b>%{{z:.3f}}</b><extra></extra>",
    )


def _overlap_table(result: Mapping[str, Any]) -> str:
    rows = [
        (
            MEASURES[name],
            number_text(found["within"]),
            number_text(found["between"]),
            "" if found["shuffled"] is None else number_text(found["shuffled"]),
            _with_interval(found, "difference"),
        )
        for name, found in result["overlap"].items()
    ]
    heads = ("overlap of", "halves of one category", "of two categories", "of shuffled pools", "first less second")
    return figures_table(heads, rows)


def _core_table(core: pd.DataFrame) -> str:
    replied = "refused" in core
    rows = [
        (
            printable(row["prompts"]),
            printable(row["circuit"]),
            f"{row['nodes']:,}",
            _with_interval(row, "faithfulness"),
            _with_interval(row, "completeness_normalised"),
            *((_with_interval(row, "refused_ablated"), number_text(row["refused"])) if replied else ()),
        )
        for _, row in core.iterrows()
    ]
    heads = ("prompts", "nodes kept or ablated", "nodes", "kept: faithfulness", "ablated: left")
    return figures_table((*heads, "ablated: refuses", "as it is: refuses") if replied else heads, rows)


def _with_interval(row: Mapping[str, Any] | pd.Series, name: str) -> str:
    if pd.isna(row[name]):
        return "not measurable"
    return f"{number_text(row[name])} ({number_text(row[f'{name}_low'])} to {number_text(row[f'{name}_high'])})"
