"""Every file of every artifact, damaged in every way, is told in one line, or makes no difference.

Roots are filled by the commands of the studies. Then one file at a time is damaged in a copy, and a command reads it,
which ends with the very result that it has on the undamaged root, or with status 2 and one line. `sfc doctor` finds
all of it.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import pytest
from commands import Finished

from hostile.forks import copied, forked, said
from hostile.sampling import assert_held, sample
from hostile.test_kills import SHARED, Step

MINI = Path(__file__).parents[2] / "sfc" / "data" / "mini"
STUDIES: dict[str, tuple[str, ...]] = {
    "sample": ("--tokens", "60"),
    "collect": (),
    "train": (),
    "nulls": ("--set", "discovery.baseline=counterfactual", "--set", "prompts.limit=30"),
    "discover": (),
    "evaluate": ("files/nodes.csv",),
    "behaviour": ("--limit", "4"),
    "probe": ("--category", "all"),
    "compare": ("--categories", "violence,privacy", "--set", "comparison.size=8", "--set", "comparison.shuffles=1",
                "--set", "comparison.replies=1", "--set", "comparison.reply_tokens=2"),
    "attribute-logits": (),
    "patch": ("--limit", "4", "--require", "score", "--component", "head"),
    "steer": ("--limit", "2", "--alphas=-0.5,0.5"),
    "batch": ("--models", "tiny", "--stages", "behaviour", "--limit", "2"),
}  # fmt: skip
"""commands that leave an artifact, with options that make them fast"""
OTHERS: dict[str, tuple[Step, ...]] = {
    "sample": (("sample", "--tokens", "90"),),
    "collect": (("train", "--set", "saes.steps=3"),),
    "train": (("evaluate", "files/nodes.csv", "--set", "evaluation.random_draws=2"),),
    "discover": (("draw",), ("export", "--output", "exported")),
    "steer": (),
}
"""commands that read what a study's own command does not, beside `report`"""


def _flipped(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(share * (len(data) - 1))] ^= 0x04
        path.unlink()
        path.write_bytes(data)

    return damage


