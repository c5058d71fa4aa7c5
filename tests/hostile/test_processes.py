"""What a process is born into and how it ends: Ctrl-C, pipes, users, folders, limits and variables."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import Finished

from hostile.home import DATA, PRESET, SLOWEST, Home, write_data
from hostile.inputs import PRESET as SMALL
from hostile.sampling import assert_held, sample, spread

COMMAND = [sys.executable, "-m", "sfc"]
UP = "from sfc.__main__ import main; print('up', flush=True); main()"
"""a program that says when Python itself is up: until then Ctrl-C is Python's affair"""
NOBODY = 65_533
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def started(
    arguments: list[str],
    root: Path,
    environment: dict[str, str | None] | None = None,
    program: Sequence[str] = COMMAND,
    **further: Any,
) -> Any:
    """A process of the command line; None in the environment takes a variable away."""
    changed = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **(environment or {})}
    kept = {name: value for name, value in changed.items() if value is not None}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **further}
    return subprocess.Popen([*program, *arguments], cwd=root, env=kept, text=True, **streams)


def ended(process: Any) -> Finished:
    try:
        stdout, stderr = process.communicate(timeout=3 * SLOWEST)
    finally:
        process.kill()
    return Finished(process.returncode, stdout or "", stderr or "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with data and nothing made of it."""
    root = tmp_path / "root"
    write_data(root / "data" / "data")
    (root / "small.yaml").write_text(SMALL, encoding="utf-8")
    return root


DISCOVER = ["discover", *PRESET, *DATA, "--category", "violence"]
MOMENTS = [round(0.1 * 1.5**n, 1) for n in range(14)]
"""seconds after the start: the first while modules are imported, the last when it is done"""


@pytest.mark.parametrize("moment", sample(MOMENTS, keep=1))
def test_ctrl_c_at_any_moment_is_one_line_and_status_130(root: Path, moment: float) -> None:
    process = started(DISCOVER, root, program=[sys.executable, "-c", UP])
    assert process.stdout.readline() == "up\n"
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    finished = ended(process)
    if finished.status != 0:  # it was done before
        assert finished.status == 130, finished.stderr
        assert_held(finished)
        assert not list(root.glob("circuits/*/circuit-*/manifest.json"))


def _limited(which: int, amount: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails, and does not kill
        resource.setrlimit(which, (amount, amount))

    return limit


SURROUNDINGS: dict[str, tuple[dict[str, str | None], dict[str, Any]]] = {
    "ascii": ({"PYTHONIOENCODING": "ascii"}, {}),
    "latin-1": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}),
    "no-width": ({"COLUMNS": "0"}, {}),
    "one-column": ({"COLUMNS": "1"}, {}),
    "width-in-words": ({"COLUMNS": "wide"}, {}),
    "odd-terminal": ({"TERM": "\x1b[2J", "COLORTERM": "x", "FORCE_COLOR": "0"}, {}),
    "no-home": ({"HOME": "/nowhere", "XDG_CACHE_HOME": None}, {}),
    "empty-path": ({"PATH": ""}, {}),
    "no-temporary-folder": ({"TMPDIR": "/nowhere"}, {}),
    "cache-is-a-file": ({"SFC_CACHE": "/dev/null"}, {}),
    "cache-is-nowhere": ({"SFC_CACHE": "/proc/nowhere"}, {}),
    "ranks-in-words": ({"RANK": "first", "WORLD_SIZE": "many", "LOCAL_RANK": "-1"}, {}),
    "threads-in-words": ({"OMP_NUM_THREADS": "many"}, {}),
    "no-plugin": ({"SFC_PLUGINS": "/nowhere.py"}, {}),
    "plugin-is-a-folder": ({"SFC_PLUGINS": "/tmp"}, {}),
    "plugin-is-a-device": ({"SFC_PLUGINS": "/dev/zero"}, {}),
    "no-stdin": ({}, {"stdin": None, "preexec_fn": lambda: os.close(0)}),
    "no-stdout": ({}, {"preexec_fn": lambda: os.close(1)}),
    "no-stderr": ({}, {"preexec_fn": lambda: os.close(2)}),
    "full-stdout": ({}, {"stdout": Path("/dev/full")}),
    "small-files": ({}, {"preexec_fn": _limited(resource.RLIMIT_FSIZE, 20_000)}),
    "few-files": ({}, {"preexec_fn": _limited(resource.RLIMIT_NOFILE, 24)}),
    "little-memory": ({}, {"preexec_fn": _limited(resource.RLIMIT_AS, 700 << 20)}),
}
QUICK = {
    "presets": ["presets", "--json"],
    "help": ["--help"],
    "data": ["data", *PRESET, *DATA],
    "collect": ["collect", *PRESET, *DATA],
    "wrong": ["data", "--preset", "nothing"],
}


COLLECTED = ("no-home", "cache-is-nowhere", "no-temporary-folder", "small-files", "few-files", "little-memory")
"""what a run of a model is tried in as well"""


@pytest.mark.parametrize(
    ("surroundings", "command"),
    sample(
        [*spread(SURROUNDINGS, ("presets", "data", "wrong"), 1), *((name, "collect") for name in COLLECTED)], keep=2
    ),
)
def test_odd_surroundings(root: Path, surroundings: str, command: str) -> None:
    environment, further = SURROUNDINGS[surroundings]
    if isinstance(stream := further.get("stdout"), Path):
        with stream.open("w") as file:
            finished = ended(started(QUICK[command], root, environment, **{**further, "stdout": file}))
    else:
        finished = ended(started(QUICK[command], root, environment, **further))
    if surroundings == "no-stderr":
        assert finished.status in (0, 2)
        return
    if surroundings == "few-files" and "ImportError" in finished.stderr:
        pytest.skip("Python cannot import its own modules with so few files")
    assert_held(finished)


@pytest.mark.parametrize("command", ["presets", "data", "help"])
def test_whoever_reads_the_output_may_go(root: Path, command: str) -> None:
    process = started(QUICK[command], root)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(SLOWEST) in (0, 128 + signal.SIGPIPE)
    assert "Traceback" not in stderr and "Exception ignored" not in stderr and "error:" not in stderr


@needs_root
@pytest.mark.parametrize("command", ["presets", "data", "collect"])
def test_a_user_without_name_home_and_rights(root: Path, command: str) -> None:
    for path in [*root.parents][:3]:
        path.chmod(0o755)
    cache = root.parent / "cache"
    gone: dict[str, str | None] = dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "SFC_CACHE"))
    try:
        process = started(QUICK[command], root, gone, user=NOBODY, group=NOBODY)
    except PermissionError:
        pytest.skip("the interpreter is out of this user's reach")
    finished = ended(process)
    assert_held(finished)
    assert finished.status == (0 if command == "presets" else 2) and not cache.exists()


def test_a_root_that_went_away(home: Home, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    leave = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from sfc.__main__ import main; main()"
    ran = subprocess.run([sys.executable, "-c", leave, "data", "--preset", "tiny"], capture_output=True, text=True)
    assert_held(Finished(ran.returncode, ran.stdout, ran.stderr))
    assert ran.returncode == 2
