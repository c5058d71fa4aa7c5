"""Commands as a user types them: in this process, where torch is loaded already, or in one of their own.

A process of its own is a fresh one, which imports everything for five seconds, or `Forked`: a child of a server that
imports the package and runs nothing, so that its children are as good as fresh ones and start within milliseconds.
"""

import atexit
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sfc.cli import main


class Finished(NamedTuple):
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str
    imported_torch: bool = True
    """whether its process had imported torch when it ended"""
    loads: int = 0
    """how often it loaded a model's weights; counted where torch was imported before"""

    @property
    def result(self) -> dict:
        assert self.status == 0, self.stderr
        assert len(self.stdout.splitlines()) == 1, "with --json standard output holds the object and nothing else"
        return json.loads(self.stdout)


def sfc(*arguments: object, root: Path) -> Finished:
    """Run a command in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    loaded: list[object] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["sfc", *map(str, arguments), "--root", str(root)])
        patch.setenv("COLUMNS", "200")
        patch.chdir(root)
        if "torch" in sys.modules:
            loading = importlib.import_module("sfc.models.loading")
            load = loading.load_weights
            patch.setattr(loading, "load_weights", lambda config: loaded.append(config) or load(config))
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return Finished(status, out.getvalue(), err.getvalue(), "torch" in sys.modules, len(loaded))


def sfc_process(*arguments: object, root: Path, **environment: str) -> Finished:
    """Run a command in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "sfc", *map(str, arguments), "--root", str(root)],
        capture_output=True, text=True, cwd=root, env={**os.environ, "COLUMNS": "200", **environment},
    )  # fmt: skip
    return Finished(ran.returncode, ran.stdout, ran.stderr)


def sfc_commands(
    commands: Sequence[Sequence[object]], root: Path, first: str = "pass", **environment: str
) -> list[Finished]:
    """Run several commands, one after the other, in one process of their own, after a statement.

    Torch has to be imported for loads to be counted.
    """
    program = f"{first}\nimport sys, json, pathlib, commands; root = pathlib.Path(sys.argv[1]); print(json.dumps(["
    program += "commands.sfc(*arguments, root=root) for arguments in json.load(sys.stdin)]))"
    ran = subprocess.run(
        [sys.executable, "-c", program, root],
        input=json.dumps([list(map(str, arguments)) for arguments in commands]),
        capture_output=True, text=True, cwd=Path(__file__).parent, env={**os.environ, **environment},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [Finished(*one) for one in json.loads(ran.stdout)]


@functools.cache
def _server() -> ForkServerContext:
    """The server whose children begin with everything imported; it starts with the first of them."""
    package, server = importlib.import_module("sfc"), multiprocessing.get_context("forkserver")
    names = (module.name for module in pkgutil.walk_packages(package.__path__, "sfc."))
    server.set_forkserver_preload([name for name in names if not name.startswith(("sfc.explorer", "sfc.__main__"))])
    return server


class Forked:
    """A process of its own that begins with everything imported, and what it prints; used like a `Popen`."""

    def __init__(self, run: Callable[..., None], *arguments: Any, cwd: Path, **environment: str) -> None:
        """Call a function of a module with these arguments."""
        self._told = Path(tempfile.mkdtemp(prefix="sfc-told-"))
        self._process = _server().Process(
            target=_forked, args=(run, arguments, cwd, {"COLUMNS": "200", **environment}, self._told)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its status, or the number of the signal that ended it, negative; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, seconds: float | None = None) -> tuple[str, str]:
        """What it printed to standard output and error, once it ends; after so many seconds SIGALRM ends it."""
        self._process.join(seconds)
        if self.returncode is None:
            self.send_signal(signal.SIGALRM)
            self._process.join()
        out, err = ((self._told / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return out, err


def _forked(
    run: Callable[..., None], arguments: Sequence[Any], cwd: Path, environment: dict[str, str], told: Path
) -> None:
    """What a forked process does, and how it ends: as one whose program this is."""
    for name, number in {"stdout": 1, "stderr": 2}.items():
        os.dup2(os.open(told / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(cwd)
    ranks, progress = (importlib.import_module(f"sfc.core.{name}") for name in ("ranks", "progress"))
    progress.console.quiet = not ranks.is_leader()  # which it was told when it was imported
    status: Any = 0
    try:
        run(*arguments)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def run_commands(commands: Sequence[Sequence[str]], first: str = "pass", script: Path | None = None) -> None:
    """Run the command line, or a script, for each, after a statement; it ends with the first that fails."""
    exec(first)
    for arguments in commands:
        sys.argv = ["sfc", *arguments]
        try:
            if script:
                runpy.run_path(str(script), run_name="__main__")
            else:
                importlib.import_module("sfc.__main__").main()
        except SystemExit as end:
            if end.code:
                raise


def sfc_forked(*arguments: object, root: Path, **environment: str) -> Forked:
    """Start a command in a process of its own."""
    return Forked(run_commands, [[*map(str, arguments), "--root", str(root)]], cwd=root, **environment)


def sfc_ranks(
    n: int, commands: Sequence[Sequence[object]], root: Path, first: str = "pass", fresh: int = 0
) -> "list[Forked | subprocess.Popen[str]]":
    """Start several processes as Slurm does, each of which runs the commands, one after the other, after a statement.

    They stop at the first that fails, with its status. The last `fresh` of them are no forks: their sets, for example,
    have an order of their own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(n)}
    lines = [[*map(str, command), "--root", str(root)] for command in commands]
    program = f"import sys, json, commands; commands.run_commands(json.loads(sys.argv.pop()), {first!r})"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    return [
        Forked(run_commands, lines, first, cwd=root, **together, RANK=str(rank))
        if rank < n - fresh
        else subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(lines)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root,
            env={**os.environ, "COLUMNS": "200", **together, "RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(n)
    ]  # fmt: skip


def sfc_commands_forked(commands: Sequence[Sequence[object]], root: Path) -> list[Finished]:
    """Run several commands, one after the other, in one process of their own, and count what they load."""
    told = Path(tempfile.mkdtemp(prefix="sfc-told-")) / "told"
    process = Forked(_run_and_tell, [[*map(str, arguments)] for arguments in commands], root, told, cwd=root)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return [Finished(*one) for one in json.loads(told.read_text(encoding="utf-8"))]


def _run_and_tell(commands: Sequence[Sequence[str]], root: Path, told: Path) -> None:
    told.write_text(json.dumps([sfc(*arguments, root=root) for arguments in commands]), encoding="utf-8")


def assert_one_line(finished: Finished, *expected: str) -> None:
    """It ended with status 2 and an error of one line, in which all of this stands."""
    last = finished.stderr.strip().splitlines()[-1]
    assert finished.status == 2 and last.startswith("error: ") and "Traceback" not in finished.stderr, finished.stderr
    for text in expected:
        assert text in last


def unlist(folder: Path) -> None:
    """Let the manifests of a folder and of those in it list no files, as earlier versions' do: a test changes some."""
    for path in folder.rglob("manifest.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("contents", "checksum")}))