def _written(text: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = text(path.read_bytes())
        path.unlink()
        path.write_bytes(data)

    return damage


def _replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit near the start": _flipped(0.03),
    "a bit in the first half": _flipped(0.31),
    "a bit in the middle": _flipped(0.5),
    "a bit near the end": _flipped(0.93),
    "cut in half": _written(lambda data: data[: len(data) // 2]),
    "the last bytes gone": _written(lambda data: data[:-3]),
    "emptied": _written(lambda data: b""),
    "junk": _written(lambda data: b"\xff\xfe\x00junk" * (len(data) // 7 + 1)),
    "other JSON": _written(lambda data: b"[[1, 2], {}]"),
    "deep JSON": _written(lambda data: b"[" * 100_000),
    "lines in another order": _written(lambda data: b"".join(reversed(data.splitlines(keepends=True)))),
    "removed": _replaced(lambda path: None),
    "a folder": _replaced(lambda path: path.mkdir()),
    "a pipe": _replaced(os.mkfifo),
    "a link to another file": _replaced(lambda path: path.symlink_to("/proc/version")),
    "a link to nothing": _replaced(lambda path: path.symlink_to("/nowhere/at/all")),
}


def command(name: str) -> Step:
    return (name, *STUDIES[name])


def ended(step: Step, root: Path) -> Finished:
    """A command that is run in a root, with the shared settings before its own."""
    finished, _ = forked(step[0], "--json", *SHARED, *step[1:], root=root)
    assert finished is not None
    return finished


@cache
def finished_root(names: tuple[str, ...]) -> Path:
    """A root in which the commands of these studies have ended."""
    root = Path(mkdtemp(prefix="sfc-damage-"))
    (root / "files").mkdir()
    (root / "files" / "nodes.csv").write_text("node\nresid_post.0/F3\nresid_post.1/F5\n")
    for name in names:
        finished = ended(command(name), root)
        assert finished.status == 0, (name, finished)
    return root


CHAIN = ("sample", "train")
"""what others need is made first, once"""


def root_of(name: str) -> Path:
    return finished_root(CHAIN if name in (*CHAIN, "collect") else (*CHAIN, name))


class Damaged(NamedTuple):
    """A file that is damaged, by its place below the root."""

    study: str
    place: str
    damage: str


def places(name: str) -> list[str]:
    """The files of a study's artifact below its root."""
    patterns = {"sample": "corpora/*", "collect": "activations/*", "train": "saes/*", "batch": "circuits/batch/*"}
    names = {"discover": "circuit-*", "attribute-logits": "logit*", "steer": "steering-*", "patch": "patch*"}
    pattern = patterns.get(name) or f"circuits/tiny/{names.get(name, f'{name[:5]}*')}"
    folders = [path.parent for path in root_of(name).glob(f"{pattern}/manifest.json")]
    assert folders, f"{name} left nothing like {pattern}"
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.relative_to(root_of(name)).as_posix() for path in files]


class Told(NamedTuple):
    """What a command said where nothing was wrong with it: its JSON, and its files."""

    result: dict[str, Any]
    files: dict[str, Any]


def told(finished: Finished, root: Path, without: str = "") -> Told:
    result = json.loads(finished.stdout.replace(str(root), "ROOT"))
    result.pop("seconds", None)
    named = {name: root / place.replace("ROOT/", "") for name, place in result["files"].items()}
    texts = {name: path for name, path in named.items() if path.is_file() and path != root / without}
    return Told(result, {name: said(path) for name, path in texts.items() if path.suffix != ".html"})


def readers(name: str) -> list[Step]:
    return [command(name), *OTHERS.get(name, ()), *([("report",)] if name not in (*CHAIN, "collect", "batch") else [])]


@cache
def undamaged(name: str, reader: Step) -> Told:
    root = copied(root_of(name), Path(mkdtemp(prefix="sfc-damage-")) / "root")
    finished = ended(reader, root)
    assert finished.status == 0, finished
    return told(finished, root)


NAMES_AND_DAMAGES = [(name, damage) for name in STUDIES for damage in DAMAGES]


@pytest.mark.parametrize(("name", "damage"), sample(NAMES_AND_DAMAGES, keep=1))
def test_a_damaged_file_is_told_or_makes_no_difference(name: str, damage: str, tmp_path: Path) -> None:
    failures, every, turn = [], places(name), list(DAMAGES).index(damage)
    for number, place in sample(enumerate(every), keep=3):
        # Each file is read by each of the commands, though not with each damage.
        reader = readers(name)[0 if place.endswith(".html") else (number + turn) % len(readers(name))]
        expected, root = undamaged(name, reader), copied(root_of(name), tmp_path / str(number))
        DAMAGES[damage](root / place)
        finished = ended(reader, root)
        try:
            assert_held(finished, (0, 2))
            if finished.status == 0 and not _leaves_it_out(reader, place, damage):
                now = told(finished, root, place)
                assert now.result == expected.result, "another result"
                other = {key for key in now.files if now.files[key] != expected.files[key]}
                assert not other, f"other files: {other}"
        except AssertionError as error:
            failures.append(f"{place} × {reader[0]}: {str(error)[:700]}")
        shutil.rmtree(root)
    assert not failures, "\n\n".join(failures)


def _leaves_it_out(reader: Step, place: str, damage: str) -> bool:
    """A report has what is finished, and a folder without a manifest is not."""
    return reader[0] == "report" and place.endswith("manifest.json") and damage in ("removed", "a link to nothing")


@pytest.mark.parametrize("name", sample(STUDIES, keep=1))
def test_doctor_finds_every_damaged_file(name: str, tmp_path: Path) -> None:
    missed = []
    for number, place in enumerate(sample(places(name), keep=4)):
        if place.endswith("manifest.json"):
            continue
        for damage in sample(("a bit in the middle", "removed", "the last bytes gone"), keep=1):
            root = copied(root_of(name), tmp_path / f"{number}")
            DAMAGES[damage](root / place)
            finished = ended(("doctor",), root)
            assert_held(finished, (2,))
            if Path(place).name not in finished.stdout:
                missed.append(f"{place}, {damage}")
            shutil.rmtree(root)
    assert not missed


@pytest.mark.parametrize("damage", sample(DAMAGES, keep=1))
def test_a_damaged_cache_of_the_model_is_told(damage: str, tmp_path: Path) -> None:
    cache, root = {"SFC_CACHE": str(tmp_path / "cache")}, tmp_path / "root"
    root.mkdir()
    asked = ("behaviour", "--limit", "2", "--json", *SHARED)
    finished, _ = forked(*asked, root=root, **cache)
    assert finished is not None and finished.status == 0
    [folder] = (tmp_path / "cache").glob("tiny-*")
    kept = shutil.copytree(folder, tmp_path / "kept")
    expected = told(finished, root).result
    for path in sorted(path for path in kept.iterdir() if path.is_file()):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        DAMAGES[damage](folder / path.name)
        if (folder / path.name).is_file() and filecmp.cmp(folder / path.name, path, shallow=False):
            continue  # there is one line only
        for arguments in (asked, ("doctor", "--json", *SHARED)):
            shutil.rmtree(root)
            root.mkdir()
            finished, _ = forked(*arguments, root=root, **cache)
            assert finished is not None
            assert_held(finished, (0, 2))
            if path.name != "manifest.json":
                assert finished.status == 2 and str(folder) in finished.stdout + finished.stderr
            elif finished.status == 0 and arguments is asked:
                assert told(finished, root).result == expected


LINKS = ("activations", "saes", "circuits", "circuits/tiny", "corpora")


@pytest.mark.parametrize("place", LINKS)
def test_nothing_is_written_outside_the_root_through_a_link(place: str, tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (root / place).parent.mkdir(parents=True)
    (root / place).symlink_to(outside)
    steps = {"corpora": command("sample"), "activations": command("collect"), "saes": command("train")}
    finished = ended(steps.get(place, command("behaviour")), root)
    assert finished.status == 2 and "by a link" in finished.stderr
    assert_held(finished)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("what", ["folder", "lock", "part", "journal", "pipe for a lock", "folder for a lock"])
def test_links_and_pipes_in_the_way_are_refused(what: str, tmp_path: Path) -> None:
    root = copied(root_of("collect"), tmp_path / "root")
    [folder] = root.glob("activations/tiny-*")
    outside, lock = tmp_path / "outside", folder.with_name(f".{folder.name}.lock")
    outside.mkdir()
    (outside / "file").write_text("precious")
    lock.unlink(missing_ok=True)
    match what:
        case "folder":
            folder.rename(outside / folder.name)
            folder.symlink_to(outside / folder.name)
            (outside / folder.name / "manifest.json").unlink()
        case "lock":
            lock.symlink_to(outside / "file")
        case "part":
            (folder / "part").symlink_to(outside)
        case "journal":
            (folder / "manifest.json").unlink()
            [shard] = list(folder.glob("shard-*.h5"))[:1]
            shard.rename(shard.with_suffix(".partial"))
            shard.with_suffix(".journal").symlink_to(outside / "file")
        case "pipe for a lock":
            os.mkfifo(lock)
        case "folder for a lock":
            lock.mkdir()
    finished = ended(("collect",) if what == "journal" else ("collect", "--site", "resid_mid.1"), root)
    assert_held(finished, (2,))
    assert (outside / "file").read_text() == "precious"


def test_the_whole_run_tries_enough() -> None:
    assert len(NAMES_AND_DAMAGES) >= 200 and set(CHAIN) <= set(STUDIES)
