"""What the machine has, and whether what is asked for fits into it."""

import os
from contextlib import suppress
from pathlib import Path

from sfc.core.errors import UserError

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
