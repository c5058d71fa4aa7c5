"""The page of an evaluation: what each circuit leaves of the score, alone and when it is gone."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.pages.blocks import Figure, Page, Section, cell, figure_cell, records_table
from sfc.pages.style import AMBER, BLUE, INK, LINE, QUIET, VERMILION, axis, styled_figure
from sfc.pages.text import count_text, hover_text
from sfc.studies.study import Finished

_SCORES = {
    "f_model": ("F(M): full model", INK, "line-ns-open"),
    "f_empty": ("F(0): everything ablated", QUIET, "line-ns-open"),
    "f_circuit": ("F(C): the circuit alone", VERMILION, "circle"),
    "f_complement": ("F(M\\C): all but the circuit", BLUE, "diamond"),
}
_COLUMNS = {
    "circuit": "name",
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


def page(finished: Finished) -> Page:
    """The page of an evaluation."""
    result, words = finished.result, finished.words
    first = result["circuits"][0]
    title = (
        f"{result['category']} · {result['preset']}: faithfulness on {result['n_prompts']} {result['population']} test"
        f" prompts, completeness normalised; F(M) {cell(first['f_model'])}, F(0) {cell(first['f_empty'])}"
    )
    return Page(
        title=f"Evaluation · {result['category']} · {result['preset']}",
        sentence=_sentence(result),
        summary=[records_table(title, _SUMMARY, result["circuits"])],
        sections=[
            Section("", [Figure("scores", lambda: scores_figure(result, words))]),
            Section("Figures", [records_table("", _COLUMNS, result["circuits"])]),
        ],
        guide=_guide(words),
        findings=[
            (f"faithfulness of {each['name']}", figure_cell(each, "faithfulness")) for each in result["circuits"]
        ],
    )


_SUMMARY = {
    "circuit": "name", "nodes": "n_nodes", "faithfulness": "faithfulness", "low": "faithfulness_low",
    "high": "faithfulness_high", "random": "random_faithfulness", "p": "p_value",
    "completeness": "completeness_normalised", "edges": "n_edges", "of edges": "edge_faithfulness",
    "random edges": "random_edge_faithfulness",
}  # fmt: skip


def scores_figure(result: Mapping[str, Any], words: Words) -> go.Figure:
    """A row per circuit, in the order of the files: the four mean scores in nats."""
    circuits = result["circuits"]
    rows = [hover_text(circuit["name"]) for circuit in circuits]
    figure = styled_figure(f"Mean {words.score} on the test prompts", 150 + 44 * len(circuits))
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
        f"({result['category']}, {result['population']}); baseline {result['baseline']}, "
        f"error mode {result['error_mode']}."
    )


def _guide(words: Words) -> tuple[str, ...]:
    return (
        f"**Scores.** F is the mean {words.score}, in nats, of the test prompts: of the full model M, of the circuit C "
        "alone with everything else set to its baseline, of the model without it (M\\C), and with everything ablated"
        " (0). "
        "A good circuit has its circle at F(M) and its diamond at F(0).",
        "**Faithfulness** = (F(C) − F(0)) / (F(M) − F(0)): 1 where the score comes back in full, even if it does so on"
        " every prompt. "
        "**Completeness**, normalised = (F(M\\C) − F(0)) / (F(M) − F(0)): 0 where nothing is left without it; as "
        "published it is F(M\\C) / F(M). Where a denominator is too small to divide by, a figure is not measurable.",
        "**Random circuits** have as many features at each site and the same error nodes: what size alone gives. "
        "p is the share of circuits, among this and random ones, whose score is as far from F(0). Faithfulness has its "
        "95 % interval over prompts beside it.",
        "**Edges.** Their faithfulness is that of the circuit when its nodes reach each other along these edges "
        "alone: each node gets a run of its own in which everything but its sources has its baseline value. With every"
        " edge between neighbouring sites it would be the circuit's own. Random edges lead from other nodes of the"
        " circuit, as many into each node.",
    )
