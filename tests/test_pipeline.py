"""Which settings change which artifacts: what is expensive is made again when it must be, and only then."""

from itertools import pairwise
from pathlib import Path

import pytest

from sfc.circuits.options import DiscoveryOptions
from sfc.core.artifacts import MANIFEST, Artifact
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.models.sources import model_identity
from sfc.run import Run
from sfc.studies.collect import COLLECT
from sfc.studies.discover import DISCOVER
from sfc.studies.repair import RepairOptions
from sfc.studies.steer import SteeringOptions
from sfc.studies.study import STUDIES, ensure
from sfc.studies.train import TRAIN


def _run(root: Path, *overrides: str) -> Run:
    return Run(load_experiment("tiny", overrides), root)


def _circuit(run: Run, category: str = "violence") -> Artifact:
    return DISCOVER.artifact(run.having(DiscoveryOptions, category=category))


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
        ("corpus.replies=true", {"saes", "circuit"}),
        ("corpus.source=[prompts,sampled]", {"saes", "circuit"}),
        ("corpus.stored=never", set()),
        ("sample.tokens=9", set()),
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
        "circuit": (_circuit(plain).folder, _circuit(other).folder),
    }
    assert {name for name, (before, after) in folders.items() if before != after} == changed


def test_each_category_has_its_own_circuit(plain: Run) -> None:
    assert _circuit(plain).folder != _circuit(plain, "privacy").folder


def test_steering_and_repair_depend_on_their_options_and_on_what_they_need(plain: Run) -> None:
    def folder(name: str, run: Run) -> Path:
        return STUDIES[name].artifact(run).folder

    steer, repair = folder("steer", plain), folder("repair", plain)
    other = _run(plain.root, "saes.k=9")
    assert folder("repair", other) != repair and folder("steer", other) == steer, "no SAE is asked for a direction"
    along_feature = {"direction": "resid_post.1/F5"}
    assert folder("steer", other.having(SteeringOptions, **along_feature)) != folder(
        "steer", plain.having(SteeringOptions, **along_feature)
    )
    assert folder("steer", plain.having(SteeringOptions, category="self_harm")) == folder(
        "steer", plain.having(SteeringOptions, category="self-harm")
    )
    assert folder("repair", plain.having(RepairOptions, sizes=[7])) != repair


def test_what_is_complete_is_not_made_again(plain: Run) -> None:
    """Manifests alone: making anything would need a store that is not there."""
    artifacts = {COLLECT: plain.store, TRAIN: plain.saes, DISCOVER: DISCOVER.artifact(plain)}
    for artifact in artifacts.values():
        artifact.folder.mkdir(parents=True)
        artifact.finish(sites=plain.experiment.activations.sites)
    for study, artifact in artifacts.items():
        assert ensure(study, plain).folder == artifact.folder
        assert list(artifact.folder.iterdir()) == [artifact.folder / MANIFEST]


def test_a_corrupt_manifest_is_told_and_replaced_by_rebuilding(tmp_path: Path) -> None:
    run = _run(tmp_path, "prompts.limit=4", "activations.layers=[0]")
    run.store.folder.mkdir(parents=True)
    (run.store.folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not JSON.*--rebuild"):
        ensure(COLLECT, run)
    ensure(COLLECT, run, rebuild=True)
    assert run.store.is_complete()


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
