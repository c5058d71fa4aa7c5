"""The page of a circuit: its picture, its figures, and how to read them."""

from collections.abc import Collection, Mapping
from html import escape
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd

from sfc.core.artifacts import write_text
from sfc.pages.curve import curve_figure
from sfc.pages.document import document_html, figure_html, guide_html, header_html
from sfc.pages.explorable import explorable_html
from sfc.pages.graph import circuit_figure, layers_figure, strongest_nodes
from sfc.pages.style import signs
from sfc.pages.tables import audit_html, nodes_table, roles_html, tiles_html
from sfc.pages.text import count_text, printable

NO_CARDS: Mapping[str, Any] = {"groups": [], "features": {}}
_LISTED_NODES, _DRAWN_NODES = 30, 300


def write_page(
    path: Path, graph: nx.DiGraph, curve: pd.DataFrame, result: Mapping[str, Any], cards: Mapping[str, Any] = NO_CARDS
) -> None:
    """Write a circuit's page, whole or not at all; arguments as `page_html`."""
    write_text(path, page_html(graph, curve, result, cards))


def page_html(
    graph: nx.DiGraph,
    curve: pd.DataFrame,
    result: Mapping[str, Any],
    cards: Mapping[str, Any] = NO_CARDS,
    marked: Collection[str] = (),
) -> str:
    """A circuit's page; equal input makes equal text.

    Args:
        graph: the circuit; of the facts about it (`graph.graph`) `sites`, `method` and `effect_unit` are used, and
            where they are given `population`, `edge_weight`, `audit`, `roles`, `fingerprint`, `created`, `command` and
            `versions`.
        curve: as `curve_figure` takes it.
        result: what `discover --json` prints: `preset`, `category`, `method` and the figures of the circuit.
        cards: what its features mean, as `sfc.features.cards` describes it.
        marked: nodes that are ringed: those that another circuit has as well.
    """
    title = " · ".join(str(result[key]) for key in ("category", "method", "preset"))
    listed = min(_LISTED_NODES, len(graph))
    drawn = strongest_nodes(graph, _DRAWN_NODES)
    features = cards["features"]
    picture = figure_html("circuit", circuit_figure(graph, _DRAWN_NODES, features, marked))
    body = f"""{header_html(title, _sentence(graph, result))}
{tiles_html(result)}
<section class="card">{explorable_html(picture, graph, drawn, curve, cards)}</section>
<div class="pair">
<section class="card">{figure_html("curve", curve_figure(curve, len(graph)))}</section>
<section class="card">{figure_html("layers", layers_figure(graph, features))}</section>
</div>
<div class="pair">
{audit_html(graph)}
{roles_html(graph)}
</div>
<section class="card"><h2>How to read this page</h2>{_guide(graph, bool(features))}</section>
<section class="card scroll"><h2>The {count_text(listed, "node")} with the largest |effect|</h2>
{nodes_table(graph, _LISTED_NODES, features)}</section>
<footer>{_foot(graph, result)}</footer>"""
    return document_html(title, body, ["circuit.js"])


def _sentence(graph: nx.DiGraph, result: Mapping[str, Any]) -> str:
    errors = sum(data["kind"] == "error" for _, data in graph.nodes(data=True))
    population, reference = graph.graph.get("population", "toxic"), graph.graph.get("reference")
    against = f" against {reference}" if reference else ""
    parts = f"{count_text(len(graph) - errors, 'SAE feature')} and {count_text(errors, 'error node')}"
    return (
        f"{parts}, joined by {count_text(graph.number_of_edges(), 'edge')}: the circuit that {result['method']} found "
        f"behind {graph.graph.get('behaviour', 'refusals')} (category {result['category']}, {population} prompts"
        f"{against}, preset {result['preset']}). "
        "All scores are from the test split, which discovery never saw."
    )


def _guide(graph: nx.DiGraph, has_cards: bool) -> str:
    positive, negative, _ = signs(graph.graph.get("method", ""))
    unit = escape(printable(str(graph.graph.get("effect_unit", "")))) or "no unit given"
    weight = graph.graph.get("edge_weight", "")
    weight = f" ({escape(printable(str(weight)))})" if weight else ""
    colours = (
        "Colours say what a feature fires on: orange, peaks on average twice as high on the category's toxic prompts "
        "as on its safe ones; blue, the reverse; grey, neither."
        if has_cards
        else f"Orange: {positive.words}. Blue: {negative.words}."
    )
    paragraphs = (
        f"<b>Nodes.</b> A column is a layer. Circles are features of its sparse autoencoder (SAE), diamonds stand for "
        f"what the SAE misses. The area is the size of the effect ({unit}). Above the line: "
        f"{positive.words}. Below it: {negative.words}. The strongest stand next to the line. {colours}",
        f"<b>Edges.</b> A line joins two nodes, drawn thicker and darker with its weight{weight}, green where it is "
        "positive and purple where it is negative. Point half-way along a line to see what it joins.",
        "<b>Exploring.</b> The slider shows the circuit's best n nodes, and moves the marker on the curve. Click on a "
        "node, or walk with the arrow keys, to see what it is joined to and its card: the prompts on which it fires "
        "most, shaded by its value, and the tokens it raises and lowers. Search for a node, a label or a token; click "
        "on the legend to hide a group; drag to zoom, double-click to return; Escape closes the card.",
        "<b>Faithfulness</b> = (F(C) − F(0)) / (F(M) − F(0)). F is the mean score: of the full model M, of the "
        "circuit C alone, of the model without it (M\\C), and with everything ablated (0), that is, set to its mean "
        "on reference prompts. 1 means that the circuit alone does what the model does; random circuits of the "
        "same size per layer show what size alone would give.",
        "<b>Completeness</b>, normalised = (F(M\\C) − F(0)) / (F(M) − F(0)). 0 means that without the circuit nothing "
        "is left of the behaviour. As published it is F(M\\C) / F(M), which depends on where the score's zero lies. "
        "Where a denominator is too small to divide by, a figure is not measurable.",
    )
    return guide_html(paragraphs)


def _foot(graph: nx.DiGraph, result: Mapping[str, Any]) -> str:
    """Where the circuit comes from, as far as the circuit or else the result says."""
    facts = {**result, **graph.graph}
    lines = [
        f"{key}: <code>{_fact(facts[key])}</code>" for key in ("fingerprint", "created", "command") if facts.get(key)
    ]
    if facts.get("versions"):
        lines.append("made with " + _fact(", ".join(f"{name} {number}" for name, number in facts["versions"].items())))
    return "".join(f"<p>{line}</p>" for line in lines)


def _fact(value: object) -> str:
    return escape(printable(str(value)))
