"""Killed in the middle of anything that changes the disk, the same command ends with the same files.

Every command is first run undisturbed, which tells how often it changes the disk. Then it is killed at points spread
over all of these, and run again: its artifacts hold the same bytes, timings apart, and nothing else is left.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import pytest

from hostile.forks import copied, forked, said_below
from hostile.sampling import sample

SETTINGS = (
    "prompts.limit=8", "prompts.max_tokens=400", "saes.steps=4", "saes.batch_size=32", "saes.layers_at_once=2",
    "saes.checkpoint_seconds=0.000001", "activations.shard_tokens=3000", "activations.batch_tokens=512",
    "sample.unfiltered=true", "sample.batch=4", "sample.reply_tokens=4", "sample.instruction_tokens=8",
    "evaluation.sizes=[4]", "evaluation.random_draws=1", "evaluation.replies=1", "evaluation.reply_tokens=2",
    "evaluation.null_draws=1", "discovery.method=attribution", "discovery.checked_nodes=2",
    "discovery.checked_prompts=4", "discovery.halves=false", "discovery.baseline=safe-mean", "sample.tokens=60",
    "steering.min_induced=-99", "steering.max_kl=99",
    "steering.max_loss=99", "steering.contrasts=[toxic-safe]", "steering.prompts=4", "steering.tried_prompts=2",
    "steering.random_directions=2", "steering.shuffled_directions=1", "steering.ablated_writers=1",
    "steering.ordinary_prompts=2", "steering.ordinary_tokens=4", "steering.reply_tokens=2",
)  # fmt: skip
SHARED = ("--preset", "tiny", *(part for setting in SETTINGS for part in ("--set", setting)))
Step = tuple[str, ...]

BASE: tuple[Step, ...] = (("sample", "--tokens", "60"), ("train",))
FULL: tuple[Step, ...] = (*BASE, ("discover",))


def _label(root: Path) -> None:
    """What a reader writes into the circuit's folder."""
    [features] = root.glob("circuits/tiny/circuit-*/features.json")
    (features.parent / "labels.json").write_text("{}")


def _nothing(root: Path) -> None: ...


class Killed(NamedTuple):
    """A command that is killed, what is there before it, and how many times it is killed."""

    before: tuple[Step, ...]
    command: Step
    kills: int
    prepare: Callable[[Path], None] = _nothing


CASES = {
    "collect": Killed((), ("collect",), 30),
    "collect, compressed": Killed((), ("collect", "--set", "activations.gzip=true"), 15),
    "collect, another site": Killed((("collect",),), ("collect", "--site", "resid_mid.1"), 25),
    "collect --rebuild": Killed((("collect",),), ("collect", "--rebuild"), 20),
    "sample": Killed((), ("sample", "--tokens", "120"), 20),
    "sample, more of it": Killed(BASE[:1], ("sample", "--tokens", "160"), 15),
    "train": Killed((("collect",),), ("train",), 30),
    "train, one by one": Killed((("collect",),), ("train", "--set", "saes.layers_at_once=1"), 10),
    "train on a corpus": Killed(BASE[:1], ("train", "--set", "corpus.source=[prompts,sampled]"), 10),
    "discover": Killed(BASE, ("discover",), 15),
    "discover --rebuild": Killed(FULL, ("discover", "--rebuild"), 15, _label),
    "draw": Killed(FULL, ("draw",), 8, _label),
    "export": Killed(FULL, ("export",), 5),
    "steer": Killed((), ("steer", "--limit", "2", "--alphas=-0.5,0.5"), 10),
    "report": Killed(FULL, ("report",), 6),
    "batch": Killed((), ("batch", "--models", "tiny", "--stages", "behaviour", "--limit", "2"), 8),
}


class Undisturbed(NamedTuple):
    """A root as it was before a command, what it says after it, and how often the command changed the disk."""

    before: Path
    after: dict[str, object]
    points: int


@cache
def root_with(steps: tuple[Step, ...]) -> Path:
    """A root in which these commands have ended, one after the other."""
    target = Path(mkdtemp(prefix="sfc-kills-"))
    if steps:
        shutil.rmtree(target)
        copied(root_with(steps[:-1]), target)
        _run(steps[-1], target)
    return target


@cache
def undisturbed(name: str) -> Undisturbed:
    case = CASES[name]
    before = copied(root_with(case.before), Path(mkdtemp(prefix="sfc-kills-")) / "before")
    case.prepare(before)
    after = copied(before, before.with_name("after"))
    return Undisturbed(before, (points := _run(case.command, after)) and said_below(after), points)


def _run(command: Step, root: Path) -> int:
    finished, points = forked(*command, *SHARED, root=root)
    assert finished is not None and finished.status == 0, finished
    return points


KILLS = [(name, number) for name, case in CASES.items() for number in range(case.kills)]


@pytest.mark.parametrize(("name", "number"), sample(KILLS, keep=3))
def test_a_killed_command_goes_on_to_the_same_files(name: str, number: int, tmp_path: Path) -> None:
    case, expected = CASES[name], undisturbed(name)
    kill_at = 1 + number * expected.points // case.kills
    root = copied(expected.before, tmp_path / "root")
    finished, _ = forked(*case.command, *SHARED, root=root, kill_at=kill_at)
    assert finished is None, f"it was to be killed at {kill_at} of {expected.points}"
    _run(case.command, root)
    left = said_below(root)
    assert left.keys() == expected.after.keys(), f"killed at {kill_at} of {expected.points}"
    differ = [place for place in left if left[place] != expected.after[place]]
    assert not differ, f"killed at {kill_at} of {expected.points}"


def test_every_point_is_tried_by_the_whole_run() -> None:
    assert sum(case.kills for case in CASES.values()) >= 200
