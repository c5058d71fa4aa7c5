"""Several processes as one command, as `torchrun` starts them: who this one is, and how they wait for each other.

Alone, a process is the leader, everything is its own, and waiting is nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from sfc.core.errors import is_count

Item = TypeVar("Item")
_PATIENCE = timedelta(days=7)
"""the leader may collect for days while the others wait"""


def rank() -> int:
    """The number of this process among those that were started together."""
    return _number("RANK", 0)


def world_size() -> int:
    """How many processes were started together."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """The number of this process among those on its machine: which GPU is its own."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    """What a variable of `torchrun` says; other programs set the same names to whatever they like."""
    value = os.environ.get(name, "")
    return int(value) if is_count(value) else default


def is_leader() -> bool:
    """Whether this is the process that says things and writes what all share."""
    return rank() == 0


def own_share(items: Sequence[Item]) -> list[Item]:
    """The items that are this process's to work on, dealt out in turn."""
    return list(items[rank() :: world_size()])


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() == 1:
        return
    import torch.distributed

    if not torch.distributed.is_initialized():
        # Nothing but waiting goes over it, whatever the device: gloo is always there.
        torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    torch.distributed.barrier()


@contextmanager
def leader_first() -> Iterator[None]:
    """Let the leader through the block before the others, who then find its work done."""
    if not is_leader():
        wait_for_all()
    yield
    if is_leader():
        wait_for_all()
