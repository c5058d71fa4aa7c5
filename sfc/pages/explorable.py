"""What makes a page's graph explorable: its controls, the place of a node's card, and the data for `circuit.js`."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import networkx as nx
import pandas as pd

from sfc.features.labels import ADDRESS, caption, explained
from sfc.pages.blocks import Table
from sfc.pages.graph import columns_of, groups_of
from sfc.pages.html import data_html
from sfc.pages.style import sign_of, signs
from sfc.pages.text import printable

_FIGURES = ("faithfulness", "completeness_normalised", "random_faithfulness")
_NODE_FIGURES = (
    "rank", "effect", "absolute_effect", "mask", "p_value", "q_value", "effect_low", "effect_high", "stability",
)  # fmt: skip


def explorable_html(
    figure: str, graph: nx.DiGraph, drawn: Sequence[str], curve: pd.DataFrame, cards: Mapping[str, Any]
) -> str:
    """The controls, the graph under them, the empty card, and the data.

    Args:
        figure: the HTML of the graph.
        drawn: the nodes that the graph draws.
        cards: as `circuit_page` takes them.
    """
    sizes = shown_sizes(curve, len(graph))
    return f"""{_controls(graph, drawn, sizes, cards["features"])}
<div class="graph">{figure}</div>
{_CARD}{data_html("circuit-cards", _data(graph, drawn, sizes, cards))}"""


def nodes_html(table: Table) -> str:
    """The table of nodes whose names can be clicked (see `circuit.js`)."""
    styles = ["tokens" if title in table.texts else "number" for title in table.columns[1:]]
    head = "".join(
        f'<th scope="col" class="{s}">{escape(t)}</th>' for s, t in zip(styles, table.columns[1:], strict=True)
    )
    rows = ""
    for name, *cells in table.rows:
        shown = escape(printable(name))
        of_row = "".join(f'<td class="{s}">{escape(printable(c))}</td>' for s, c in zip(styles, cells, strict=True))
        rows += f'<tr><td><code data-node="{shown}">{shown}</code></td>{of_row}</tr>'
    return f'<table><thead><tr><th scope="col">node</th>{head}</tr></thead><tbody>{rows}</tbody></table>'


def shown_sizes(curve: pd.DataFrame, n_nodes: int) -> list[dict[str, Any]]:
    """The sizes that the slider offers, each with its figures: those of the curve up to the whole graph, and that."""
    rows = curve[(curve["size"] >= 1) & (curve["size"] <= n_nodes)].sort_values("size")
    sizes = [
        {"size": int(row["size"]), **{name: _finite(row[name]) for name in _FIGURES}} for _, row in rows.iterrows()
    ]
    if n_nodes and (not sizes or sizes[-1]["size"] < n_nodes):
        sizes.append({"size": n_nodes, **dict.fromkeys(_FIGURES)})
    return sizes


def _controls(
    graph: nx.DiGraph, drawn: Sequence[str], sizes: Sequence[Mapping[str, Any]], cards: Mapping[str, Any]
) -> str:
    by_sign = {str(sign.number): sign.words for sign in signs(graph)}
    present = {str(sign_of(graph.nodes[name]["effect"])) for name in drawn}
    columns = columns_of(graph)
    layers = {site: label.replace("<br>", " ") for site, label in zip(columns.sites, columns.labels, strict=True)}
    groups, group_of_node = groups_of(graph, cards)
    colours = {group.key: group.words for group in groups if cards and group.key in {group_of_node[n] for n in drawn}}
    roles = {key: printable(str(name)) for key, name in graph.graph.get("roles", {}).items()}
    acting = {role for name in drawn if (role := _role(graph, name))}
    last = max(0, len(sizes) - 1)
    return f"""<div class="controls">
<label class="wide">size <input type="range" id="size" min="0" max="{last}" value="{last}" step="1">
<output id="size-figures" for="size"></output></label>
<label>search <input type="search" id="search" placeholder="node, label or token" autocomplete="off"></label>
{_select("sign", "effect", {key: words for key, words in by_sign.items() if key in present})}
{_select("group", "fires on", colours)}
{_select("site", "layer", layers)}
{_select("role", "acts at", {key: words for key, words in roles.items() if key in acting})}
<span class="buttons"><button type="button" id="reset">show all</button>
<button type="button" id="save-svg">SVG</button> <button type="button" id="save-png">PNG</button></span>
<p id="shown" role="status"></p>
<ul id="matches"></ul>
</div>
"""


_CARD = """<aside id="card" aria-label="node" tabindex="-1" hidden></aside>
"""


def _select(name: str, title: str, options: Mapping[str, str]) -> str:
    """A choice among these; none where there is nothing to choose."""
    if len(options) < 2:
        return ""
    items = "".join(f'<option value="{escape(key)}">{escape(words)}</option>' for key, words in options.items())
    return f'<label>{title} <select id="{name}" class="filter"><option value="">all</option>{items}</select></label>'


def _data(
    graph: nx.DiGraph, drawn: Sequence[str], sizes: Sequence[Mapping[str, Any]], cards: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the cards show. Text is made printable here, and stays text: the script only sets it as such."""
    groups, group_of_node = groups_of(graph, cards["features"])
    shown = set(drawn)
    words = {sign.number: sign.words for sign in signs(graph)}
    return {
        "sizes": sizes,
        "unit": printable(str(graph.graph.get("effect_unit", ""))),
        "edge_unit": printable(str(graph.graph.get("edge_weight", ""))),
        "colours": {group.key: group.colour for group in groups},
        "words": {group.key: group.words for group in groups},
        "groups": cards["groups"],
        "roles": {key: printable(str(name)) for key, name in graph.graph.get("roles", {}).items()},
        "nodes": {
            name: {
                **_node(graph, name),
                "group": group_of_node[name],
                "sign_words": words[sign_of(graph.nodes[name]["effect"])],
                "card": _printable_card(cards["features"][name]) if name in cards["features"] else None,
            }
            for name in drawn
        },
        "edges": sorted(
            [source, target, _rounded(weight)]
            for source, target, weight in graph.edges(data="weight", default=0.0)
            if source in shown and target in shown
        ),
    }


def _node(graph: nx.DiGraph, name: str) -> dict[str, Any]:
    node = graph.nodes[name]
    figures = {key: _rounded(node[key]) for key in _NODE_FIGURES if _finite(node.get(key)) is not None}
    roles = {key: _rounded(node[key]) for key in graph.graph.get("roles", {}) if key in node}
    tokens = {key: list(map(printable, node.get(key) or [])) for key in ("raises", "lowers")}
    place = {"site": node["site"], "layer": node["layer"], "kind": node["kind"], "sign": sign_of(node["effect"])}
    return {"text": printable(name), **place, **figures, **tokens, "by_role": roles, "role": _role(graph, name)}


def _role(graph: nx.DiGraph, name: str) -> str | None:
    """The role from which most of a node's effect comes."""
    parts = {key: abs(graph.nodes[name][key]) for key in graph.graph.get("roles", {}) if key in graph.nodes[name]}
    return max(parts, key=lambda key: parts[key]) if any(parts.values()) else None


def _printable_card(card: Mapping[str, Any]) -> dict[str, Any]:
    contexts = [{**context, "tokens": list(map(printable, context["tokens"]))} for context in card["contexts"]]
    page = card.get("neuronpedia")
    is_theirs = isinstance(page, str) and page.startswith(ADDRESS)
    link = {"neuronpedia": page if is_theirs else None}
    texts = {"label": printable(caption(card)), "explanation": printable(explained(card))}
    return {**card, **texts, "contexts": contexts, **link}


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
