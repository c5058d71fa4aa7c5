"""Contrasts by name: which prompts are explained, and which the reference comes from."""

from pathlib import Path

import pandas as pd
import pytest
from test_cli import result_of, sfc

from sfc.errors import UserError
from sfc.experiments import load_experiment

DISCOVER = ("discover", "--preset", "tiny", "--method", "attribution", "--json", "--contrast", "toxic-hard")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contrast")


@pytest.mark.parametrize(("population", "explained"), [("toxic", "toxic"), ("safe", "hard")])
def test_against_hard_prompts_no_others_are_on_the_safe_side(root: Path, population: str, explained: str) -> None:
    result = result_of(sfc(*DISCOVER, "--population", population, root=root))
    folder = Path(result["files"]["circuit"]).parent
    prompts = pd.read_csv(folder / "prompts.csv")
    assert set(prompts["dataset_type"]) == {"toxic", "hard"}
    reference = prompts[prompts["split"] == "reference"]
    assert set(reference["dataset_type"]) == {"toxic", "hard"} - {explained}
    test = prompts[prompts["split"] == "test"]
    assert (test["dataset_type"] == "toxic").sum() == (test["dataset_type"] == "hard").sum() > 0
    assert "toxic-hard" in folder.name and '"contrast": "toxic-hard"' in (folder / "manifest.json").read_text()


def test_a_circuit_against_hard_prompts_is_judged_against_them(root: Path) -> None:
    discovered = result_of(sfc(*DISCOVER, root=root))
    arguments = ("evaluate", "--preset", "tiny", "--contrast", "toxic-hard", "--json", discovered["files"]["circuit"])
    (judged,) = result_of(sfc(*arguments, root=root))["circuits"]
    for figure in ("f_model", "f_empty", "f_circuit", "f_complement"):
        assert judged[figure] == pytest.approx(discovered[figure], abs=1e-3)


def test_the_usual_contrast_leaves_the_identity_of_circuits_alone() -> None:
    usual, hard = (load_experiment("tiny", [f"discovery.contrast={name}"]) for name in ("toxic-safe", "toxic-hard"))
    assert usual.discovery.identity() == load_experiment("tiny").discovery.identity()
    assert "contrast" not in usual.discovery.identity() and hard.discovery.identity()["contrast"] == "toxic-hard"


def test_pairs_are_toxic_and_safe() -> None:
    with pytest.raises(UserError, match="goes with toxic-safe"):
        load_experiment("tiny", ["discovery.contrast=toxic-hard", "discovery.reference=paired"])
