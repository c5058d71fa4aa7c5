"""Several processes as one command, as `torchrun` or Slurm start them: how they share work, and know of each other.

Work is dealt out in items whose results are files: `dealt` gives each item to the process that asks first, `own_share`
gives each process the same items every time, and `wait_for_all` returns when all are there. What does not divide is
done by the first process, the leader, `alone`. Short messages go from one to another by way of the store of torch's
rendezvous; only `Peers`, who work on one item together, sum tensors. Every process has to come to these calls in the
same order.

Where one is gone, the others end within a minute: one that fails says so, and one that was killed is no longer heard.

Alone, a process is the leader, everything is its own, and waiting is nothing.
"""

import atexit
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from sfc.core.errors import UserError, is_count, one_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import PrefixStore

# What its connections have to say comes with a traceback in C++. Set before torch is read.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

Item = TypeVar("Item")
Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")
_START = 600.0
"""seconds after which a process that has not begun is given up"""
_SILENCE = 45.0
"""seconds after which a process that is no longer heard is taken for dead"""
_BEAT = 1.0
"""seconds between two signs of life"""
_GRACE = 20.0
"""seconds that a process has to clean up when another one is gone"""
_GO_ON = "what is finished is kept: run the same command again, and it goes on from there"


def rank() -> int:
    """The number of this process among those that were started together."""
    number = _number("RANK", 0)
    return number if number < world_size() else 0


def world_size() -> int:
    """How many processes were started together."""
    return 1 if _Solo.depth else max(_number("WORLD_SIZE", 1), 1)


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


class _Solo:
    depth = 0


@contextmanager
def alone() -> Iterator[None]:
    """Work in the block as a process that was started by itself, while others do other things or wait."""
    _Solo.depth += 1
    try:
        yield
    finally:
        _Solo.depth -= 1


