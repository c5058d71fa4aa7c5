"""The stream of training batches: complete, shuffled, bounded in memory, and the same wherever it begins."""

import ctypes
import multiprocessing
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_store import SITE, make_shard

from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.data.render import TokenizedPrompt
from sfc.models.loading import Model
from sfc.saes.collect import collect
from sfc.saes.plan import plan_batches
from sfc.saes.store import Store
from sfc.saes.stream import RowSource, live_source, shuffled_batches, stored_source
from sfc.saes.unfinished import CHUNK_BYTES

M_MMAP_THRESHOLD = -3


def counted(n_rows: int, block_rows: int, width: int = 1) -> RowSource:
    """Rows that hold their own number."""
    starts = np.append(np.arange(0, n_rows, block_rows), n_rows)
    return RowSource(
        starts, lambda i: torch.arange(float(starts[i]), float(starts[i + 1]))[None, :, None].repeat(1, 1, width)
    )


@given(
    n_rows=st.integers(40, 400), block_rows=st.integers(1, 50), buffer_rows=st.integers(1, 200), seed=st.integers(0, 9)
)
def test_an_epoch_has_every_wanted_row_at_most_once_and_nearly_all(
    n_rows: int, block_rows: int, buffer_rows: int, seed: int
) -> None:
    wanted = np.arange(n_rows) % 5 != 0
    stream = shuffled_batches(counted(n_rows, block_rows), wanted, 8, seed, buffer_rows)
    rows: list[int] = []
    while len(rows) < wanted.sum() and not len(set(rows)) < len(rows):
        rows += next(stream)[0, :, 0].long().tolist()
    epoch = rows[: len(rows) - 8] if len(set(rows)) < len(rows) else rows
    assert len(set(epoch)) == len(epoch) and set(epoch) <= set(np.flatnonzero(wanted))
    n_buffers = max(wanted.sum() // max(buffer_rows, 8), 1)
    assert len(epoch) > wanted.sum() - 8 * (n_buffers + 1)


@given(
    wanted=st.lists(st.integers(0, 5), min_size=40, max_size=200),
    block_rows=st.integers(1, 50), buffer_rows=st.integers(1, 100), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_row_comes_in_each_epoch_as_often_as_it_is_wanted(
    wanted: list[int], block_rows: int, buffer_rows: int, seed: int
) -> None:
    often = np.array([*wanted, 1])
    stream = shuffled_batches(counted(len(often), block_rows), often, 1, seed, buffer_rows)
    for _ in range(2):
        rows = [int(next(stream)[0, 0, 0]) for _ in range(often.sum())]
        assert np.array_equal(np.bincount(rows, minlength=len(often)), often)


def test_a_row_that_is_wanted_two_and_a_half_times_comes_twice_or_three_times() -> None:
    often = np.full(400, 2.5)
    stream = shuffled_batches(counted(400, 20), often, 1, 0, 100)
    rows = [int(next(stream)[0, 0, 0]) for _ in range(800)]  # an epoch has about a thousand
    assert np.bincount(rows).max() <= 3
    rows += [int(next(stream)[0, 0, 0]) for _ in range(20_000 - 800)]
    assert np.bincount(rows, minlength=400) / 20 == pytest.approx(often, abs=0.6)


@given(first=st.integers(0, 60), seed=st.integers(0, 3))
def test_it_can_begin_at_any_step(first: int, seed: int) -> None:
    wanted = np.arange(300) % 3 != 0
    whole = shuffled_batches(counted(300, 11), wanted, 10, seed, 64)
    rest = shuffled_batches(counted(300, 11), wanted, 10, seed, 64, first_step=first)
    for expected, got in zip(islice(whole, first, first + 5), rest, strict=False):
        assert torch.equal(expected, got)


def test_batches_mix_blocks_and_depend_on_the_seed() -> None:
    wanted = np.ones(1000, dtype=bool)
    one, same, other = (next(shuffled_batches(counted(1000, 20), wanted, 40, seed, 320)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    blocks = (one[0, :, 0] / 20).long().bincount()
    assert (blocks > 0).sum() >= 12 and blocks.max() <= 8


def test_too_few_rows_are_an_error() -> None:
    with pytest.raises(UserError, match="fewer than a batch"):
        next(shuffled_batches(counted(5, 2), np.ones(5, dtype=bool), 8, 0, 8))


def test_memory_stays_below_the_bound_on_a_store_larger_than_it(tmp_path: Path) -> None:
    """Two buffers, a few copies of a block, and HDF5's cache of a chunk."""
    width, n_rows, buffer_rows, block_rows = 512, 64_000, 4_000, 250
    make_shard(tmp_path / "shard-00000.h5", torch.randn(n_rows, width), batch_rows=block_rows)
    bound = (2 * buffer_rows + 12 * block_rows) * width * 4 + CHUNK_BYTES
    assert n_rows * width * 4 > 5 * bound

    def read_two_epochs() -> None:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)  # freed memory goes back at once, and does not count
        source = stored_source(Store(tmp_path), [SITE], block_rows)
        source.read(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _peak_memory()
        stream = shuffled_batches(source, np.ones(n_rows, bool), 250, 0, buffer_rows)
        for _ in range(2 * n_rows // 250):
            next(stream)
        (tmp_path / "grown").write_text(str(_peak_memory() - before))
        os._exit(0)  # not through the tests' own clean-up

    child = multiprocessing.get_context("fork").Process(target=read_two_epochs)
    child.start()
    child.join()
    assert int((tmp_path / "grown").read_text()) < bound


def _peak_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def test_running_the_model_again_gives_the_very_batches_of_the_store(
    model: Model, prompts: list[TokenizedPrompt], tmp_path: Path
) -> None:
    config = load_experiment("tiny", ["activations.batch_tokens=80", "activations.shard_tokens=90"]).activations
    collect(model, prompts, config.sites, config, tmp_path, lambda _: None)
    store = Store(tmp_path)
    stored = stored_source(store, config.sites, 20)
    live = live_source(model, plan_batches(prompts, config, model.device), config.sites, torch.float16, 20)
    assert np.array_equal(stored.starts, live.starts)
    wanted = np.arange(store.n_tokens) % 4 != 0
    streams = [shuffled_batches(source, wanted, 16, 0, 48) for source in (stored, live)]
    for one, other in islice(zip(*streams, strict=True), 12):
        assert one.shape == (2, 16, model.d_model) and torch.equal(one, other)
