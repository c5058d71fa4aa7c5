"""What the machine has, whether what is asked for fits into it, and how long a call takes on it."""

import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sfc.core.errors import UserError

if TYPE_CHECKING:
    import torch

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int:
    """Bytes of main memory that can be used now: what the system calls available, within a container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [total]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limits.append(int(_CONTAINER_LIMIT.read_text(encoding="ascii")))
    return min(limits)


def check_memory(wanted: int, what: str, remedy: str, available: int | None = None) -> None:
    """Refuse what cannot fit.

    Args:
        wanted: bytes, estimated from below: what is refused would certainly fail.
        available: bytes, where it is not main memory that is wanted.

    Raises:
        UserError: more is wanted than is available.
    """
    available = available_memory() if available is None else available
    if wanted > available:
        raise UserError(f"{what} takes {size(wanted)} of memory, and {size(available)} are available: {remedy}")


def size(n_bytes: int) -> str:
    """Bytes as people read them."""
    gigabytes = n_bytes / 2**30
    return f"{gigabytes:.1f} GiB" if gigabytes < 1e6 else f"{gigabytes:.0e} GiB"


def resident_memory() -> int:
    """Bytes of main memory that this process has in use now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):  # no Linux: the most it ever had
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return pages * os.sysconf("SC_PAGE_SIZE")


_PATIENCE = 0.4
"""seconds after which one thing has been measured long enough"""


def seconds_of(call: Callable[[], object], device: "torch.device", rounds: int = 12) -> float:
    """The shortest of a few rounds after a first one, which counts only where it takes so long that it is enough.

    On a CPU with one thread these are seconds of that thread, so that what else runs on the machine does not count.
    """
    import torch

    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times: list[float] = []
    while not times or (len(times) <= rounds and sum(times) < _PATIENCE):
        wait()
        began = clock()
        call()
        wait()
        times.append(clock() - began)
    return min(times[1:] or times)


_UNITS = {"": 30, "K": 10, "M": 20, "G": 30, "T": 40}


def bytes_of(text: str) -> int:
    """What a size such as `24GB`, `24 GiB` or `24` (gigabytes) says, a gigabyte being 2**30 bytes.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"{text[:100]!r} is not a size of memory: write for example 24GB")
    return round(float(match[1]) * 2 ** _UNITS[match[2].upper()])
