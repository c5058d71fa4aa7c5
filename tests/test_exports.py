"""Circuits for other programs: read back by networkx and pandas, and by circuit-tracer where it is installed."""

import json
import re
from pathlib import Path

import networkx as nx
import pandas as pd
import pytest

from sfc.circuits.files import FORMATS, circuit_tracer_graph, export_circuit, for_spreadsheets
from sfc.core.artifacts import write_csv
from sfc.core.errors import UserError

LABELS = {"resid_post.3/F7": "a <label> \x00\ud800 & “more”"}


@pytest.fixture
def graph() -> nx.DiGraph:
    sites = ["blocks.3.hook_resid_post", "blocks.4.hook_resid_post"]
    roles = {"effect_content": "prompt", "effect_suffix_0": "\n"}
    facts = {
        "category": "violence",
        "method": "attribution",
        "fingerprint": "81bc03aa",
        "approximation_check": {"n": 1},
    }
    graph = nx.DiGraph(sites=sites, roles=roles, experiment={"model": {"source": "tiny"}}, **facts)
    for name, kind, site, content, suffix in (
        ("resid_post.3/F7", "feature", 3, 0.5, -2.0),
        ("resid_post.4/F0", "feature", 4, 3.0, 0.0),
        ("resid_post.4/error", "error", 4, 0.0, 0.5),
    ):
        graph.add_node(
            name, kind=kind, layer=site, site=f"blocks.{site}.hook_resid_post", effect=content + suffix,
            effect_content=content, effect_suffix_0=suffix, raises=["<script>", "\x0b"], rank=len(graph),
        )  # fmt: skip
    graph.add_edge("resid_post.3/F7", "resid_post.4/F0", weight=-1.5, absolute_weight=2.0)
    graph.add_edge("resid_post.3/F7", "resid_post.4/error", weight=0.25, absolute_weight=0.5)
    return graph


@pytest.mark.parametrize(("format", "read"), [("graphml", nx.read_graphml), ("gexf", nx.read_gexf)])
def test_xml_is_read_back_as_the_same_graph(graph: nx.DiGraph, tmp_path: Path, format: str, read) -> None:
    path = export_circuit(graph, LABELS, [format], tmp_path)[format]
    back = read(path)
    assert set(back) == set(graph) and set(back.edges) == set(graph.edges)
    for name in graph:
        assert back.nodes[name]["effect"] == graph.nodes[name]["effect"]
        assert back.nodes[name]["kind"] == graph.nodes[name]["kind"]
    assert back.edges["resid_post.3/F7", "resid_post.4/F0"]["weight"] == -1.5
    assert back.nodes["resid_post.3/F7"]["label"].startswith("a <label> ")


def test_copies_for_spreadsheets_hold_no_formula_and_all_else_as_it_is(tmp_path: Path) -> None:
    cells = [
        "=1+1",
        "+1+1",
        "-1-1",
        "@SUM(A1)",
        "\t=1",
        "\n=1",
        " =1",
        "-1.5",
        "+3",
        "1e-3",
        "plain",
        "a=b",
        "",
        "'=1",
        '"x"',
    ]
    path = tmp_path / "replies.csv"
    write_csv(path, pd.DataFrame({"=cell": cells, "number": range(len(cells))}))
    copy = for_spreadsheets([path], tmp_path / "spreadsheets")["replies"]
    table = pd.read_csv(copy, keep_default_na=False, dtype=str)
    assert list(table) == ["'=cell", "number"] and list(table["number"]) == [str(n) for n in range(len(cells))]
    assert list(table["'=cell"]) == [f"'{cell}" for cell in cells[:7]] + cells[7:]


def test_tables_hold_every_node_and_edge(graph: nx.DiGraph, tmp_path: Path) -> None:
    paths = export_circuit(graph, LABELS, ["csv"], tmp_path)
    nodes, edges = pd.read_csv(paths["nodes"], index_col="node"), pd.read_csv(paths["edges"])
    assert set(nodes.index) == set(graph) and nodes.loc["resid_post.4/F0", "effect"] == 3.0
    assert {tuple(row) for row in edges.itertuples(index=False)} == {
        (source, target, data["weight"], data["absolute_weight"]) for source, target, data in graph.edges(data=True)
    }


def test_the_graph_of_circuit_tracer_has_the_parts_that_its_schema_asks_for(graph: nx.DiGraph, tmp_path: Path) -> None:
    path = export_circuit(graph, LABELS, ["circuit-tracer"], tmp_path)["circuit-tracer"]
    written = json.loads(path.read_text())
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(written["metadata"])
    assert re.fullmatch(r"[\w-]+", written["metadata"]["slug"])
    required = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}
    assert all(required <= set(node) for node in written["nodes"])
    nodes = {node["node_id"]: node for node in written["nodes"]}
    assert len(nodes) == len(graph) + 1
    assert all({link["source"], link["target"]} <= set(nodes) for link in written["links"])
    # (3 + 7) (3 + 7 + 1) / 2 + 7 = 62: Cantor's pairing of layer and feature, as circuit-tracer has it.
    assert nodes["3_7_1"]["feature"] == 62 and nodes["3_7_1"]["ctx_idx"] == 1 and nodes["4_0_0"]["ctx_idx"] == 0
    assert nodes["0_4_1"]["feature_type"] == "mlp reconstruction error"
    assert {(link["source"], link["target"]): link["weight"] for link in written["links"]} == {
        ("3_7_1", "4_0_0"): -1.5, ("3_7_1", "0_4_1"): 0.25, ("4_0_0", "5_0_1"): 3.0, ("0_4_1", "5_0_1"): 0.5
    }  # fmt: skip
    assert nodes["4_0_0"]["influence"] == pytest.approx(3 / 5) and nodes["3_7_1"]["influence"] == pytest.approx(4.5 / 5)


def test_circuit_tracers_own_reader_takes_it(graph: nx.DiGraph) -> None:
    models = pytest.importorskip("circuit_tracer.frontend.graph_models", reason="circuit-tracer is not installed")
    nx.set_node_attributes(graph, {name: name for name in graph}, "label")
    written = circuit_tracer_graph(graph)
    read = models.Model.model_validate(written)
    assert [node.node_id for node in read.nodes] == [node["node_id"] for node in written["nodes"]]
    own = models.Node.feature_node(layer=3, pos=1, feat_idx=7)
    ours = next(node for node in read.nodes if node.node_id == own.node_id)
    assert (ours.feature, ours.layer, ours.feature_type, ours.jsNodeId) == (
        own.feature, own.layer, own.feature_type, own.jsNodeId
    )  # fmt: skip


def test_several_dictionaries_in_a_layer_are_refused(graph: nx.DiGraph, tmp_path: Path) -> None:
    graph.graph["sites"].insert(0, "blocks.3.hook_resid_mid")
    with pytest.raises(UserError, match="one dictionary a layer"):
        export_circuit(graph, {}, ["circuit-tracer"], tmp_path)


def test_an_unknown_format_is_named_before_anything_is_written(graph: nx.DiGraph, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no format 'gexfs': did you mean 'gexf'"):
        export_circuit(graph, {}, ["csv", "gexfs"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_circuit_without_edges_or_nodes_is_written_too(tmp_path: Path) -> None:
    paths = export_circuit(nx.DiGraph(), {}, list(FORMATS), tmp_path)
    assert all(path.is_file() for path in paths.values())
