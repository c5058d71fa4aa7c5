"""The page of a comparison of categories: overlaps with their dendrogram, transfer of circuits, the shared core."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from scipy.cluster.hierarchy import dendrogram

from sfc.behaviors.behavior import Words
from sfc.core.artifacts import json_records
from sfc.pages.blocks import Figure, Formula, Page, Paragraph, Section, Table, cell, figure_cell
from sfc.pages.style import INK, QUIET, axis, styled_figure
from sfc.pages.text import hover_text
from sfc.studies.compare.overlap import MEASURES, between_halves, cluster
from sfc.studies.study import Finished

_CELL, _FRAME = 44, 190
_OVERLAP = "Overlap of circuits found on half of the prompts"
_TRANSFER = "Faithfulness of a category's circuit on another's test prompts"


def page(finished: Finished) -> Page:
    """The page of a finished comparison."""
    result, words = finished.result, finished.words
    in_order = [result["categories"][number] for number in result["order"]]
    between = between_halves(finished.table("overlap.csv"), result["categories"])
    transfer = transfer_table(finished.table("transfer.csv"), in_order)
    overlaps = pd.DataFrame(between, result["categories"], result["categories"]).loc[in_order, in_order]
    nodes = result["overlap"]["jaccard"]
    return Page(
        title=f"Circuits of {len(in_order)} categories · {result['preset']}",
        sentence=(
            f"Do {len(in_order)} categories share one mechanism? Circuits of {result['size']} nodes, found by"
            f" {result['method']}."
        ),
        summary=[_overlap_table(result), Paragraph(result["verdict"])],
        sections=[
            Section("", [Figure("overlap", lambda: overlap_figure(result, between), _matrix(_OVERLAP, "", overlaps))]),
            Section(
                "", [Figure("transfer", lambda: transfer_figure(transfer), _matrix(_TRANSFER, "circuit", transfer))]
            ),
            Section("The shared core and the rest, on test prompts", [_core_table(finished.table("core.csv"), words)]),
        ],
        guide=_guide(words),
        findings=[
            ("overlap of nodes (Jaccard), two halves of one category", cell(nodes["within"])),
            ("overlap of nodes (Jaccard), halves of two categories", cell(nodes["between"])),
            ("their difference", figure_cell(nodes, "difference")),
            ("nodes of the shared core", cell(len(result["core_nodes"]))),
        ],
        methods=_METHODS,
        limits=[
            f"How far circuits overlap depends on their size: all have {result['size']} nodes, whatever size each"
            " category's discovery would choose."
        ],
    )


def overlap_figure(result: Mapping[str, Any], between: Float[np.ndarray, "categories categories"]) -> go.Figure:
    """The heat map in the order of the clustering, its tree above it.

    Args:
        between: overlaps by Jaccard's index, in the order of `result["categories"]`.
    """
    names = [hover_text(result["categories"][i]) for i in result["order"]]
    table = between[np.ix_(result["order"], result["order"])]
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.2, 0.8], vertical_spacing=0.01)
    height = round(_CELL * len(names) * 1.25) + _FRAME
    figure.update_layout(styled_figure(_OVERLAP, height).layout)
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


def transfer_table(transfer: pd.DataFrame, categories: list[str]) -> pd.DataFrame:
    """Faithfulness of each category's circuit (rows) on the prompts of each category (columns), in this order."""
    table = transfer.pivot(index="circuit", columns="prompts", values="faithfulness")
    return table.loc[categories, categories].astype(float)


def transfer_figure(table: pd.DataFrame) -> go.Figure:
    """The heat map of a `transfer_table`."""
    names = [hover_text(name) for name in table.index]
    figure = styled_figure(_TRANSFER, _CELL * len(names) + _FRAME)
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


def _matrix(title: str, corner: str, values: pd.DataFrame) -> Table:
    """A heat map as a table."""
    rows = [[str(name), *map(cell, row)] for name, row in zip(values.index, values.to_numpy().tolist(), strict=True)]
    return Table(title, [corner, *map(str, values.columns)], rows)


def _overlap_table(result: Mapping[str, Any]) -> Table:
    heads = (
        "overlap of", "halves of one category", "of two categories", "of shuffled pools", "random circuits",
        "first less second",
    )  # fmt: skip
    rows = [
        (
            MEASURES[name],
            cell(found["within"]),
            cell(found["between"]),
            "" if found["shuffled"] is None else cell(found["shuffled"]),
            "" if found["chance"] is None else cell(found["chance"]),
            figure_cell(found, "difference"),
        )
        for name, found in result["overlap"].items()
    ]
    return Table(f"Circuits of {result['size']} nodes, found on half of the prompts", heads, rows)


def _core_table(core: pd.DataFrame, words: Words) -> Table:
    heads = ["prompts", "nodes kept or ablated", "nodes", "kept: faithfulness", "ablated: left"]
    rows = [
        [
            str(row["prompts"]),
            str(row["circuit"]),
            f"{row['nodes']:,}",
            figure_cell(row, "faithfulness"),
            figure_cell(row, "completeness_normalised"),
        ]
        for row in json_records(core, 6)
    ]
    if "refused" in core:
        heads += [f"ablated: {words.acted}", f"as it is: {words.acted}"]
        for row, figures in zip(rows, json_records(core, 6), strict=True):
            row += [figure_cell(figures, "refused_ablated"), cell(figures["refused"])]
    return Table("", heads, rows, texts=heads[1:2])


def _guide(words: Words) -> tuple[str, ...]:
    return (
        "**Overlap** is Jaccard's index of the nodes of two circuits of equal size: shared nodes over all nodes of"
        " both. Off the diagonal it is the mean over the halves of two categories, on the diagonal that of the two"
        " halves of one: the most that can be expected, since all circuits are found on as many prompts.",
        "**The tree** joins categories whose circuits are most alike first (average linkage of 1 − overlap).",
        "**Transfer** is how faithful the circuit of one category (rows) is on the test prompts of another (columns)."
        " 1 is as good as the model itself.",
        "**The shared core** holds the nodes of more than half of the circuits. Kept alone it has the faithfulness in"
        " the column “kept”; ablated it leaves the share in the column “left”, 0 where nothing works without it. Where"
        f" replies were judged, the last columns are the shares of test prompts {words.acted} with these nodes ablated"
        " and as the model is.",
        "**Edges** are the strongest by attribution between a circuit's nodes, as many in each circuit. Two circuits"
        " can only share an edge if they share its two ends.",
    )


_METHODS = (
    Formula(
        "Overlap (Jaccard; weighted: Ruzicka 1958)",
        "shared / all of two circuits; weighted: sum of the smaller / sum of the larger shares of |effect|",
    ),
    Formula(
        "Overlap of categories",
        "circuits of equal size, each found on half of a category's discovery prompts; halves of one category are the"
        " yardstick, 95 % interval of the difference by a bootstrap over categories",
    ),
)
