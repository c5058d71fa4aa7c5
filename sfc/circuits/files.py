"""Circuits as files: networkx's node-link JSON. No torch here."""

from pathlib import Path

import networkx as nx

from sfc.core.artifacts import read_json, write_json
from sfc.core.errors import UserError


def save_circuit(graph: nx.DiGraph, path: Path) -> None:
    """Write a circuit as networkx' own node-link JSON; `sfc.circuits.exports` has other formats."""
    write_json(path, nx.node_link_data(graph, edges="edges"))


def load_circuit(path: Path) -> nx.DiGraph:
    """Read a circuit from node-link JSON.

    Raises:
        UserError: the file is missing, not JSON, or not a directed acyclic graph with named nodes.
    """
    data = read_json(path)
    try:
        graph = nx.node_link_graph(data, directed=True, multigraph=False, edges="edges")
    except (nx.NetworkXError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a circuit in node-link JSON ({error!r})") from None
    acyclic = nx.is_directed_acyclic_graph(graph) and not graph.is_multigraph() and isinstance(graph.graph, dict)
    if not acyclic or not all(isinstance(node, str) for node in graph):
        raise UserError(f"{path} is not a circuit: it must be a directed graph without cycles, with named nodes")
    if len(graph) != len(data["nodes"]):
        raise UserError(f"{path} is not a circuit: a node is listed twice, or an edge joins an unlisted node")
    return graph
