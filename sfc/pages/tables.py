"""Tables in HTML: the strongest nodes of a circuit, for reading without hovering, and small ones of figures.

The figures of a circuit as tiles: a name, a number, a remark.

Two small tables beside a circuit: how far its effects can be trusted, and where in the prompt they come from.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import networkx as nx

from sfc.pages.graph import strongest_nodes
from sfc.pages.text import NOT_MEASURABLE, number_text, printable, tokens_text

_TOKENS = 5


class _Column(NamedTuple):
    title: str
    key: str
    style: str
    text: Callable[[Any], str]


_COLUMNS = (
    _Column("label", "label", "tokens", printable),
    _Column("layer", "layer", "number", str),
    _Column("effect", "effect", "number", lambda value: number_text(value, signed=True)),
    _Column("mean |effect|", "absolute_effect", "number", number_text),
    _Column("p", "p_value", "number", number_text),
    _Column("q", "q_value", "number", number_text),
    _Column("raises the tokens", "raises", "tokens", lambda tokens: tokens_text(tokens, _TOKENS)),
    _Column("lowers the tokens", "lowers", "tokens", lambda tokens: tokens_text(tokens, _TOKENS)),
)


def nodes_table(graph: nx.DiGraph, most: int = 30, cards: Mapping[str, Any] | None = None) -> str:
    """The nodes with the largest |effect|, a row each; columns that no node has are left out."""
    names = strongest_nodes(graph, most)
    labels = {name: {"label": card["label"]} for name, card in (cards or {}).items()}
    nodes = {name: {**graph.nodes[name], **labels.get(name, {})} for name in names}
    columns = [column for column in _COLUMNS if any(column.key in node for node in nodes.values())]
    head = "".join(f'<th scope="col" class="{column.style}">{escape(column.title)}</th>' for column in columns)
    rows = "".join(_row(name, node, columns) for name, node in nodes.items())
    return f'<table><thead><tr><th scope="col">node</th>{head}</tr></thead><tbody>{rows}</tbody></table>'


def figures_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, written as they shall stand there."""
    styles = ["tokens", *["number"] * (len(titles) - 1)]
    head = "".join(f'<th scope="col" class="{s}">{escape(t)}</th>' for s, t in zip(styles, titles, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{s}">{escape(t)}</td>' for s, t in zip(styles, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(name: str, node: dict[str, Any], columns: list[_Column]) -> str:
    cells = "".join(
        f'<td class="{column.style}">{escape(column.text(node[column.key])) if column.key in node else ""}</td>'
        for column in columns
    )
    shown = escape(printable(name))
    return f'<tr><td><code data-node="{shown}">{shown}</code></td>{cells}</tr>'


class _Tile(NamedTuple):
    key: str
    name: str
    note: str


_TILES = (
    _Tile("faithfulness", "faithfulness", "1: the circuit alone suffices"),
    _Tile("completeness_normalised", "completeness, normalised", "0: nothing works without it"),
    _Tile("random_faithfulness", "random circuits", "faithfulness at the same size"),
    _Tile("n_nodes", "nodes", "features and error nodes"),
    _Tile("n_edges", "edges", "between its nodes"),
    _Tile("f_model", "F(M)", "mean score, full model"),
    _Tile("f_circuit", "F(C)", "the circuit alone"),
    _Tile("f_complement", "F(M\\C)", "all but the circuit"),
    _Tile("f_empty", "F(0)", "everything ablated"),
    _Tile("error_share", "error share", "of all effects: what SAEs miss"),
)


_REFUSALS = {
    "f_model": "refused_model",
    "f_circuit": "refused_circuit",
    "f_complement": "refused_complement",
    "f_empty": "refused_empty",
}
"""the share of replies that refuse, beside the score of the same ablation"""


def tiles_html(result: Mapping[str, Any]) -> str:
    """The tiles as a definition list; a figure that does not exist is "not measurable"."""
    return f'<dl class="tiles">{"".join(_tile_html(tile, result) for tile in _TILES)}</dl>'


def _tile_html(tile: _Tile, result: Mapping[str, Any]) -> str:
    text = _value_text(tile, result.get(tile.key))
    style = "none" if text == NOT_MEASURABLE else "value"
    return (
        f'<div class="tile"><dt>{escape(tile.name)}</dt><dd class="{style}">{escape(text)}</dd>'
        f'<dd class="note">{escape(_note(tile, result))}</dd></div>'
    )


def _note(tile: _Tile, result: Mapping[str, Any]) -> str:
    """The remark, with what else there is to say: the 95 % interval, a p-value, how many replies refuse."""
    low, high = result.get(f"{tile.key}_low"), result.get(f"{tile.key}_high")
    if low is not None and high is not None:
        return f"{number_text(low)} to {number_text(high)} · {tile.note}"
    if tile.key == "random_faithfulness" and result.get("p_value") is not None:
        return f"{tile.note} · p = {result['p_value']:.2g}"
    if (refused := result.get(_REFUSALS.get(tile.key, ""))) is not None:
        return f"{tile.note} · {100 * refused:.0f} % of replies refuse"
    return tile.note


def _value_text(tile: _Tile, value: float | None) -> str:
    if value is not None and tile.key.startswith("n_"):
        return f"{int(value):,}"
    if value is not None and tile.key == "error_share":
        return f"{100 * value:.0f} %".replace("-", "−")
    return number_text(value)


_GROUPS = {"top": "nodes of largest |effect|", "random": "random active nodes"}


def audit_html(graph: nx.DiGraph) -> str:
    """The audit of the circuit's effects against exact ones; nothing where the circuit carries none."""
    audit = graph.graph.get("audit")
    if not audit:
        return ""
    groups = figures_table(
        ("measured", "rank correlation", "equal signs"), [_group(audit[key], name) for key, name in _GROUPS.items()]
    )
    misses = figures_table(
        ("worst misses", "effect", "exact"),
        [
            (printable(miss["node"]), number_text(miss["fast"], signed=True), number_text(miss["exact"], signed=True))
            for miss in audit["worst_misses"]
        ],
    )
    return (
        '<section class="card scroll"><h2>Effects against exact ablation of single nodes</h2>'
        f"<p>Means over {audit['n_prompts']:,} discovery prompts. Signs are compared where the exact effect exceeds "
        f"{number_text(audit['noise_floor'])} nats.</p>{groups}{misses if audit['worst_misses'] else ''}</section>"
    )


def roles_html(graph: nx.DiGraph) -> str:
    """Where in the prompt the circuit's nodes matter; nothing where its method does not say."""
    roles = graph.graph.get("roles")
    if not roles:
        return ""
    parts = {key: [data[key] for _, data in graph.nodes(data=True) if key in data] for key in roles}
    # fsum, so that the order of the nodes does not matter.
    sizes = {key: math.fsum(map(abs, values)) for key, values in parts.items()}
    total = math.fsum(sizes.values())
    rows = [
        (printable(name), number_text(math.fsum(parts[key]), signed=True), _share(sizes[key], total))
        for key, name in roles.items()
    ]
    return (
        '<section class="card scroll"><h2>Where in the prompt</h2>'
        f"{figures_table(('tokens', 'sum of effects', 'share of |effects|'), rows)}</section>"
    )


def _group(group: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    signs = (
        f"{number_text(group['sign_agreement'])} of {group['n_signed']:,}" if group["n_signed"] else "none to compare"
    )
    return f"{group['n_nodes']:,} {name}", number_text(group["rank_correlation"], signed=True), signs


def _share(part: float, total: float) -> str:
    return f"{100 * part / total:.0f} %" if total > 0 else number_text(None)
