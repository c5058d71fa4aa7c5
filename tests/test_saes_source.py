"""`saes.source`: dictionaries that others trained, in place of our own, from the command line to the circuit."""

import json
import shutil
from pathlib import Path

import commands
import numpy as np
import pandas as pd
import pytest
import torch
from commands import Finished
from safetensors.torch import load_file, save_file

from sfc.circuits.options import DiscoveryOptions
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.run import Run
from sfc.saes.architectures import CONFIG_FILE, WEIGHTS_FILE
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.format import Dictionaries
from sfc.saes.published import fetch_pretrained
from sfc.saes.source import EMBEDDED_DICTIONARIES
from sfc.session import Session
from sfc.studies.discover import DISCOVER, circuit_of
from sfc.studies.study import ensure
from sfc.studies.train import TRAIN
from sfc.studies.train.rows import HeldOutBlock, check_fit
from sfc.studies.train.train import QUALITY_FILE
from tools.embed_dictionaries import FIGURES_FILE, embed

SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
D_IN = 32


def sfc(*arguments: object, root: Path) -> Finished:
    """Run a command in this process, without the hub."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        return commands.sfc(*arguments, "--preset", "tiny", "--json", root=root)


def run_with(root: Path, source: Path | str, *overrides: str) -> Run:
    return Run(load_experiment("tiny", [f"saes.source={source}", *overrides]), root)


@pytest.fixture(scope="module")
def trained(root: Path) -> Run:
    """A run that trained its own dictionaries and found a circuit."""
    run = Run(load_experiment("tiny"), root)
    circuit_of(run, "violence")
    return run


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Path:
    """The trained dictionaries and nothing else, in a folder that a test may spoil."""
    for site in SITES:
        shutil.copytree(trained.saes.folder / site, tmp_path / "copied" / site)
    return tmp_path / "copied"


def measured(rows: torch.Tensor) -> list[HeldOutBlock]:
    return [HeldOutBlock(part, np.ones(len(part), dtype=int)) for part in rows.split(2)]


def save_perfect(folder: Path, site: str, normalisation: str) -> None:
    """A standard SAE that loses nothing: a feature for each sign of each dimension. Written by SAELens itself."""
    from sae_lens import SAE

    config = {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": 2 * D_IN,
        "normalize_activations": normalisation,
        "metadata": {"hook_name": site},
    }
    sae = SAE.from_dict(config)
    both = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    sae.W_enc.data, sae.W_dec.data, sae.b_dec.data = both.T.contiguous(), both, torch.full((D_IN,), 0.1)
    sae.save_model(folder)


def test_the_command_gives_the_circuit_of_dictionaries_trained_in_place(trained: Run, copied: Path, root: Path) -> None:
    finished = sfc("discover", "--category", "violence", "--set", f"saes.source={copied}", root=root)
    assert finished.status == 0, finished.stderr
    assert "training" not in finished.stderr
    result = json.loads(finished.stdout)
    before = circuit_of(trained, "violence")
    ours = json.loads((before.folder / "circuit.json").read_text())
    theirs = json.loads((root / result["files"]["circuit"]).read_text())
    assert theirs["nodes"] == ours["nodes"] and theirs["edges"] == ours["edges"]
    expected = before.result
    keys = set(expected) - {"files", "seconds"}
    assert {key: result[key] for key in keys} == {key: expected[key] for key in keys}


def test_what_is_adopted_is_copied_measured_recorded_and_kept(trained: Run, copied: Path, root: Path) -> None:
    run = run_with(root, copied)
    artifact = ensure(TRAIN, run)
    for site in SITES:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            assert (artifact.folder / site / name).read_bytes() == (copied / site / name).read_bytes()
    assert Path(artifact.manifest["source"]).name == "copied"
    assert trained.saes.manifest()["source"] == "trained"
    ours, theirs = (pd.read_csv(a.folder / QUALITY_FILE) for a in (trained.saes, artifact))
    pd.testing.assert_frame_equal(ours, theirs)
    before = (artifact.folder / "manifest.json").stat().st_mtime_ns
    assert (ensure(TRAIN, run).folder / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("normalisation", ["constant_norm_rescale", "layer_norm"])
def test_a_perfect_normalised_dictionary_leaves_nothing_to_the_error_nodes(
    trained: Run, tmp_path: Path, normalisation: str
) -> None:
    for layer, site in enumerate(SITES):
        save_perfect(tmp_path / f"layer {layer}", site, normalisation)
    run = run_with(
        trained.root,
        tmp_path / "layer {layer}",
        "saes.min_variance_explained=0.999",
        "discovery.method=attribution",
        "evaluation.sizes=[8,64]",
    )
    result = circuit_of(run, "violence").result
    quality = pd.read_csv(run.saes.folder / QUALITY_FILE)
    assert (quality["fvu"].dropna() < 1e-6).all() and (quality["loss_recovered"].dropna() > 0.999).all()
    agreement = quality.loc[quality["role"].isin(["all", "in series"]), "agreement"]
    assert len(agreement) == 3 and np.allclose(agreement, 1, atol=1e-3)
    assert result["rotated_agreement"] is not None and result["null_agreement"] is None, "it has no fixed k"
    assert result["error_share"] < 1e-3 and result["n_nodes"] > 0


def test_the_artifact_depends_on_the_content_and_not_on_the_place(trained: Run, copied: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(copied, tmp_path / "moved")
    here, there = run_with(trained.root, copied), run_with(trained.root, moved)
    assert here.saes.folder == there.saes.folder != trained.saes.folder
    circuits = [DISCOVER.artifact(run.having(DiscoveryOptions, category="violence")) for run in (here, there)]
    assert circuits[0].folder == circuits[1].folder
    assert run_with(trained.root, copied, "saes.k=9").saes.folder == here.saes.folder, "nothing is trained"
    assert run_with(trained.root, copied, "saes.min_variance_explained=0.1").saes.folder != here.saes.folder
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        changed = shutil.copytree(copied, tmp_path / name)
        content = (changed / SITES[1] / name).read_bytes()
        (changed / SITES[1] / name).write_bytes(content + b" ")
        assert run_with(trained.root, changed).saes.folder != here.saes.folder
    releases = [run_with(trained.root, name).saes.folder for name in ("release/one", "release/other")]
    assert releases[0] != releases[1]


def test_half_precision_restores_the_same(trained: Run, copied: Path) -> None:
    run = run_with(trained.root, copied, "saes.dtype=bfloat16")
    ours, theirs = (circuit_of(each, "violence").result for each in (trained, run))
    assert run.saes.folder != run_with(trained.root, copied).saes.folder
    assert Session(run).dictionaries[SITES[0]].W_dec.dtype == torch.bfloat16
    for figure in ("f_model", "f_empty", "separation_model"):
        assert theirs[figure] == pytest.approx(ours[figure], rel=0.05, abs=0.01), figure
    columns = ["fvu", "agreement", "loss_recovered"]
    before, after = (pd.read_csv(each.saes.folder / QUALITY_FILE)[columns] for each in (trained, run))
    np.testing.assert_allclose(after, before, rtol=0.05, atol=0.02)


def test_one_dictionary_serves_one_site(trained: Run, copied: Path) -> None:
    run = run_with(trained.root, copied / SITES[1], "activations.layers=[1]")
    assert list(Dictionaries(ensure(TRAIN, run).folder, [SITES[1]])) == [SITES[1]]
    with pytest.raises(UserError, match=r"is one of blocks\.1\.hook_resid_post, not of blocks\.0\.hook_resid_post"):
        _ = run_with(trained.root, copied / SITES[1]).saes


def test_a_source_that_is_not_there_is_told_before_anything_is_collected(
    tmp_path: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    for source in ("nowhere", "/no/such/folder", "./no/such/folder", "~/no/such/folder", "sfc/no/such/folder"):
        with pytest.raises(UserError, match="no folder"):
            _ = run_with(tmp_path, source).saes
    shutil.rmtree(copied / SITES[1])
    with pytest.raises(UserError, match=r"no dictionary for blocks\.1\.hook_resid_post"):
        _ = run_with(tmp_path, copied).saes


def spoil_scale(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    save_file({**weights, "W_dec": weights["W_dec"] * 30}, folder / WEIGHTS_FILE)


def test_a_dictionary_that_does_not_fit_is_refused_with_its_variance_explained(
    trained: Run, copied: Path, root: Path
) -> None:
    spoil_scale(copied / SITES[1])
    before = sorted((root / "saes").glob("tiny-*"))
    finished = sfc("train", "--set", f"saes.source={copied}", root=root)
    assert finished.status == 2 and "Traceback" not in finished.stderr
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {SITES[1]}: the dictionary explains -")
    assert "less than saes.min_variance_explained=0.5" in last
    assert not [folder for folder in root.glob("saes/tiny-*/manifest.json") if folder.parent not in before]
    assert ensure(TRAIN, run_with(root, copied, "saes.min_variance_explained=-1e9")).result["quality"]


def test_the_fit_is_one_minus_the_variance_unexplained(tmp_path: Path) -> None:
    save_perfect(tmp_path, SITES[0], "none")
    [dictionary] = Dictionaries(tmp_path.parent, [tmp_path.name]).values()
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(0))
    assert check_fit(dictionary, measured(x), 0.5) == pytest.approx(1, abs=1e-6)
    with pytest.raises(UserError, match="width 32, those of this model have 31"):
        check_fit(dictionary, measured(x[:, :-1]), 0.5)
    with pytest.raises(UserError, match="explains nan of the variance"):
        check_fit(dictionary, measured(torch.zeros(5, D_IN)), -1e9)


def test_a_release_that_cannot_be_fetched_is_one_clear_line(trained: Run, root: Path) -> None:
    source = "gpt2-small-res-jb/blocks.{layer}.hook_resid_pre"
    finished = sfc("train", "--set", f"saes.source={source}", root=root)
    assert finished.status == 2 and "Traceback" not in finished.stderr
    last = finished.stderr.strip().splitlines()[-1]
    assert "SAELens cannot fetch 'blocks.0.hook_resid_pre' of 'gpt2-small-res-jb' (" in last


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2-small-res-jb/no-such-id", "'no-such-id' of 'gpt2-small-res-jb' .SAE ID 'no-such-id' not found"),
        ("no/folder", "no/folder is neither a folder nor a dictionary of a release that SAELens knows"),
    ],
)
def test_a_release_that_does_not_exist_is_told(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        fetch_pretrained(name, tmp_path)


def test_embedded_dictionaries_are_those_of_the_package(
    trained: Run, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfc.saes.source.EMBEDDED_DICTIONARIES", copied)
    assert run_with(trained.root, "embedded").saes.folder == run_with(trained.root, copied).saes.folder
    shutil.rmtree(copied / SITES[0])
    with pytest.raises(UserError, match=rf"no dictionary for {SITES[0]} .* only for {SITES[1]}; .*saes.source=null"):
        _ = run_with(trained.root, "embedded").saes


def test_what_is_embedded_is_in_half_precision_and_restores_the_same(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.embed_dictionaries.LARGEST_CHANGE", 0.1)  # the tiny model's scores hardly differ
    figures = embed(Session(trained), tmp_path)
    assert json.loads((tmp_path / FIGURES_FILE).read_text()) == figures
    ours, stored = (Dictionaries(folder, SITES) for folder in (trained.saes.folder, tmp_path))
    for site in SITES:
        assert load_file(tmp_path / site / WEIGHTS_FILE)["W_dec"].dtype == torch.float16
        torch.testing.assert_close(stored[site].W_dec, ours[site].W_dec, atol=1e-3, rtol=1e-3)
    before = next(row for row in figures["quality"] if row["role"] == "in series")
    assert figures["half_precision"]["in series"]["agreement"] == pytest.approx(before["agreement"], abs=0.1)
    monkeypatch.setattr("tools.embed_dictionaries.LARGEST_CHANGE", -1.0)
    with pytest.raises(UserError, match="half precision changes what features restore by"):
        embed(Session(trained), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(UserError, match="is not finished"):
        embed(Session(run_with(trained.root, "null", "saes.steps=7")), tmp_path)


def test_the_package_has_dictionaries_at_every_site_of_its_preset() -> None:
    experiment = load_experiment("smollm2")
    assert experiment.saes.source == "embedded"
    figures = json.loads((EMBEDDED_DICTIONARIES / FIGURES_FILE).read_text())
    for site, dictionary in Dictionaries(EMBEDDED_DICTIONARIES, experiment.activations.sites).items():
        assert isinstance(dictionary, TopKDictionary) and dictionary.site == site
        assert (dictionary.k, dictionary.d_sae) == (experiment.saes.k, experiment.saes.expansion * dictionary.d_in)
        assert torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(dictionary.d_sae), atol=1e-3)
    restored = [rows["in series"] for rows in (_by_role(figures["quality"]), figures["half_precision"])]
    assert restored[0]["agreement"] == pytest.approx(restored[1]["agreement"], abs=0.01)
    assert sum(path.stat().st_size for path in EMBEDDED_DICTIONARIES.rglob("*")) < 32e6


def _by_role(rows: list[dict]) -> dict[str, dict]:
    return {row["role"]: row for row in rows}
