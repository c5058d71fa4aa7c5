"""The Python API and the notebook, and the commands that draw and export, on one circuit of the tiny preset."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from test_steer_command import LENIENT
from typer.testing import CliRunner

import sfc
from sfc.api import Discovered
from sfc.cli import command_line
from sfc.core.errors import UserError
from sfc.studies.steer import STEER
from sfc.studies.study import ensure

REPOSITORY = Path(__file__).parents[1]
NOTEBOOK = REPOSITORY / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> Discovered:
    """The circuit that the notebook finds as well."""
    return sfc.discover(sfc.load_preset("tiny", root=tmp_path_factory.mktemp("root")), "violence")


def command(circuit: Discovered, *arguments: str) -> dict:
    """What `sfc …` with `--json` prints for this circuit's run."""
    shared = ["--preset", "tiny", "--root", str(circuit.run.root), "--json"]
    finished = CliRunner().invoke(command_line(), [*arguments, *shared], catch_exceptions=False)
    assert finished.exit_code == 0
    return json.loads(finished.stdout)


def test_importing_the_package_imports_neither_torch_nor_pandas() -> None:
    program = "import sys, sfc; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def test_every_name_that_the_package_promises_is_there() -> None:
    assert all(callable(getattr(sfc, name)) for name in sfc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'discovery'"):
        _ = sfc.discovery  # pyright: ignore


def test_any_study_runs_by_its_name_and_gives_figures_tables_and_a_page(circuit: Discovered) -> None:
    found = sfc.run_study(circuit.run, "probe", category="privacy")
    assert found.result["category"] == "privacy" and found.folder.name.startswith("probe-privacy-")
    assert found.table("layers.csv")["layer"].tolist() == [0, 1] == [row["layer"] for row in found.result["layers"]]
    assert found.page.title == "Refusal direction and probe · privacy · tiny"
    written = found.files["page"].stat().st_mtime_ns
    again = sfc.run_study(circuit.run, "probe", category="privacy")
    assert again.result == found.result and again.files["page"].stat().st_mtime_ns == written
    for name, options, words in (
        ("prove", {}, "did you mean 'probe'"),
        ("probe", {"categories": "x"}, "no option 'categories': did you mean 'category'"),
        ("behaviour", {"limit": 0}, "limit: "),
        ("probe", {"category": "cooking"}, "cooking"),
    ):
        with pytest.raises(UserError, match=words):
            sfc.run_study(circuit.run, name, **options)


def test_a_discovered_circuit_has_its_files_figures_and_cards(circuit: Discovered) -> None:
    assert circuit.result["n_nodes"] == len(circuit.graph) == len(circuit.nodes)
    assert set(circuit.cards["features"]) == {n for n, d in circuit.graph.nodes(data=True) if d["kind"] == "feature"}
    effects = circuit.nodes["effect"].abs().tolist()
    assert effects == sorted(effects, reverse=True)
    drawn = {name for trace in sfc.plot(circuit).data for name in trace.ids or ()}
    assert drawn == set(circuit.graph)
    assert len(circuit.graph) in [x for trace in sfc.plot_curve(circuit).data for x in trace.x or ()]


def test_a_second_time_it_is_read_and_not_made(circuit: Discovered) -> None:
    before = {path: path.stat().st_mtime_ns for path in circuit.folder.iterdir()}
    again = sfc.discover(circuit.run, "violence")
    assert (
        again.cards == circuit.cards and {path: path.stat().st_mtime_ns for path in circuit.folder.iterdir()} == before
    )


def test_own_labels_are_on_the_page_after_drawing_and_cards_are_not_made_again(circuit: Discovered) -> None:
    name = next(iter(circuit.cards["features"]))
    (circuit.folder / "labels.json").write_text(json.dumps({name: "a label of my own"}))
    features = (circuit.folder / "features.json").stat().st_mtime_ns
    page = Path(command(circuit, "draw")["files"]["page"]).read_text(encoding="utf-8")
    assert "a label of my own" in page
    assert (circuit.folder / "features.json").stat().st_mtime_ns == features
    written = command(circuit, "export", "--format", "gexf,csv", "--output", str(circuit.run.root))["files"]
    assert set(written) == {"gexf", "nodes", "edges"}
    assert nx.read_gexf(written["gexf"]).nodes[name]["label"] == "a label of my own"
    (circuit.folder / "labels.json").unlink()


def test_the_probe_switches_features_of_the_circuit_off(circuit: Discovered) -> None:
    probe, prompt = sfc.open_model(circuit.run), "Bake bread?"
    features = [str(name) for name in circuit.nodes.index[circuit.nodes["kind"] == "feature"]]
    assert probe.fires(prompt, features).values.any()
    assert probe.score_of(prompt, dict.fromkeys(features, 0.0)) != pytest.approx(probe.score_of(prompt), abs=1e-4)


def test_steering_along_a_feature_adds_a_share_of_the_residual_norm(circuit: Discovered) -> None:
    probe, prompt, run = sfc.open_model(circuit.run), "Bake bread?", circuit.run
    name = next(str(n) for n in circuit.nodes.index[circuit.nodes["kind"] == "feature"])
    [site] = {str(node["site"]) for n, node in circuit.graph.nodes(data=True) if n == name}
    steering = sfc.steer(run, name, 0.5)
    [edit] = steering.edits
    row = probe.dictionaries[site].W_dec[int(name.rpartition("/F")[2])]
    assert torch.equal(edit.direction.float(), row) and edit.sites == (site,)
    with h5py.File(run.store.folder / "shard-00000.h5") as file:
        rows = np.asarray(file[f"activations/{site}"]).astype(np.float64)
    assert edit.amount == pytest.approx(0.5 * np.linalg.norm(rows, axis=1).mean(), rel=1e-5)
    assert (steering.positions, steering.during_reply) == ("suffix", False)
    assert abs(probe.score_of(prompt, steering=steering) - probe.score_of(prompt)) > 1e-3
    assert probe.score_of(prompt, steering=sfc.steer(run, name, 0)) == pytest.approx(probe.score_of(prompt), abs=1e-6)


def test_steering_along_a_finished_direction_is_what_its_sweep_did(circuit: Discovered) -> None:
    overrides = [text for text in LENIENT if text != "--set"]
    short = ["steering.prompts=8", "steering.test_prompts=2", "steering.alphas=[-0.5, 0.5]", "steering.layers=[0]"]
    run = sfc.load_preset("tiny", [*overrides, *short], root=circuit.run.root)
    folder = ensure(STEER, run).folder
    sweep = pd.read_csv(folder / "sweep.csv")
    sweep = sweep[(sweep["direction"] == "toxic-safe") & (sweep["alpha"] == 0.5)]
    probe, steering = sfc.open_model(run), sfc.steer(circuit.run, folder.name, 0.5)
    for row in sweep.to_dict("records"):
        assert probe.score_of(row["prompt"], steering=steering) == pytest.approx(row["score"], abs=1e-4)
    assert len(sweep) == 4 and (sweep["score"] - sweep["unsteered_score"]).abs().max() > 1e-3


def test_a_direction_that_is_not_there_is_an_error_that_says_what_is(circuit: Discovered) -> None:
    for name, words in (
        ("refusal", "no direction 'refusal'"),
        ("resid_post.7/F1", "there are SAEs at"),
        ("resid_post.1/F99999", "no feature F99999"),
        ("resid_post.1/error", "no direction"),
    ):
        with pytest.raises(UserError, match=words):
            sfc.steer(circuit.run, name, 0.1)


def test_the_notebook_runs_and_its_figures_display(circuit: Discovered) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    environment = {"SFC_PRESET": "tiny", "SFC_ROOT": str(circuit.run.root), "PYTHONPATH": str(REPOSITORY)}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(env={**os.environ, **environment})
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("application/vnd.plotly.v1+json" in output.data for output in shown) == 2
