"""Commands in forked processes, which start within milliseconds, with everything imported, and may be killed.

A child that is to be killed counts what it does to the disk (writes in place, fsyncs, renames,
deletions, new folders) and dies by SIGKILL in the middle of the N-th of these: a write is half done, and a line that
was appended but not synced is torn.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

from commands import Finished, Forked, sfc

TESTS = Path(__file__).parents[1]
POINTS = ("pwrite", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
"""the functions of `os` by which the package and its libraries change the disk"""


class Ended(NamedTuple):
    """What became of a command in a child."""

    finished: Finished | None
    """None where it was killed"""
    points: int
    """how often it changed the disk"""


def forked(*arguments: object, root: Path, kill_at: int = 0, seconds: float = 300, **environment: str) -> Ended:
    """Run a command; with `kill_at` until it changes the disk for that time. One that hangs is killed and fails."""
    told = Path(mkdtemp(prefix="sfc-forks-")) / "told"
    process = Forked(_run, list(map(str, arguments)), root, kill_at, told, cwd=TESTS, **environment)
    process.communicate(seconds)
    allowed = (0, -signal.SIGKILL) if kill_at else (0,)
    assert process.returncode in allowed, f"{arguments}: status {process.returncode}"
    if not told.exists():
        return Ended(None, 0)
    finished, points = json.loads(told.read_text())
    return Ended(Finished(*finished), points)


def _run(arguments: list[str], root: Path, kill_at: int, told: Path) -> None:
    """What a child does."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    counter = _Counter(kill_at)
    for name in POINTS:
        setattr(os, name, counter.counted(getattr(os, name)))
    os.open = counter.opened
    finished, points = sfc(*arguments, root=root), counter.count
    told.write_text(json.dumps([finished, points]))
    os._exit(0)


class _Counter:
    """Counts what is done to the disk, and remembers how much of the files that lines are added to is synced."""

    def __init__(self, kill_at: int) -> None:
        self.count, self._kill_at, self._lock = 0, kill_at, threading.Lock()
        self._synced: dict[int, int] = {}
        self._open = os.open

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.count += 1
                if self.count == self._kill_at:
                    self._die(function, args)
            made = function(*args, **kwargs)
            if function.__name__ == "fsync" and args[0] in self._synced:
                self._synced[args[0]] = os.fstat(args[0]).st_size
            return made

        return call

    def opened(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        descriptor = self._open(path, flags, *args, **kwargs)
        self._synced.pop(descriptor, None)
        if flags & os.O_APPEND:
            self._synced[descriptor] = os.fstat(descriptor).st_size
        return descriptor

    def _die(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if function.__name__ == "pwrite":
            file, data, offset = args
            function(file, bytes(data)[: len(data) // 2], offset)
        elif function.__name__ == "fsync" and args[0] in self._synced:
            size = os.fstat(args[0]).st_size
            os.ftruncate(args[0], max(size - 2, min(self._synced[args[0]], size)))  # in the middle of the last line
        os.kill(os.getpid(), signal.SIGKILL)


_IN_PLACE = (".jsonl", ".journal", ".partial")
"""what files are called to which lines or rows are added where they are; all others are replaced"""


def copied(root: Path, target: Path) -> Path:
    """A copy of a root, by hard links where that is as good."""

    def copy(source: str, destination: str) -> None:
        (shutil.copy2 if source.endswith(_IN_PLACE) else os.link)(source, destination)

    return Path(shutil.copytree(root, target, copy_function=copy, symlinks=True))


_TIMES = re.compile(rb"\d{4}-\d\d-\d\dT[\d:.]+(\+00:00|Z)?")


def said(path: Path) -> Any:
    """What a file says, without times and what follows from them."""
    data = _TIMES.sub(b"TIME", path.read_bytes())
    if path.name == "manifest.json":
        manifest = json.loads(data)
        timed = {"created", "seconds", "checksum", "command"}
        told = {key: value for key, value in manifest.items() if key not in timed}
        return {**told, "contents": sorted(manifest.get("contents") or {})}
    if path.name == "training.jsonl":
        return [{**json.loads(line), "tokens_per_second": 0} for line in data.splitlines()]
    return hashlib.sha256(data).hexdigest()


def said_below(root: Path, *names: str) -> dict[str, Any]:
    """What every file below a root says, empty locks left out, by its place; only below these folders if any."""
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if not path.is_dir()}
    return {
        place: said(path)
        for place, path in files.items()
        if not path.name.endswith(".lock") and (not names or place.startswith(names))
    }
