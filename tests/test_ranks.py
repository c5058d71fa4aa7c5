"""Several processes as one command: what they share is what one process makes, and none waits for one that is gone."""

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import sfc, sfc_ranks
from safetensors.torch import load_file

from sfc.core.artifacts import Artifact, locked
from sfc.core.errors import UserError
from sfc.core.ranks import alone, by_leader, dealt, gathered, is_leader, own_share, rank, told, wait_for_all, world_size

SETTINGS = (
    "activations.shard_tokens=1000", "activations.batch_tokens=1000", "prompts.limit=12", "saes.steps=20",
    "saes.batch_size=32", "comparison.size=10", "comparison.shuffles=1", "comparison.edges=0", "comparison.replies=2",
    "learned_mask.steps=1", "evaluation.null_draws=2", "evaluation.replies=2", "evaluation.sizes=[4]",
    "discovery.pairs_per_prompt=1",
)  # fmt: skip
TINY = ("--preset", "tiny", *(word for setting in SETTINGS for word in ("--set", setting)))


def commands(lists: Sequence[Path]) -> list[list[object]]:
    *circuits, models = lists
    return [
        ["train", *TINY],
        ["compare", *TINY, "--categories", "violence,privacy"],
        ["nulls", *TINY],
        ["evaluate", *TINY, *circuits],
        ["batch", *TINY, "--file", models, "--stages", "behaviour", "--limit", 4],
        ["behaviour", *TINY, "--limit", 12, "--json"],
        ["behaviour", *TINY, "--limit", 12, "--json"],
    ]


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three circuits to be evaluated, and models to be compared, one of which fails."""
    folder = tmp_path_factory.mktemp("lists")
    paths = [folder / f"{name}.json" for name in "abc"]
    for number, path in enumerate(paths):
        path.write_text(json.dumps([f"resid_post.{site}/F{number + 3 * site}" for site in (0, 1)]))
    (models := folder / "models.yaml").write_text(
        "models:\n- {preset: tiny, set: [name=first]}\n- {preset: tiny, set: [name=second, model.source=/nowhere]}\n"
    )
    return [*paths, models]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory, lists: list[Path]) -> Path:
    """What one process makes of the commands."""
    root = tmp_path_factory.mktemp("one")
    for command in commands(lists):
        finished = sfc(*command, root=root)
        assert finished.status == 0, finished.stderr
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Every file but those that tell the time."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if path.name not in ("manifest.json", "training.jsonl")
    }


def test_two_processes_leave_to_the_byte_what_one_does(of_one: Path, lists: list[Path], tmp_path: Path) -> None:
    processes = sfc_ranks(2, commands(lists), tmp_path, fresh=1)
    ends = [process.communicate() for process in processes]
    for process, (output, errors) in zip(processes, ends, strict=True):
        assert process.returncode == 0, errors
        assert process is processes[0] or not output + errors, "the first one speaks"
    assert contents(tmp_path) == contents(of_one)
    assert not list(tmp_path.rglob("parts"))
    assert len(list(tmp_path.glob("activations/*/shard-*.h5"))) > 5
    report = json.loads(ends[0][0].splitlines()[-1])
    assert Path(report["files"]["page"]).is_file() and "up to date" in ends[0][1]


def weights(root: Path) -> dict[str, torch.Tensor]:
    files = root.glob("saes/*/*/sae_weights.safetensors")
    return {f"{path.parent.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def test_three_processes_train_two_sites_as_one_does(of_one: Path, lists: list[Path], tmp_path: Path) -> None:
    """Two of them train one SAE, each on its share of every batch's rows."""
    processes = sfc_ranks(3, commands(lists)[:1], tmp_path)
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    stores = [{name: of for name, of in contents(root).items() if "activations" in name} for root in (tmp_path, of_one)]
    assert stores[0] == stores[1]
    ours, expected = weights(tmp_path), weights(of_one)
    assert ours.keys() == expected.keys() and len(ours) == 8
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    assert {len(path.read_text().splitlines()) for path in tmp_path.glob("saes/*/*/training.jsonl")} == {2}


# What is not heard for 45 seconds is dead, which is long for a test. Ctrl-C works although a job in the background,
# as this test may be, hands on that it is ignored.
HASTY = "import sfc.core.ranks as ranks; ranks._SILENCE = 8.0\n"
HASTY += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.mark.parametrize(
    ("gone", "how", "told"),
    [
        (1, signal.SIGKILL, "rank 1 of 3 on {host} is gone"),
        (0, signal.SIGKILL, "rank 0 of 3, where all processes meet, is gone"),
        (2, signal.SIGINT, "rank 2 of 3 on {host} has ended (interrupted)"),
    ],
)
def test_where_one_is_gone_the_others_end_and_the_work_goes_on_later(
    gone: int, how: signal.Signals, told: str, of_one: Path, lists: list[Path], tmp_path: Path
) -> None:
    train = commands(lists)[:1]
    processes = sfc_ranks(3, train, tmp_path, HASTY)
    while not list(tmp_path.rglob("shard-00003.*")):
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    processes[gone].send_signal(how)
    began = time.monotonic()
    for number, process in enumerate(processes):
        _, errors = process.communicate()
        if number != gone:
            assert process.returncode == 2, errors
            assert f"error: {told.format(host=os.uname().nodename)}; what is finished is kept: run the same" in errors
            # An interrupt that meets Python in a destructor is lost, and said by Python itself; the next one is not.
            own = re.sub(r"Exception ignored in.*?KeyboardInterrupt:? *\n", "", errors, flags=re.DOTALL)
            assert "Traceback" not in own and "frame #" not in own
    assert time.monotonic() - began < 60
    assert not list(tmp_path.rglob("manifest.json"))
    assert sfc(*train[0], root=tmp_path).status == 0
    made = contents(tmp_path)
    assert made == {name: of for name, of in contents(of_one).items() if name in made}
    assert any(name.endswith("quality.csv") for name in made)


def test_processes_that_cannot_meet_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 .* cannot meet .*MASTER_ADDR.* docs/cluster\.md"):
        wait_for_all()


def test_a_process_by_itself_is_the_leader_and_everything_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # other programs set it as well
    assert (rank(), world_size(), is_leader()) == (0, 1, True)
    wait_for_all()
    assert list(dealt("abc")) == [("a", True), ("b", True), ("c", True)] and own_share("abc") == ["a", "b", "c"]
    assert told(lambda: True) and gathered("x") == ["x"]
    monkeypatch.setenv("WORLD_SIZE", "5")
    ran: list[int] = []
    by_leader(ran.append)(1)
    assert (rank(), own_share(range(12)), ran) == (3, [3, 8], [])
    with alone():
        by_leader(ran.append)(1)
        assert (rank(), world_size(), own_share("abc"), ran) == (0, 1, ["a", "b", "c"], [1])


def test_others_that_still_work_on_an_artifact_keep_a_new_process_out(tmp_path: Path) -> None:
    """Where the leader was killed, the others may be at work for some seconds."""
    artifact = Artifact(tmp_path / "x", {})
    busy = pytest.raises(UserError, match="another process is working on")
    with locked(tmp_path / ".x.lock", shared=True), busy, artifact.being_made():
        pass
