"""Circuits, curves, results and cards as pages draw them, for tests."""

from itertools import combinations
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd

from sfc.core.artifacts import write_text
from sfc.pages.circuit import circuit_page
from sfc.pages.html import page_html

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    '"><svg/onload=alert(4)>',
    "'; alert(5); '",
    "<!--<script>",
    "]]></style><link rel=stylesheet href=https://example.org>",
    "%{customdata} &lt;b&gt; &amp;",
    "\n\t\x00\x1b\u2028\u202e",
    "\ud800",
    "日本 🙂",
]


def write_page(path: Path, *arguments: Any) -> None:
    """Write a circuit's page; arguments as `circuit_page`."""
    write_text(path, page_html(circuit_page(*arguments)))


def make_circuit(effects, columns=None, n_columns=11, **facts) -> nx.DiGraph:
    """A circuit with these effects; every seventh node is an error node, neighbouring columns are joined."""
    sites = [f"blocks.{19 + number}.hook_resid_post" for number in range(n_columns)]
    graph = nx.DiGraph(sites=sites, method="attribution", effect_unit="nats of refusal score", **facts)
    columns = columns if columns is not None else [number % n_columns for number in range(len(effects))]
    for rank, (effect, column) in enumerate(zip(effects, columns, strict=True)):
        graph.add_node(
            f"resid_post.{19 + column}/F{rank}",
            site=sites[column],
            layer=19 + column,
            kind="error" if rank % 7 == 6 else "feature",
            effect=effect,
            absolute_effect=abs(effect) * 1.2,
            rank=rank,
        )
    for source, target in combinations(graph, 2):
        if graph.nodes[target]["layer"] == graph.nodes[source]["layer"] + 1:
            graph.add_edge(source, target, weight=graph.nodes[source]["effect"] / 3)
    return graph


def make_cards(graph, texts=("kill",)) -> dict:
    """Cards of all features of a circuit, whose texts are these."""
    texts = list(texts)
    card = {
        "label": " ".join(texts), "score": 0.61, "raises": texts, "lowers": texts, "density": 0.1, "max": 2.0,
        "histogram": {"from": 0.5, "counts": [3, 0, 1]}, "firing": [1.0, 0.25],
        "contexts": [
            {"tokens": [*texts, "x"], "values": [0.0] * len(texts) + [2.0], "peak": len(texts), "in_template": False,
             "population": "toxic", "category": "violence"}
        ],
        "neighbours": [{"node": "resid_post.19/F999", "cosine": 0.5}],
        "explanation": {"text": " ".join(texts), "score": None, "model": texts[0]},
    }  # fmt: skip
    sides = ("toxic", "safe", "shared")
    names = [name for name in graph if graph.nodes[name]["kind"] == "feature"]
    return {
        "groups": [{"population": p, "category": "violence", "n_prompts": 4} for p in ("toxic", "safe")],
        "features": {name: {**card, "fires_on": sides[number % 3]} for number, name in enumerate(names)},
    }


def make_curve(**columns) -> pd.DataFrame:
    curve = {
        "size": [5, 50, 500, 5000],
        "faithfulness": [0.1, 0.5, 0.9, 1.0],
        "faithfulness_low": [0.05, 0.4, 0.8, 1.0],
        "faithfulness_high": [0.2, 0.6, 1.0, 1.0],
        "completeness": [0.9, 0.4, -0.2, -0.6],
        "completeness_normalised": [0.95, 0.6, 0.1, 0.0],
        "random_faithfulness": [0.0, 0.01, 0.05, 0.4],
        "random_low": [-0.02, -0.01, 0.03, 0.3],
        "random_high": [0.02, 0.03, 0.08, 0.5],
        "on_discovery": [0.12, 0.55, 0.92, 1.0],
    }
    return pd.DataFrame(curve | columns)


def make_result(**figures) -> dict:
    return {
        "preset": "smollm2",
        "category": "violence",
        "method": "attribution",
        "n_nodes": 20,
        "n_edges": 12,
        "faithfulness": 0.887,
        "completeness": 0.2,
        "completeness_normalised": -0.112,
        "f_model": 6.31,
        "f_circuit": 5.18,
        "f_complement": -4.9,
        "f_empty": -3.72,
        "random_faithfulness": 0.0113,
        "error_share": 0.031,
    } | figures