def by_leader(function: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """A function that the leader runs alone, and the others not at all."""

    @functools.wraps(function)
    def led(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if is_leader():
            with alone():
                function(*args, **kwargs)

    return led


def own_share(items: Sequence[Item]) -> list[Item]:
    """The items that are this process's to work on, the same ones each time; of fewer items than processes one."""
    if world_size() > len(items):
        return [items[rank() % len(items)]]
    return list(items[rank() :: world_size()])


class Peers(NamedTuple):
    """The processes that work on an item together."""

    number: int = 0
    """of this process among them"""
    size: int = 1
    sum: "Callable[[Tensor], None]" = lambda _: None
    """replaces a tensor by its sum over them, the same bits on each"""

    def share(self, n_rows: int) -> slice:
        """The rows that are this one's of so many."""
        return slice(n_rows * self.number // self.size, n_rows * (self.number + 1) // self.size)


def peers(n_items: int, backend: str) -> Peers:
    """Those that have the same item as this process in `own_share`.

    Args:
        backend: how they sum tensors: `nccl` on GPUs, `gloo` elsewhere.
    """
    size = world_size()
    if size <= n_items:
        return Peers()
    import torch.distributed

    wait_for_all()
    if not torch.distributed.is_initialized():
        _group().join(backend)
    groups = [list(range(item, size, n_items)) for item in range(n_items)]
    own = [torch.distributed.new_group(group) for group in groups][rank() % n_items]

    def total(tensor: "Tensor") -> None:
        try:
            torch.distributed.all_reduce(tensor, group=own)
        except RuntimeError:
            raise UserError(f"another process that trains the same SAE is gone; {_GO_ON}") from None

    group = groups[rank() % n_items]
    return Peers(group.index(rank()), len(group), total if len(group) > 1 else lambda _: None)


def dealt(items: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
    """Every item in turn, and whether it is this process's to work on, `alone`: the one that asks first is given it.

    Args:
        items: as many, in the same order, on every process.
    """
    if world_size() == 1:
        yield from ((item, True) for item in items)
        return
    group = _group()
    claim = functools.partial(group.count, group.next_call())
    given = claim() - 1
    for number, item in enumerate(items):
        if number == given:
            with alone():
                yield item, True
            given = claim() - 1
        else:
            yield item, False


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        group = _group()
        call = group.next_call()
        group.count(call)
        group.wait(lambda: group.count(call, 0) >= world_size())


def told(decide: Callable[[], bool]) -> bool:
    """What the leader decides, on every process: what each would see for itself may change in between."""
    if world_size() == 1:
        return decide()
    group = _group()
    call = group.next_call()
    if is_leader():
        decided = decide()
        group.set(call, decided)
        return decided
    group.wait(lambda: group.has(call))
    return group.get(call)


def gathered(value: Value) -> list[Value]:
    """The values of all processes (for JSON), in the order of their ranks, on every process."""
    if world_size() == 1:
        return [value]
    group = _group()
    call = group.next_call()
    group.set(f"{call} {rank()}", value)
    wait_for_all()
    return [group.get(f"{call} {other}") for other in range(world_size())]


@contextmanager
def in_turn(name: str) -> Iterator[None]:
    """Let one process after another through the blocks of a name, where each works by itself."""
    group = _Group.only
    if group is None:
        yield
        return
    ticket = group.count(f"tickets of {name}") - 1
    group.wait(lambda: group.count(f"served of {name}", 0) == ticket)
    try:
        yield
    finally:
        group.count(f"served of {name}")


def give_up(reason: str) -> None:
    """Tell the others that this process ends with its work undone, so that they end as well."""
    if _Group.only is not None:
        _Group.only.give_up(reason)


def is_lost() -> bool:
    """Whether this process was interrupted because another one is gone, which has been said."""
    return _Group.only is not None and _Group.only.lost


def _group() -> "_Group":
    if _Group.only is None:
        _Group.only = _Group()
    return _Group.only


class _Group:
    """The processes that were started together, as a store of messages and counters that all of them see."""

    only: "_Group | None" = None

    def __init__(self) -> None:
        """Meet the others.

        Raises:
            UserError: they cannot be found.
        """
        self.rank, self.size, self.calls, self.lost, self.is_leaving = rank(), world_size(), 0, False, False
        self.sums = False
        try:
            self.store = self._met("sfc")
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"WORLD_SIZE={self.size} says that so many processes work together, and they cannot meet"
                f" ({one_line(error)}): start all of them, with torchrun or as docs/cluster.md shows, or unset it"
            ) from None
        self.set(f"host {self.rank}", socket.gethostname())
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()
        atexit.register(self._leave)

    def _met(self, prefix: str) -> "PrefixStore":
        """The store where all meet, by a connection of its own: while one waits for something, others can go on."""
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        found, *_ = next(iter(rendezvous("env://", self.rank, self.size, timeout=timedelta(seconds=_START))))
        return PrefixStore(prefix, found)

    def join(self, backend: str) -> None:
        """Let all processes sum tensors."""
        import torch.distributed

        torch.distributed.init_process_group(backend, store=self._met("sums"), rank=self.rank, world_size=self.size)
        self.sums = True

    def _name(self, number: int) -> str:
        return f"rank {number} of {self.size}"

    def next_call(self) -> str:
        """The key of what every process comes to next."""
        self.calls += 1
        return f"call {self.calls}"

    def count(self, key: str, more: int = 1) -> int:
        """A counter, after so much is added to it."""
        with self._reaching():
            return self.store.add(key, more)

    def set(self, key: str, value: Any) -> None:
        with self._reaching():
            self.store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        with self._reaching():
            return json.loads(self.store.get(key))

    def has(self, key: str) -> bool:
        with self._reaching():
            return self.store.check([key])

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """
        Raises:
            UserError: whoever keeps the store is gone.
        """
        try:
            yield
        except RuntimeError:
            if threading.current_thread() is not self.watch and not self.is_leaving:
                time.sleep(5 * _BEAT)  # as in `wait`
            keeper = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else self._name(0)
            raise UserError(f"{keeper}, where all processes meet, is gone") from None

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Return when it is done, by all processes.

        Raises:
            UserError: one of them has ended and not done it.
        """
        pause = 0.005
        while not is_done():
            if self.count("left", 0) and not is_done():
                time.sleep(5 * _BEAT)  # the watching thread may know why, and interrupts
                raise UserError(f"another of the {self.size} processes has ended before its work was done; {_GO_ON}")
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def give_up(self, reason: str) -> None:
        if not self.lost and not self.is_leaving:
            self.is_leaving = True
            with suppress(UserError):
                where, reason = socket.gethostname(), reason.removesuffix(f"; {_GO_ON}")
                self.set("lost", f"{self._name(self.rank)} on {where} has ended ({reason})")

    def _watch(self) -> None:
        """Give signs of life, see to those of the next process that is still there, and hear who is lost."""
        next_one, heard, heard_at = (self.rank + 1) % self.size, -1, time.monotonic()
        while not self.is_leaving:
            try:
                self.count(f"beat {self.rank}")
                beat, now = self.count(f"beat {next_one}", 0), time.monotonic()
                if beat != heard:
                    heard, heard_at = beat, now
                elif self.has(f"left {next_one}"):
                    next_one, heard, heard_at = (next_one + 1) % self.size, -1, now
                elif now - heard_at > (_SILENCE if heard else _START):
                    where = f" on {self.get(f'host {next_one}')}" if self.has(f"host {next_one}") else ""
                    self.set("lost", f"{self._name(next_one)}{where} {'is gone' if heard else 'did not start'}")
                if self.has("lost") and not self.is_leaving:
                    self._end(self.get("lost"))
            except UserError as error:
                if not self.is_leaving:
                    self._end(str(error))
            time.sleep(_BEAT)

    def _end(self, what: str) -> None:
        """Say what is lost, and end this process as Ctrl-C does; what cannot be interrupted ends a little later."""
        self.lost = True
        with suppress(OSError, ValueError):
            print(f"error: {what}; {_GO_ON}", file=sys.stderr, flush=True)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(_GRACE)
        os._exit(2)

    def _leave(self) -> None:
        """Say good-bye; the leader, who may keep the store, goes last."""
        is_orderly = not self.lost and not self.is_leaving
        if self.sums and is_orderly:
            import torch.distributed

            torch.distributed.destroy_process_group()
        self.is_leaving = True
        with suppress(UserError):
            self.set(f"left {self.rank}", True)
            left, end = self.count("left"), time.monotonic() + (_GRACE if is_orderly else 3 * _BEAT)
            while self.rank == 0 and left < self.size and time.monotonic() < end:
                time.sleep(0.05)
                left = self.count("left", 0)
