"""Commands in forked processes, which start within milliseconds, with everything imported, and may be killed.

A server (this module as a program) imports the package and runs nothing itself, so that its children are as good as
fresh processes. A child that is to be killed counts what it does to the disk (writes in place, fsyncs, renames,
deletions, new folders) and dies by SIGKILL in the middle of the N-th of these: a write is half done, and a line that
was appended but not synced is torn.
"""

import functools
import hashlib
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from commands import Finished, sfc

TESTS = Path(__file__).parents[1]
POINTS = ("pwrite", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
"""the functions of `os` by which the package and its libraries change the disk"""


class Ended(NamedTuple):
    """What became of a command in a child."""

    finished: Finished | None
    """None where it was killed"""
    points: int
    """how often it changed the disk"""


class Server:
    """The process whose children run commands, one after the other."""

    def __init__(self, **environment: str) -> None:
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hostile.forks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=TESTS, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        )  # fmt: skip

    def sfc(self, *arguments: object, root: Path, kill_at: int = 0, seconds: float = 300) -> Ended:
        """Run a command; with `kill_at` until it changes the disk for that time. One that hangs is killed and fails."""
        asked = {"arguments": list(map(str, arguments)), "root": str(root), "kill_at": kill_at, "seconds": seconds}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        assert told["signal"] in (0, signal.SIGKILL if kill_at else 0), f"{arguments}: signal {told['signal']}"
        return Ended(Finished(*told["finished"]) if told["finished"] else None, told["points"])


@functools.cache
def server(cache: Path | None = None) -> Server:
    """The server of this process, with the usual cache of models or one of its own."""
    return Server(**({"SFC_CACHE": str(cache)} if cache else {}))


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    _import_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run(asked, writing)
        os.close(writing)
        alarm = threading.Timer(asked["seconds"], os.kill, [child, signal.SIGALRM])
        alarm.start()
        with os.fdopen(reading, "rb") as pipe:
            told = pipe.read().decode().splitlines()
        _, status = os.waitpid(child, 0)
        alarm.cancel()
        alarm.join()
        points = max((int(each) for each in told if each.isdecimal()), default=0)
        finished = json.loads(told[-1]) if told and told[-1].startswith("[") else None
        of_signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        answers.write(json.dumps({"signal": of_signal, "finished": finished, "points": points}) + "\n")
        answers.flush()


def _import_everything() -> None:
    import sfc as package

    for module in pkgutil.walk_packages(package.__path__, "sfc."):
        if not module.name.startswith("sfc.explorer"):
            importlib.import_module(module.name)


def _run(asked: dict[str, Any], pipe: int) -> None:
    """What a child does; it never returns."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    counter = _Counter(asked["kill_at"])
    for name in POINTS:
        setattr(os, name, counter.counted(getattr(os, name)))
    os.open = counter.opened
    finished = sfc(*asked["arguments"], root=Path(asked["root"]))
    os.write(pipe, f"{counter.count}\n{json.dumps(finished)}\n".encode())
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


if __name__ == "__main__":
    _serve()
