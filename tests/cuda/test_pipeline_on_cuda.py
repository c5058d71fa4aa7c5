"""The commands on a GPU say what they say on a CPU."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import sfc

from sfc.circuits.files import load_circuit
from sfc.core.experiments import load_experiment
from sfc.models.generation import generate_replies
from sfc.run import Run
from sfc.saes.store import Store
from sfc.session import Session

FEW = [
    part
    for setting in (
        "evaluation.random_draws=3", "evaluation.replies=4", "evaluation.reply_tokens=4", "evaluation.sizes=[8, 32]",
        "evaluation.min_denominator=0.001", "discovery.checked_nodes=5", "learned_mask.steps=20",
    )
    for part in ("--set", setting)
]  # fmt: skip
FIGURES = ("f_model", "f_circuit", "f_complement", "f_empty", "recovered_toxic", "recovered_safe", "agreement")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and SAEs that were made on the CPU."""
    root = tmp_path_factory.mktemp("cpu")
    sfc("train", "--preset", "tiny", "--device", "cpu", root=root)
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The same, and nothing that was found with them."""
    for name in ("activations", "saes"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("method", ["attribution", "learned-mask"])
def test_a_circuit_is_the_same_and_judged_the_same(method: str, device: str, trained: Path, copied: Path) -> None:
    command = ("discover", "--preset", "tiny", "--method", method, *FEW, "--json")
    expected, found = (
        sfc(*command, "--device", where, root=root).result for where, root in (("cpu", trained), (device, copied))
    )
    nodes = [
        set(load_circuit(root / each["files"]["circuit"])) for root, each in ((trained, expected), (copied, found))
    ]
    assert len(nodes[0] & nodes[1]) >= 0.9 * len(nodes[0]), "rounding may decide between nodes of like effect"
    for figure in FIGURES:
        assert found[figure] == pytest.approx(expected[figure], abs=0.05), figure


def test_what_is_collected_is_the_same(device: str, trained: Path, tmp_path: Path) -> None:
    sfc("collect", "--preset", "tiny", "--device", device, root=tmp_path)
    stores = [Store(Run(load_experiment("tiny"), root).store.folder) for root in (trained, tmp_path)]
    for site in load_experiment("tiny").activations.sites:
        rows = [store.read(site, 0, store.n_tokens) for store in stores]
        torch.testing.assert_close(rows[1], rows[0], atol=5e-3, rtol=5e-3)


def test_saes_explain_as_much(device: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "activations", tmp_path / "activations")
    quality = []
    for where, root in (("cpu", trained), (device, tmp_path)):
        result = sfc("train", "--preset", "tiny", "--device", where, "--json", root=root).result
        quality.append(pd.read_csv(root / result["files"]["quality"]))
    np.testing.assert_allclose(quality[1]["fvu"], quality[0]["fvu"], atol=0.05)


def test_replies_are_the_same(device: str, trained: Path) -> None:
    texts = []
    for where in ("cpu", device):
        session = Session(Run(load_experiment("tiny"), trained, device=where))
        prompts = session.run.prompts.frame["prompt"].tolist()[:12]
        texts.append(generate_replies(session.model, session.model.tokenize(prompts), 8, 1024))
    same = [a == b for a, b in zip(*texts, strict=True)]
    assert np.mean(same) >= 0.9, "rounding may decide between tokens of like score"
