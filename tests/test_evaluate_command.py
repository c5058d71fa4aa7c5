"""Circuits from files: what they say, which nodes they mean, and `sfc evaluate` as a user types it."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from commands import Finished, assert_one_line, sfc

from sfc.circuits.listed import DictionaryNames, ListedCircuit, numbered, read_listed
from sfc.circuits.nodes import Nodes
from sfc.core.errors import UserError
from sfc.studies.evaluate.measure import circuit_names

NODES = Nodes.of({"blocks.6.hook_resid_pre": 800, "blocks.7.hook_resid_pre": 50})
RANKED = {
    "list.json": ["a/F1", "b/F2"],
    "ranks.json": [{"name": "b/F2", "rank": 2}, {"node": "a/F1", "rank": 1, "effect": 0.1}],
    "effects.json": {"nodes": [{"id": "b/F2", "effect": 0.5}, {"node": "a/F1", "effect": -0.6}]},
    "ranks.csv": "rank,node,remark\n7,b/F2,x\n3,a/F1,\n",
    "effects.csv": "node,effect\nb/F2,1e-2\na/F1,-2\n",
    "bom.csv": "\ufeffnode\na/F1\nb/F2\n",
    "neuronpedia.json": [{"modelId": "a", "source": "6-x", "index": "1"}, {"modelId": "b", "layer": "6-x", "index": 0}],
    "neuronpedia.csv": "modelId,layer,index\na,6-x,1\nb,6-x,0\n",
}


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", RANKED)
def test_lists_in_json_and_csv_are_read_best_first(name: str, tmp_path: Path) -> None:
    listed = read_listed(write(tmp_path, name, RANKED[name]))
    expected = ("a/6-x/1", "b/6-x/0") if "neuronpedia" in name else ("a/F1", "b/F2")
    assert listed == ListedCircuit("list of nodes", expected, name.startswith(("ranks", "effects")))


def tracer_node(node_id: str, kind: str = "cross layer transcoder", **more: Any) -> dict[str, Any]:
    layer, feature, position = node_id.split("_")
    return {
        "node_id": node_id, "feature": 3, "layer": layer, "ctx_idx": int(position), "feature_type": kind,
        "jsNodeId": f"{layer}_{feature}-0", **more,
    }  # fmt: skip


TRACER = {
    "metadata": {"slug": "x", "scan": "some-transcoders", "transcoder_list": [], "prompt": "hm", "prompt_tokens": []},
    "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
    "nodes": [
        tracer_node("E_1234_1", "embedding"),
        tracer_node("6_12_1", influence=0.9),
        tracer_node("6_12_2", influence=0.2),
        tracer_node("7_0_2", influence=0.1),
        tracer_node("6_-1_2", "mlp reconstruction error", influence=0.8),
        tracer_node("9_99_2", "logit"),
    ],
    "links": [
        {"source": "6_12_1", "target": "7_0_2", "weight": 1.0},
        {"source": "6_12_2", "target": "7_0_2", "weight": 2.0},
        {"source": "E_1234_1", "target": "6_12_1", "weight": 1.0},
        {"source": "7_0_2", "target": "9_99_2", "weight": 1.0},
    ],
}


def test_a_graph_of_circuit_tracer_gives_its_features_and_errors_once(tmp_path: Path) -> None:
    listed = read_listed(write(tmp_path, "graph.json", TRACER))
    nodes = ("7/F0", "6/F12", "6/error")
    assert listed == ListedCircuit("graph of circuit-tracer", nodes, True, (("6/F12", "7/F0"),), ("some-transcoders",))


def test_a_graph_without_influences_is_not_ranked(tmp_path: Path) -> None:
    nodes = [tracer_node("6_12_1", influence=0.9), tracer_node("7_0_2")]
    listed = read_listed(write(tmp_path, "graph.json", {"nodes": nodes}))
    assert listed == ListedCircuit("graph of circuit-tracer", ("6/F12", "7/F0"), False)


BAD = {
    "a.txt": ("a/F1", "neither .json nor .csv"),
    "empty.json": ([], "names no nodes"),
    "empty.csv": ("", "names no nodes"),
    "object.json": ({"features": []}, "expected a list of nodes"),
    "number.json": ([3], "node 1: expected a name"),
    "nameless.csv": ("effect\n3\n", "node 1 has no name"),
    "unfinished.json": ("[", "is not JSON"),
    "twice.json": (["a/F1", "a/F1"], "names 'a/F1' twice"),
    "half.csv": ("node,effect\na/F1,\nb/F2,2\n", "ranks 1 of 2 nodes"),
    "words.csv": ("node,rank\na/F1,first\n", "node 1: rank must be a number, not 'first'"),
    "nan.csv": ("node,effect\na/F1,nan\n", "must be a number"),
    "edges.json": ({"nodes": ["a/F1"], "edges": [["a/F1"]]}, "an edge is a pair of names"),
    "tracer.json": ({"nodes": [tracer_node("x_y_1")]}, "neither a feature"),
    "kind.json": ({"nodes": [tracer_node("6_1_1", "lorsa")]}, "neither a feature"),
    "idless.json": ({"nodes": [{"feature_type": "logit"}]}, "no node_id"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_circuit_is_refused(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    with pytest.raises(UserError) as error:
        read_listed(write(tmp_path, name, content))
    assert message in str(error.value) and name in str(error.value)


@pytest.fixture
def names(tmp_path: Path) -> DictionaryNames:
    folder = tmp_path / "gpt2-1234abcd"
    for number, site in enumerate(NODES.sites, 6):
        (folder / site).mkdir(parents=True)
        config = {"metadata": {"hook_name": site, "neuronpedia_id": f"gpt2-small/{number}-res-jb"}}
        write(folder / site, "cfg.json", config)
    return DictionaryNames.of(folder, NODES.sites, "gpt2-small-res-jb/blocks.{layer}.hook_resid_pre")


@pytest.mark.parametrize(
    "name",
    [
        "resid_pre.6/F650", "resid_pre.6/650", "blocks.6.hook_resid_pre/650", "6/F650", "gpt2-small/6-res-jb/650",
        "https://www.neuronpedia.org/gpt2-small/6-res-jb/650", "gpt2-small-res-jb/blocks.6.hook_resid_pre/650",
    ],
)  # fmt: skip
def test_a_node_has_many_names(name: str, names: DictionaryNames) -> None:
    assert NODES.name(names.node(name, NODES)) == "resid_pre.6/F650"


def test_errors_and_later_sites_have_names_too(names: DictionaryNames) -> None:
    wanted = ("gpt2-small/7-res-jb/49", "7/error", "resid_pre.6/error")
    assert [NODES.name(names.node(name, NODES)) for name in wanted] == [
        "resid_pre.7/F49", "resid_pre.7/error", "resid_pre.6/error"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2-small/6-att-kk/650", "'gpt2-small/6-att-kk', which is not in use"),
        ("gpt2-small/8-res-jb/1", "also called gpt2-small/6-res-jb"),
        ("resid_pre.6/F800", "no node 'resid_pre.6/F800'"),
        ("resid_pre.6/twelve", "no node"),
        ("resid_pre.6", "which is not in use"),
    ],
)
def test_nodes_of_other_dictionaries_are_refused(name: str, message: str, names: DictionaryNames) -> None:
    with pytest.raises(UserError, match=message):
        names.node(name, NODES)


def test_a_layer_with_two_dictionaries_has_no_name_by_its_number(tmp_path: Path) -> None:
    sites = ["blocks.6.hook_resid_pre", "blocks.6.hook_resid_post"]
    for site in sites:
        (tmp_path / site).mkdir()
        write(tmp_path / site, "cfg.json", {})
    assert "6" not in DictionaryNames.of(tmp_path, sites, None).sites


def test_circuits_by_number(names: DictionaryNames, tmp_path: Path) -> None:
    listed = read_listed(write(tmp_path, "graph.json", TRACER))
    with pytest.raises(UserError, match=r"'some-transcoders', which is not in use.*gpt2-1234abcd"):
        numbered(listed, names, NODES)
    ours = listed._replace(dictionaries=("gpt2-1234abcd",))
    assert numbered(ours, names, NODES) == ([801, 12, 800], [(12, 801)])
    with pytest.raises(UserError, match="are the same node"):
        numbered(ListedCircuit("", ("6/F1", "resid_pre.6/F1"), False), names, NODES)
    with pytest.raises(UserError, match="not among the nodes"):
        numbered(ListedCircuit("", ("6/F1",), False, (("6/F1", "7/F1"),)), names, NODES)


def test_circuits_are_called_by_their_files() -> None:
    paths = [Path("x/circuit-privacy-1/circuit.json"), Path("a.csv"), Path("b/a.json")]
    assert circuit_names(paths) == ["circuit-privacy-1", "a (2)", "a (3)"]


RESULT_KEYS = {
    "preset", "category", "asked", "population", "baseline", "error_mode", "n_prompts", "n_pairs", "circuits", "files",
    "seconds",
}  # fmt: skip
FIGURES = (
    "faithfulness", "completeness", "completeness_normalised", "f_model", "f_circuit", "f_complement", "f_empty",
    "random_faithfulness", "recovered_toxic", "recovered_safe", "agreement", "agreement_low", "kl_recovered_toxic",
    "gap_kept", "separation", "separation_model", "prompt_free", "kl_without_safe",
)  # fmt: skip
RATIOS_OF_EDGES = ("edge_faithfulness", "edge_faithfulness_low", "random_edge_faithfulness")
FEW = ("--preset", "tiny", "--json", "--set", "evaluation.random_draws=2", "--set", "discovery.method=attribution")
BY_MEANS = (*FEW, "--set", "discovery.baseline=safe-mean", "--set", "evaluation.error_mode=node")
EVALUATE = ("evaluate", *BY_MEANS)


@pytest.fixture(scope="module")
def discovered(root: Path) -> dict:
    return sfc("discover", *BY_MEANS, root=root).result


@pytest.fixture(scope="module")
def circuit(discovered: dict) -> dict:
    return json.loads(Path(discovered["files"]["circuit"]).read_text())


@pytest.fixture(scope="module")
def others(circuit: dict, discovered: dict, root: Path) -> list[Path]:
    """The circuit as others would write it: a CSV list without order, and a graph file of circuit-tracer."""
    names = [node["id"] for node in circuit["nodes"]]
    with (path := root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["node"], *([name] for name in names)])
    folder = next((root / "saes").glob("tiny-*")).name
    nodes = [
        tracer_node(f"{n['layer']}_{n['id'].rpartition('F')[2]}_3") if n["kind"] == "feature"
        else tracer_node(f"{n['layer']}_-1_3", "mlp reconstruction error")
        for n in circuit["nodes"]
    ]  # fmt: skip
    return [path, write(root, "graph.json", {"metadata": {"scan": folder}, "nodes": nodes, "links": []})]


@pytest.fixture(scope="module")
def evaluated(others: list[Path], discovered: dict, root: Path) -> dict:
    return sfc(*EVALUATE, discovered["files"]["circuit"], *others, root=root).result


def assert_alike(actual: float | None, expected: float | None) -> None:
    assert (actual is None) == (expected is None)
    assert expected is None or actual == pytest.approx(expected, abs=1e-3)


def test_every_form_of_a_circuit_has_the_figures_that_discovery_reports(evaluated: dict, discovered: dict) -> None:
    assert set(evaluated) == RESULT_KEYS and len(evaluated["circuits"]) == 3
    for row in evaluated["circuits"]:
        assert row["n_nodes"] == discovered["n_nodes"] == sum(row["nodes_per_site"].values())
        for figure in set(FIGURES) - {"random_faithfulness"}:
            assert_alike(row[figure], discovered[figure])
    ours, listed, graph = evaluated["circuits"]
    assert (ours["format"], ours["is_ranked"]) == ("circuit of sfc", True)
    assert (listed["name"], graph["name"]) == ("list", "graph") and not listed["is_ranked"]
    assert ours["n_edges"] == discovered["n_edges"]
    assert all(row[key] is None for key in ("f_edges", *RATIOS_OF_EDGES) for row in (listed, graph))
    assert ours["f_edges"] == pytest.approx(discovered["f_edges"], abs=1e-3)
    assert_alike(ours["edge_faithfulness"], discovered["edge_faithfulness"])
    assert all((ours[key] is None) == (ours["faithfulness"] is None) for key in RATIOS_OF_EDGES)


def test_a_ranked_circuit_has_a_curve(evaluated: dict, root: Path) -> None:
    curves = pd.read_csv(evaluated["files"]["curves"])
    ours, listed = (curves[curves["circuit"] == row["name"]] for row in evaluated["circuits"][:2])
    assert len(ours) > 1 and ours["size"].max() == evaluated["circuits"][0]["n_nodes"] and len(listed) == 1
    assert np.isfinite(curves[["f_model", "f_circuit", "f_complement", "f_empty"]]).all(axis=None)
    page = Path(evaluated["files"]["page"]).read_text(encoding="utf-8")
    assert "list" in page and "F(M" in page


def test_other_files_are_another_evaluation(evaluated: dict, others: list[Path], root: Path) -> None:
    fewer = sfc(*EVALUATE, others[0], root=root).result
    assert fewer["files"] != evaluated["files"]


def test_without_files_the_categorys_own_circuit_is_judged(discovered: dict, root: Path) -> None:
    own = sfc(*EVALUATE, root=root).result
    assert own["circuits"][0]["f_circuit"] == pytest.approx(discovered["f_circuit"], abs=1e-3)
    elsewhere = sfc(*EVALUATE, discovered["files"]["circuit"], "--category", "privacy", root=root).result
    assert elsewhere["category"] == "privacy" and elsewhere["circuits"][0]["n_nodes"] == discovered["n_nodes"]


def test_against_counterfactuals_the_own_circuit_has_the_figures_that_discovery_reports(root: Path) -> None:
    discovered, own = (sfc(command, *FEW, root=root).result for command in ("discover", "evaluate"))
    [judged] = own["circuits"]
    for figure in (*FIGURES, "null_agreement", "p_value", "all_features_recovered"):
        if figure in judged:
            assert_alike(judged[figure], discovered[figure])
    assert judged["refused"] == discovered["refused"] and own["n_pairs"] == len(pd.read_csv(own["files"]["scores"]))
    assert judged["says"] and judged["says"] in discovered["says"]


def refused(root: Path, name: str, content: Any, *options: str) -> Finished:
    return sfc(*EVALUATE, write(root, name, content), *options, root=root)


def test_all_edges_between_neighbours_are_as_faithful_as_the_nodes(circuit: dict, root: Path) -> None:
    layer = {node["id"]: node["layer"] for node in circuit["nodes"]}
    edges = [[u, d] for u in layer for d in layer if layer[d] == layer[u] + 1]
    row = sfc(*EVALUATE, write(root, "all.json", {"nodes": list(layer), "edges": edges}), root=root).result["circuits"][
        0
    ]
    assert row["n_edges"] == len(edges) and row["f_edges"] == pytest.approx(row["f_circuit"], abs=1e-3)
    assert row["random_edge_faithfulness"] == row["edge_faithfulness"]
    backwards = {"nodes": list(layer), "edges": [edge[::-1] for edge in edges]}
    finished = sfc(*EVALUATE, write(root, "backwards.json", backwards), root=root)
    assert finished.result["circuits"][0]["edge_faithfulness"] is None
    assert "edges are not judged" in finished.stderr
    few = ("--set", f"discovery.edge_nodes={len(layer) - 1}")
    finished = sfc(*EVALUATE, *few, root / "all.json", root=root)
    row = finished.result["circuits"][0]
    assert (row["f_edges"], row["random_edge_faithfulness"]) == (None, None) and row["n_edges"] == len(edges)
    assert "edges are not judged: they are looked for between" in finished.stderr


def test_what_cannot_be_judged_ends_with_one_line(discovered: dict, root: Path) -> None:
    assert_one_line(refused(root, "a.json", ["gpt2-small/6-res-jb/650"]), "gpt2-small/6-res-jb", "not in use")
    assert_one_line(refused(root, "b.json", ["resid_post.1/F100000"]), "resid_post.1/F100000")
    assert_one_line(refused(root, "c.json", TRACER), "some-transcoders")
    assert not [path for path in (root / "circuits").rglob("evaluation-*") if not (path / "manifest.json").is_file()]
