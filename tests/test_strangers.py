"""What others write: a file of theirs, named in `SFC_PLUGINS`, adds to what commands can do."""

import json
import os
from pathlib import Path

import networkx as nx
import pytest
from commands import sfc_process

STRANGERS = Path(__file__).parent / "strangers"
FEW = [
    part
    for setting in (
        "discovery.audit_nodes=3", "evaluation.random_draws=2", "evaluation.p_value_draws=5", "evaluation.replies=2",
        "discovery.reference=zero",
    )
    for part in ("--set", setting)
]  # fmt: skip


@pytest.fixture(scope="module")
def plugins() -> str:
    files = sorted(STRANGERS.glob("*.py"))
    assert all(len(file.read_text().splitlines()) <= 60 for file in files)
    return os.pathsep.join(map(str, files))


def discover(plugins: str, root: Path, *arguments: str) -> tuple[dict, nx.DiGraph]:
    command = ["discover", "--preset", "tiny", *FEW, *arguments, "--json"]
    result = sfc_process(*command, root=root, SFC_PLUGINS=plugins).result
    graph = nx.node_link_graph(json.loads(Path(result["files"]["circuit"]).read_text()), edges="edges")
    return result, graph


def test_a_method_and_a_kind_of_nodes(plugins: str, tmp_path: Path) -> None:
    own = ["--method", "gradient-norm", "--set", "gradient_norm.power=2", "--set", "discovery.nodes=random-projections"]
    result, graph = discover(plugins, tmp_path, *own)
    assert result["method"] == "gradient-norm" and not (tmp_path / "saes").exists()
    assert {kind for _, kind in graph.nodes(data="kind")} <= {"feature", "error"} and graph.number_of_edges() > 0
    assert "random-projections" in result["files"]["circuit"]
    assert all(effect >= 0 for _, effect in graph.nodes(data="effect"))
    by_correlation = ["--method", "correlation", "--set", "discovery.nodes=random-projections"]
    assert discover(plugins, tmp_path, *by_correlation)[1].number_of_nodes() > 0


def test_without_the_plugin_there_is_neither(tmp_path: Path) -> None:
    for option in ("discovery.method=gradient-norm", "discovery.nodes=random-projections", "gradient_norm.power=2"):
        finished = sfc_process("discover", "--preset", "tiny", "--set", option, root=tmp_path)
        assert (finished.status == 2 and "gradient" in finished.stderr) or "random-projections" in finished.stderr
