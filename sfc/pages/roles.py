"""Where in the prompt a circuit acts, and what passes from which tokens to which: positions as rows, layers as columns.

A cell stands for the circuit's nodes at one site, at the tokens of one role: all tokens of the prompt, or one token of
the template after it. Lines between cells are sums over the edges that are drawn of what passes from the one's tokens
to the other's. So one sees whether what is found in the prompt's own words is passed to the tokens at which the model
decides, where, and by which features.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx
import plotly.graph_objects as go

from sfc.circuits.nodes import role_part
from sfc.features.labels import caption
from sfc.pages.blocks import Block, Figure, Table
from sfc.pages.graph import columns_of
from sfc.pages.placement import edge_hovers, edge_legend, edge_signs_of
from sfc.pages.style import axis, sign_of, signs, styled_figure
from sfc.pages.text import count_text, hover_text, number_text, token_text

_EFFECT, _CONTENT, _PREFIX = "effect_", "content", "prefix"
_SMALLEST_SHARE = 0.005
"""what passes between two cells or roles is left out below this share of the largest, or of all"""
_ROW_HEIGHT, _LARGEST, _WIDEST, _NAMED, _LISTED = 56, 38, 8, 5, 15


def role_blocks(graph: nx.DiGraph, cards: Mapping[str, Any]) -> list[Block]:
    """The figure, and what the prompt's own tokens feed into the template; nothing where fewer than two roles act.

    Args:
        graph: the circuit; `graph.graph["roles"]` names the roles (see `sfc.circuits.circuit.role_names`).
        cards: the cards of its features by node.
    """
    roles = _roles(graph)
    if len(roles) < 2:
        return []
    figure = Figure("roles", lambda: roles_figure(graph), _passing_table(graph, roles))
    fed = _fed_table(graph, roles, cards)
    return [figure, fed] if fed.rows else [figure]


def _roles(graph: nx.DiGraph) -> dict[str, str]:
    """The roles that have a part in an effect, in their order, with what their rows are called."""
    named = {key.removeprefix(_EFFECT): str(name) for key, name in graph.graph.get("roles", {}).items()}
    of_suffix = [role for role in named if role not in (_CONTENT, _PREFIX)]
    # Tokens of the template may be alike, so that they are counted from the end.
    rows = {role: f"{token_text(named[role])} {place - len(of_suffix)}" for place, role in enumerate(of_suffix)}
    acting = [r for r in named if any(data.get(_EFFECT + r) for _, data in graph.nodes(data=True))]
    return {role: rows.get(role, named[role]).replace("-", "−") for role in acting}


class _Cell(NamedTuple):
    """A role at a site."""

    role: str
    site: str


def _passing(graph: nx.DiGraph, roles: Mapping[str, str]) -> Iterator[tuple[_Cell, _Cell, str, str, float]]:
    """The parts of all edges: from which cell to which, between which nodes, and how much."""
    names = {role_part(source, target): (source, target) for source in roles for target in roles}
    for source, target, data in graph.edges(data=True):
        for name in sorted(names.keys() & data.keys()):
            from_role, to_role = names[name]
            from_cell, to_cell = (
                _Cell(role, graph.nodes[node]["site"]) for role, node in ((from_role, source), (to_role, target))
            )
            yield from_cell, to_cell, source, target, data[name]


def roles_figure(graph: nx.DiGraph) -> go.Figure:
    """Positions as rows, the prompt above and the template's tokens under it; the sites as columns.

    A circle's area is the sum of the |effects| of the nodes there, its colour the sign of their sum.
    """
    roles, columns = _roles(graph), columns_of(graph)
    here: dict[_Cell, list[tuple[float, str]]] = defaultdict(list)
    for name, data in graph.nodes(data=True):
        for role in roles:
            if effect := data.get(_EFFECT + role):
                here[_Cell(role, data["site"])].append((effect, name))
    places = {one: (columns.number(one.site), -list(roles).index(one.role)) for one in here}
    labels = {
        one: f"{roles[one.role]}, {columns.labels[columns.number(one.site)].replace('<br>', ' ')}" for one in here
    }
    figure = styled_figure(
        "From the prompt to the template: effects and edges by position", 130 + _ROW_HEIGHT * len(roles)
    )
    flows = nx.DiGraph(edge_weight=graph.graph.get("edge_weight", ""))
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    for source, target, *_, weight in _passing(graph, roles):
        if source in labels and target in labels:
            totals[labels[source], labels[target]].append(weight)
    sums = {ends: math.fsum(weights) for ends, weights in totals.items()}
    least = _SMALLEST_SHARE * max(map(abs, sums.values()), default=0)
    flows.add_edges_from((*ends, {"weight": total}) for ends, total in sums.items() if abs(total) >= least)
    positions = {labels[one]: place for one, place in places.items()}
    figure.add_traces(list(_lines(flows, positions)))
    figure.add_traces(list(edge_hovers(flows, positions, edge_signs_of(flows))))
    figure.add_traces(list(_cells(graph, here, places, labels)))
    figure.add_traces(list(edge_legend(edge_signs_of(flows))))
    return figure.update_layout(
        margin={"l": 150},
        xaxis=axis(
            columns.title, range=[-0.5, len(columns.sites) - 0.5], tickvals=list(range(len(columns.sites))),
            ticktext=columns.labels, showgrid=False,
        ),
        yaxis=axis(
            "", range=[0.6 - len(roles), 0.6], tickvals=[-row for row in range(len(roles))],
            ticktext=[hover_text(name) for name in roles.values()], showgrid=False,
        ),
    )  # fmt: skip


def _lines(flows: nx.DiGraph, positions: Mapping[str, tuple[float, float]]) -> Iterator[go.Scatter]:
    """A line for each flow, whose width grows with the square root of the weight, so that small ones are seen too."""
    colours = {sign.number: sign.colour for sign in edge_signs_of(flows)}
    greatest = max((abs(weight) for *_, weight in flows.edges(data="weight")), default=0) or 1
    for source, target, weight in sorted(flows.edges(data="weight"), key=lambda flow: abs(flow[2])):
        yield go.Scatter(
            x=[positions[source][0], positions[target][0]],
            y=[positions[source][1], positions[target][1]],
            mode="lines",
            line={"width": max(1, _WIDEST * math.sqrt(abs(weight) / greatest)), "color": colours[sign_of(weight)]},
            opacity=0.6,
            hoverinfo="skip",
            legendgroup=f"edges {sign_of(weight)}",
            showlegend=False,
        )


def _cells(
    graph: nx.DiGraph,
    here: Mapping[_Cell, Sequence[tuple[float, str]]],
    places: Mapping[_Cell, tuple[float, float]],
    labels: Mapping[_Cell, str],
) -> Iterator[go.Scatter]:
    """A trace of circles for each sign."""
    sizes = {one: math.fsum(abs(effect) for effect, _ in members) for one, members in here.items()}
    sums = {one: math.fsum(effect for effect, _ in members) for one, members in here.items()}
    largest, unit = max(sizes.values(), default=0) or 1, hover_text(str(graph.graph.get("effect_unit", "")))
    for sign in signs(graph):
        cells = [one for one in here if sign_of(sums[one]) == sign.number]
        if cells:
            yield go.Scatter(
                x=[places[one][0] for one in cells],
                y=[places[one][1] for one in cells],
                mode="markers",
                marker={
                    "size": [max(5, _LARGEST * math.sqrt(sizes[one] / largest)) for one in cells],
                    "color": sign.colour,
                    "opacity": 1,
                    "line": {"width": 1, "color": "white"},
                },
                hovertext=[
                    f"<b>{hover_text(labels[one])}</b><br>{count_text(len(here[one]), 'node')}, effects"
                    f" {number_text(sums[one], signed=True)} {unit} together<br>{_strongest(here[one])}"
                    for one in cells
                ],
                hoverinfo="text",
                name=hover_text(f"{sign.words}, on the whole"),
            )


def _strongest(members: Sequence[tuple[float, str]]) -> str:
    first = sorted(members, key=lambda member: (-abs(member[0]), member[1]))[:_NAMED]
    return "<br>".join(f"{hover_text(name)} {number_text(effect, signed=True)}" for effect, name in first)


def _passing_table(graph: nx.DiGraph, roles: Mapping[str, str]) -> Table:
    """From the tokens of each role to those of each other: the sum over the edges drawn, and its share of all.

    What is less than `_SMALLEST_SHARE` is left out.
    """
    parts: dict[tuple[str, str], list[float]] = defaultdict(list)
    for source, target, *_, weight in _passing(graph, roles):
        parts[source.role, target.role].append(weight)
    sizes = {ends: math.fsum(map(abs, weights)) for ends, weights in parts.items()}
    total = math.fsum(sizes.values())
    rows = [
        (
            roles[source],
            roles[target],
            number_text(math.fsum(parts[source, target]), signed=True),
            f"{100 * sizes[source, target] / total:.0f} %",
        )
        for source in roles
        for target in roles
        if sizes.get((source, target), 0) > _SMALLEST_SHARE * total
    ]
    return Table(
        "What passes from which tokens to which, over the edges drawn",
        ("from", "to", "sum of weights", "share of |weights|"), rows, ("to",),
    )  # fmt: skip


def _fed_table(graph: nx.DiGraph, roles: Mapping[str, str], cards: Mapping[str, Any]) -> Table:
    """The strongest parts of edges that pass from the prompt's own tokens to the template's."""
    fed = [
        (source, target, to.role, weight)
        for from_, to, source, target, weight in _passing(graph, roles)
        if from_.role == _CONTENT and to.role not in (_CONTENT, _PREFIX)
    ]
    strongest = sorted(fed, key=lambda part: (-abs(part[3]), part[:3]))[:_LISTED]
    rows = [
        (source, _label(cards, source), target, _label(cards, target), roles[role], number_text(weight, signed=True))
        for source, target, role, weight in strongest
    ]
    return Table(
        "What features of the prompt's own tokens feed into the template's: the strongest edges",
        ("in the prompt", "label", "in the template", "its label", "at the token", "weight"), rows,
        ("label", "in the template", "its label", "at the token"),
    )  # fmt: skip


def _label(cards: Mapping[str, Any], node: str) -> str:
    return caption(cards[node]) if node in cards else ""
