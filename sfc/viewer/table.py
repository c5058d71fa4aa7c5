"""Tables in HTML: the strongest nodes of a circuit, for reading without hovering, and small ones of figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import networkx as nx

from sfc.viewer.graph import strongest_nodes
from sfc.viewer.text import number_text, printable, tokens_text

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
