"""The page of an evaluation: what each circuit leaves of the score, alone and when it is gone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from sfc.viewer.document import figure_html, guide_html, header_html, write_document
from sfc.viewer.style import AMBER, BLUE, INK, LINE, QUIET, VERMILION, axis, styled_figure
from sfc.viewer.table import figures_table
from sfc.viewer.text import count_text, hover_text, number_text, printable

_SCORES = {
    "f_model": ("F(M): full model", INK, "line-ns-open"),
    "f_empty": ("F(0): everything ablated", QUIET, "line-ns-open"),
    "f_circuit": ("F(C): the circuit alone", VERMILION, "circle"),
    "f_complement": ("F(M\\C): all but the circuit", BLUE, "diamond"),
}
_COLUMNS = {
    "nodes": "n_nodes",
    "faithfulness": "faithfulness",
    "from": "faithfulness_low",
    "to": "faithfulness_high",
    "of random circuits": "random_faithfulness",
    "p": "p_value",
    "completeness, normalised": "completeness_normalised",
    "completeness, as published": "completeness",
    "edges": "n_edges",
    "faithfulness of edges": "edge_faithfulness",
    "of random edges": "random_edge_faithfulness",
    "F(M)": "f_model",
    "F(C)": "f_circuit",
    "F(M\\C)": "f_complement",
    "F(0)": "f_empty",
}
_GUIDE = (
    "<b>Scores.</b> F is the mean refusal score, in nats, of the test prompts: of the full model M, of the circuit C "
    "alone with everything else set to its reference, of the model without it (M\\C), and with everything ablated (0). "
    "A good circuit has its circle at F(M) and its diamond at F(0).",
    "<b>Faithfulness</b> = (F(C) − F(0)) / (F(M) − F(0)): 1 where the circuit alone does what the model does. "
    "<b>Completeness</b>, normalised = (F(M\\C) − F(0)) / (F(M) − F(0)): 0 where nothing is left without it; as "
    "published it is F(M\\C) / F(M). Where a denominator is too small to divide by, a figure is not measurable.",
    "<b>Random circuits</b> have as many features at each site and the same error nodes: what size alone gives. "
    "p is the share of circuits, among this and random ones, whose score is as far from F(0). Faithfulness has its "
    "95 % interval over prompts beside it.",
    "<b>Edges.</b> Their faithfulness is that of the circuit when its nodes hear of each other along these edges "
    "alone: each node gets a run of its own in which everything but its sources has its reference. With every edge "
    "between neighbouring sites it would be the circuit's own. Random edges lead from other nodes of the circuit, as "
    "many into each node.",
)


def write_evaluation_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes.

    Args:
        result: what `evaluate --json` prints.
    """
    title = f"Evaluation · {result['category']} · {result['preset']}"
    body = f"""{header_html(title, _sentence(result))}
<section class="card graph">{figure_html("scores", scores_figure(result))}</section>
<section class="card scroll"><h2>Figures</h2>{_table(result)}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_GUIDE)}</section>"""
    write_document(path, title, body)


def scores_figure(result: Mapping[str, Any]) -> go.Figure:
    """A row per circuit, in the order of the files: the four mean scores in nats."""
    circuits = result["circuits"]
    rows = [hover_text(circuit["name"]) for circuit in circuits]
    figure = styled_figure("Mean refusal score on the test prompts", 150 + 44 * len(circuits))
    for circuit, row in zip(circuits, rows, strict=True):
        span = [circuit["f_empty"], circuit["f_model"]]
        figure.add_scatter(
            x=span, y=[row, row], mode="lines", line={"color": LINE, "width": 6}, hoverinfo="skip", showlegend=False
        )
    for key, (name, colour, symbol) in _SCORES.items():
        figure.add_scatter(
            x=[circuit[key] for circuit in circuits],
            y=rows,
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 13, "line": {"width": 2, "color": colour}},
            hovertemplate=f"%{{y}}<br>{name}: %{{x:.3f}} nats<extra></extra>",
        )
    return figure.update_layout(
        xaxis=axis("nats", zeroline=True, zerolinecolor=AMBER),
        yaxis=axis("", autorange="reversed", automargin=True, type="category"),
        showlegend=True,
    )


def _sentence(result: Mapping[str, Any]) -> str:
    return (
        f"{count_text(len(result['circuits']), 'circuit')} on {count_text(result['n_prompts'], 'test prompt')} "
        f"({result['category']}, {result['population']}); reference {result['reference']}, "
        f"error mode {result['error_mode']}."
    )


def _table(result: Mapping[str, Any]) -> str:
    rows = [
        (
            printable(circuit["name"]),
            *(_text(key, circuit[key]) for key in _COLUMNS.values()),
        )
        for circuit in result["circuits"]
    ]
    return figures_table(("circuit", *_COLUMNS), rows)


def _text(key: str, value: float | None) -> str:
    return f"{value:,}" if key.startswith("n_") else number_text(value)
