"""`sfc train` as a whole: killed and gone on with, in several processes, from any corpus, stored or not."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import Forked, sfc_forked
from safetensors.torch import load_file

from sfc.core.artifacts import locked
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.run import Run
from sfc.saes.logs import loggers
from sfc.saes.train import Progress, SiteStats

SMALL = (
    "--preset", "tiny", "--set", "prompts.limit=8", "--set", "saes.steps=40", "--set", "saes.batch_size=32",
    "--set", "saes.matryoshka=[0.1,0.4]", "--set", "saes.deciding_share=0.3",
)  # fmt: skip


def start(root: Path, *options: str) -> Forked:
    return sfc_forked("train", *SMALL, *options, root=root)


def train(root: Path, *options: str) -> None:
    process = start(root, *options)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def weights(root: Path) -> dict[str, bytes]:
    """The bytes of every tensor of every dictionary below a root."""
    return {
        f"{path.parent.name}/{name}": tensor.numpy().tobytes()
        for path in root.glob("saes/*/*/sae_weights.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    train(root)
    return root


def test_a_run_leaves_dictionaries_logs_and_no_checkpoint(undisturbed: Path) -> None:
    (folder,) = undisturbed.glob("saes/tiny-*")
    assert len(weights(undisturbed)) == 8
    assert not list(folder.glob("checkpoint*"))
    for log in folder.glob("*/training.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["step"] for line in lines] == [10, 20, 30, 40]
        assert lines[-1]["loss"] < lines[0]["loss"] and {"fvu", "l0", "dead", "tokens_per_second"} <= lines[0].keys()


@pytest.mark.parametrize("moment", ["shard-*", "checkpoint-*", "blocks.0*/cfg.json"])
def test_killed_at_any_moment_the_same_command_gives_the_same_weights(
    moment: str, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed when a file of this name appears below the root: collecting, training, and between two sites."""
    options = ("--set", "saes.checkpoint_seconds=0.000001", "--set", "saes.layers_at_once=1")
    process = start(tmp_path, *options)
    while not list(tmp_path.rglob(moment)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("saes/*/manifest.json"))
    train(tmp_path, *options)
    assert weights(tmp_path) == weights(undisturbed)
    for log in tmp_path.glob("saes/*/*/training.jsonl"):
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 40


@pytest.mark.parametrize("busy", ["store", "saes"])
def test_a_second_process_is_told_and_stops(busy: str, tmp_path: Path) -> None:
    run = Run(load_experiment("tiny", SMALL[3::2]), tmp_path)
    folder = getattr(run, busy).folder
    folder.parent.mkdir()
    with locked(folder.with_name(f".{folder.name}.lock")):
        second = start(tmp_path)
        _, errors = second.communicate()
    assert second.returncode == 2 and f"another process is working on {folder}" in errors


def test_two_ranks_share_the_sites_and_give_the_same_weights(undisturbed: Path, tmp_path: Path) -> None:
    script = str(Path(__file__).parents[1] / "scripts" / "train_saes.py")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script)
    ended = subprocess.run([*launcher, *SMALL, "--root", tmp_path], capture_output=True, text=True)
    output = ended.stdout
    assert ended.returncode == 0, ended.stderr
    assert weights(tmp_path) == weights(undisturbed)
    assert output.count("quality.csv") == 1, "only one of them reports"


def test_without_a_store_training_gives_the_same_weights(undisturbed: Path, tmp_path: Path) -> None:
    train(tmp_path, "--set", "corpus.stored=never")
    assert weights(tmp_path) == weights(undisturbed)
    assert not list(tmp_path.glob("activations/**/*.h5"))


def test_loggers_that_are_unknown_or_not_installed_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        loggers(["tensorbord"], tmp_path, {})
    for package in ("tensorboard", "wandb"):
        if find_spec(package) is None:
            with pytest.raises(UserError, match=r"pip install 'sfc\[logging\]'"):
                loggers([package], tmp_path, {})


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed: pip install 'sfc[logging]'")
def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    (log,) = loggers(["tensorboard"], tmp_path, {"seed": 0})
    log(Progress(10, 40, 1000.0, [SiteStats("blocks.0.hook_resid_post", 0.5, 0.4, 8.0, 3)]))
    assert any(path.stat().st_size > 100 for path in (tmp_path / "tensorboard").iterdir())
