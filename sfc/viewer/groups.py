"""The groups that nodes are coloured by: the side a feature fires on where its card says so, else its effect's sign."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import networkx as nx

from sfc.viewer.signs import sign_of, signs
from sfc.viewer.style import BLUE, INK, QUIET, VERMILION


class Group(NamedTuple):
    """Nodes of one colour."""

    key: str
    words: str
    colour: str


_SIDES = (
    Group("toxic", "fires on toxic prompts", VERMILION),
    Group("safe", "fires on safe prompts", BLUE),
    Group("shared", "fires on both", "#949ba4"),
    Group("error", "error node", INK),
    Group("unknown", "not looked at", QUIET),
)


def groups_of(graph: nx.DiGraph, cards: Mapping[str, Any]) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups there may be, and each node's key among them.

    Args:
        cards: the cards of features by node (see `sfc.features.cards`); with none, nodes are grouped by sign.
    """
    if cards:
        keys = {
            name: "error" if data["kind"] == "error" else cards[name]["fires_on"] if name in cards else "unknown"
            for name, data in graph.nodes(data=True)
        }
        return _SIDES, keys
    by_sign = signs(graph.graph.get("method", ""))
    place = {1: " (above the line)", -1: " (below)", 0: ""}
    groups = tuple(Group(str(sign.number), sign.words + place[sign.number], sign.colour) for sign in by_sign)
    return groups, {name: str(sign_of(data["effect"])) for name, data in graph.nodes(data=True)}
