"""How the hostile suite is sampled, timed and judged.

Every list of cases goes through `sample`. With `SFC_HOSTILE=all` (`make hostile`) all of them run; else a share that
rotates by the week, so that after a few weeks all have run. The run says its seed; `SFC_HOSTILE_SEED=…` repeats it.
"""

import hashlib
import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from commands import Finished

Case = TypeVar("Case")
Row = TypeVar("Row")

ALL = os.environ.get("SFC_HOSTILE") == "all"
_YEAR, _WEEK, _ = datetime.now(UTC).isocalendar()
SEED = int(os.environ.get("SFC_HOSTILE_SEED") or 53 * _YEAR + _WEEK)
"""which share of the cases runs"""


def sample(cases: Iterable[Case], keep: int) -> list[Case]:
    """Of these cases those that this run tries, in their order: `keep` of them, or all with `SFC_HOSTILE=all`.

    Consecutive seeds take consecutive stretches of one shuffled order, which depends on the cases' texts alone, so that
    `len(cases) / keep` seeds in a row try every case.
    """
    every = list(cases)
    shuffled = sorted(range(len(every)), key=lambda place: hashlib.sha256(repr(every[place]).encode()).digest())
    first = SEED * keep % max(len(every), 1)
    chosen = set((shuffled + shuffled)[first : first + min(keep, len(every))])
    return [case for place, case in enumerate(every) if ALL or place in chosen]


def spread(rows: Iterable[Row], values: Sequence[Case], each: int) -> list[tuple[Row, Case]]:
    """Every row with `each` of the values, and every value with some row: a stretch of them that goes on round."""
    each = min(each, len(values))
    return [(row, values[(each * place + n) % len(values)]) for place, row in enumerate(rows) for n in range(each)]


class Hung(BaseException):
    """A case took longer than it may; no `except Exception` holds it up."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `Hung` in the block when it takes longer; in the main thread only."""

    def ring(_signal: int, _frame: object) -> None:
        raise Hung(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""what must never reach a terminal: control characters but line feed and tab, and marks that reorder a line"""


def assert_held(finished: Finished, statuses: Sequence[int] = (0, 2, 130)) -> None:
    """It ended well, or with one line that says what is wrong; a fault of the program (status 1) is none of these."""
    told = f"status {finished.status}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    assert finished.status in statuses, told
    assert "Traceback (most recent call last)" not in finished.stdout + finished.stderr, told
    assert not CONTROLS.search(finished.stdout + finished.stderr.replace("\r", "")), repr(told)
    errors = [line for line in finished.stderr.splitlines() if line.startswith(("error:", "interrupted:"))]
    assert len(errors) == (finished.status != 0), told
    assert not errors or finished.stderr.splitlines()[-1] == errors[0], told
    assert not errors or 10 < len(errors[0]) < 1200, told


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and link below a folder with its size and time, for comparing what was there with what is."""
    return {
        str(path.relative_to(folder)): ((stat := path.lstat()).st_size, stat.st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
