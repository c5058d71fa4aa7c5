"""Which settings change which artifacts: what is expensive is made again when it must be, and only then."""

from itertools import pairwise
from pathlib import Path

import pytest

from sfc.core.artifacts import MANIFEST
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.models.identity import model_identity
from sfc.pipeline import ensure_circuit, ensure_saes, ensure_store
from sfc.run import Run


def _run(root: Path, *overrides: str) -> Run:
    return Run(load_experiment("tiny", overrides), root)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(tmp_path_factory.mktemp("root"))


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", {"store", "saes", "circuit"}),
        ("model.template=plain", {"store", "saes", "circuit"}),
        ("prompts.max_tokens=99", {"store", "saes", "circuit"}),
        ("activations.layers=[1]", {"saes", "circuit"}),
        ("activations.dtype=bfloat16", {"store", "saes", "circuit"}),
        ("corpus.source=replies", {"saes", "circuit"}),
        ("corpus.stored=never", set()),
        ("saes.k=9", {"saes", "circuit"}),
        ("saes.seed=1", {"saes", "circuit"}),
        ("saes.layers_at_once=1", set()),
        ("saes.min_variance_explained=0.1", set()),
        ("prompts.hard_share=0.5", {"circuit"}),
        ("discovery.method=correlation", {"circuit"}),
        ("discovery.population=safe", {"circuit"}),
        ("discovery.contrast=toxic-hard", {"circuit"}),
        ("discovery.contrast=toxic-safe", set()),
        ("evaluation.error_mode=keep-current", {"circuit"}),
        ("description=other words", set()),
    ],
)
def test_a_setting_changes_the_artifacts_that_depend_on_it(plain: Run, override: str, changed: set[str]) -> None:
    other = _run(plain.root, override)
    folders = {
        "store": (plain.store.folder, other.store.folder),
        "saes": (plain.saes.folder, other.saes.folder),
        "circuit": (plain.circuit("violence").folder, other.circuit("violence").folder),
    }
    assert {name for name, (before, after) in folders.items() if before != after} == changed


def test_each_category_has_its_own_circuit(plain: Run) -> None:
    assert plain.circuit("violence").folder != plain.circuit("privacy").folder


def test_what_is_complete_is_not_made_again(plain: Run) -> None:
    """Manifests alone: making anything would need a store that is not there."""
    artifacts = plain.store, plain.saes, plain.circuit("violence")
    for artifact in artifacts:
        artifact.folder.mkdir(parents=True)
        artifact.finish(sites=plain.experiment.activations.sites)
    assert (ensure_store(plain), ensure_saes(plain), ensure_circuit(plain, "violence")) == artifacts
    assert [list(artifact.folder.iterdir()) for artifact in artifacts] == [[a.folder / MANIFEST] for a in artifacts]


def test_a_corrupt_manifest_is_told_and_mended_by_rebuilding(tmp_path: Path) -> None:
    run = _run(tmp_path, "prompts.limit=4", "activations.layers=[0]")
    run.store.folder.mkdir(parents=True)
    (run.store.folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not JSON.*--rebuild"):
        ensure_store(run)
    assert ensure_store(run, rebuild=True).is_complete()


def test_a_missing_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set 'nowhere'"):
        _ = Run(load_experiment("tiny"), tmp_path, data="nowhere").prompts


def test_the_identity_of_a_model_changes_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    config = load_experiment("tiny", [f"model.source={tmp_path}", f"model.adapter={tmp_path}"]).model
    identities = [model_identity(config)]
    for name in ("config.json", "adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("other")
        identities.append(model_identity(config))
    assert all(a != b for a, b in pairwise(identities))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter .*adapter_config\.json"):
        model_identity(config)
