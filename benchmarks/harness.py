"""What the programs in this folder share: options, timing side by side, and the table and JSON that they print."""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any

import torch

from sfc.core.progress import say

INSTALL = "pip install --no-deps -r requirements-benchmarks.lock"

Calls = Mapping[str, Callable[[], object]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", action="store_true", help="end with one JSON object, and nothing else, on stdout")
    options.add_argument("--quick", action="store_true", help="about a minute: the same measurements, fewer of each")
    return options


def interleaved(calls: Calls, rounds: int, burst: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds per call of each, once a round: every round runs all of them in turn, so that a busy spell hits all.

    A turn is one call that is not timed, which brings the contender's own data back into the caches, and `burst` that
    are. A first round that is not counted warms everything up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            call()
            synchronise(device)
            began = time.perf_counter()
            for _ in range(burst):
                call()
            synchronise(device)
            seconds[name].append((time.perf_counter() - began) / burst)
    return {name: counted for name, (_, *counted) in seconds.items()}


def in_turns(calls: Calls, rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each call, once a round; they take too long for rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def paired_ratio(seconds: Sequence[float], of: Sequence[float]) -> float:
    """The median over the rounds of `seconds / of`, each pair from one round."""
    return statistics.median(a / b for a, b in zip(seconds, of, strict=True))


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peer(module: str) -> ModuleType | None:
    """A module of a library that is compared with, or None, and a line on standard error, where it is not installed."""
    try:
        with redirect_stdout(sys.stderr):  # some greet whoever imports them
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        say(f"{module}: {error}. Its figures will be null. The extra `benchmarks`: {INSTALL}")
        return None


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the programs."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as the documentation has it: the first column is text, the others are figures, None is an empty cell."""
    head = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join([*head, *(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows)])


def emit(text: str, figures: Mapping[str, Any], as_json: bool) -> None:
    """The text on standard output; with `as_json` on standard error instead, and the figures as one line of JSON."""
    print(text, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(figures, allow_nan=False))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
