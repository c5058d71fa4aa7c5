"""Circuits as files: they round-trip, and what is no circuit is refused."""

import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfc.circuits.circuit import build_circuit
from sfc.circuits.edge_kinds import Edge
from sfc.circuits.files import load_circuit, save_circuit
from sfc.circuits.methods import Effects
from sfc.circuits.nodes import Nodes
from sfc.core.errors import UserError

NODES = Nodes.of({"blocks.3.hook_resid_post": 4, "blocks.4.hook_resid_post": 4})


def _circuit(members: list[int], seed: int = 0) -> nx.DiGraph:
    effect = np.random.default_rng(seed).normal(size=NODES.n_nodes)
    effects = Effects(effect, np.abs(effect), np.argsort(-np.abs(effect)), {"p_value": np.full(NODES.n_nodes, 0.5)})
    upper = [m for m in members if NODES.site_numbers[m] == 1]
    edges = [Edge(m, u, -0.25, 0.5) for m in members if NODES.site_numbers[m] == 0 for u in upper]
    return build_circuit(NODES, effects, members, edges, {"category": "violence", "sites": list(NODES.sites)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.integers(0, NODES.n_nodes - 1), unique=True), st.integers(0, 99))
def test_circuits_round_trip_through_json(tmp_path: Path, members: list[int], seed: int) -> None:
    graph = _circuit(members, seed)
    save_circuit(graph, tmp_path / "circuit.json")
    back = load_circuit(tmp_path / "circuit.json")
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert list(back.edges(data=True)) == list(graph.edges(data=True))
    assert back.graph == graph.graph
    assert [NODES.number(name) for name in back] == members


def test_nodes_say_what_they_are() -> None:
    graph = _circuit([4, 6])
    assert graph.nodes["resid_post.3/error"]["kind"] == "error"
    feature = graph.nodes["resid_post.4/F1"]
    assert (feature["kind"], feature["layer"], feature["rank"], feature["p_value"]) == ("feature", 4, 1, 0.5)
    assert graph.edges["resid_post.3/error", "resid_post.4/F1"] == {"weight": -0.25, "absolute_weight": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"nodes": 3}',
        json.dumps({"directed": True, "nodes": [{"id": "a"}], "edges": [{"source": "a", "target": "a"}]}),
        json.dumps({"directed": True, "nodes": [{"id": 1}], "edges": []}),
        json.dumps({"directed": True, "nodes": [{"id": None}], "edges": []}),
        json.dumps({"directed": False, "nodes": [{"id": "a"}], "edges": []}),
        json.dumps({"multigraph": True, "nodes": [{"id": "a"}], "edges": []}),
        json.dumps({"nodes": [{"id": "a"}], "edges": [], "graph": [1]}),
        json.dumps({"nodes": [{"id": "a"}], "edges": [{"source": "a", "target": "elsewhere"}]}),
        json.dumps({"nodes": [{"id": "a"}, {"id": "a"}], "edges": []}),
        json.dumps({"nodes": [{"id": "a"}], "edges": [{"source": "a"}]}),
    ],
)
def test_what_is_no_circuit_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=r"bad\.json"):
        load_circuit(tmp_path / "bad.json")


def test_a_node_of_other_dictionaries_is_refused() -> None:
    with pytest.raises(UserError, match=r"no node 'resid_post\.3/F99'"):
        NODES.number("resid_post.3/F99")
