"""Commands as a user types them: in this process, where torch is loaded already, or in one of their own."""

import contextlib
import importlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


def sfc_ranks(
    n: int, commands: Sequence[Sequence[object]], root: Path, first: str = "pass"
) -> list[subprocess.Popen[str]]:
    """Start several processes as Slurm does, each of which runs the commands, one after the other, after a statement.

    They stop at the first that fails, with its status.
    """
    program = (
        f"{first}\nimport sys, json; from sfc.__main__ import main\nfor arguments in json.loads(sys.argv.pop()):\n"
    )
    program += "    sys.argv[1:] = arguments\n    try:\n        main()\n    except SystemExit as end:\n"
    program += "        if end.code:\n            raise"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(n)}
    arguments = json.dumps([[*map(str, command), "--root", str(root)] for command in commands])
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root,
            env={**os.environ, "COLUMNS": "200", **together, "RANK": str(rank)},
        )
        for rank in range(n)
    ]  # fmt: skip


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
