"""The store: what is written is read, damage is told."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from sfc.core.errors import UserError
from sfc.data.schema import with_ids
from sfc.models.batches import Batch
from sfc.saes.plan import PlannedBatch, TokenTable
from sfc.saes.store import Store, read_prompts, write_prompts
from sfc.saes.unfinished import CHUNK_BYTES, unfinished_shard

SITE = "blocks.0.hook_resid_post"
NOTHING: Any = Batch(*[torch.zeros(0)] * 5)


def planned(first: int, count: int) -> PlannedBatch:
    number = np.arange(first, first + count)
    return PlannedBatch(NOTHING, TokenTable(number // 4, number % 4, number, np.ones_like(number)))


def make_shard(
    path: Path, values: torch.Tensor, first: int = 0, gzip: bool = False, batch_rows: int = 7, site: str = SITE
) -> None:
    """A shard of these values, written in batches that do not end where chunks do."""
    starts = range(0, len(values), batch_rows)
    batches = [planned(first + start, min(batch_rows, len(values) - start)) for start in starts]
    with unfinished_shard(path, batches, {site: values.shape[1]}, values.dtype) as shard:
        for number, start in enumerate(starts):
            shard.write(number, {site: values[start : start + batch_rows]})
        shard.finish(gzip)


@pytest.mark.parametrize("gzip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, gzip: bool) -> None:
    values = torch.randn(50, 8).to(dtype)
    make_shard(tmp_path / "shard-00000.h5", values[:30], gzip=gzip)
    make_shard(tmp_path / "shard-00001.h5", values[30:], first=30, gzip=gzip)
    store = Store(tmp_path)
    assert store.sites == [SITE] and store.n_tokens == 50 and store.width(SITE) == 8
    blocks = store.blocks(20)
    assert blocks == [(0, 20), (20, 30), (30, 50)] and store.ranges(25, 40) == [(25, 30), (30, 40)]
    assert torch.equal(torch.cat([store.read(SITE, *block) for block in blocks]), values.float())
    assert store.tokens.token.tolist() == list(range(50))
    assert store.batch_starts.tolist() == [0, 7, 14, 21, 28, 30, 37, 44]
    store.verify(SITE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-00000.h5", "shard-00001.h5"]


@pytest.mark.parametrize("gzip", [False, True])
def test_many_chunks_of_about_a_mebibyte(tmp_path: Path, gzip: bool) -> None:
    values = torch.randn(1500, 512)
    make_shard(tmp_path / "shard-00000.h5", values, gzip=gzip, batch_rows=400)
    with h5py.File(tmp_path / "shard-00000.h5") as file:
        data: Any = file[f"activations/{SITE}"]
        assert data.chunks == (512, 512) and CHUNK_BYTES == 512 * 512 * 4
        assert data.compression == ("gzip" if gzip else None)
        assert torch.equal(torch.from_numpy(data[()]), values)
    Store(tmp_path).verify(SITE)


def test_the_table_of_prompts_comes_back_as_it_was(tmp_path: Path) -> None:
    texts = ["007", "NA", "", 'a "quoted"\r\nline, and\u2028more', "=1+1"]
    prompts = with_ids(pd.DataFrame({"prompt": texts, "split": "test"}, index=range(5, 10)))
    write_prompts(tmp_path, prompts)
    back = read_prompts(tmp_path)
    assert back.index.tolist() == [0, 1, 2, 3, 4] and back.index.name == "store_index"
    assert back.to_dict("list") == prompts.to_dict("list")


def test_missing_and_corrupt_stores_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no activations"):
        Store(tmp_path)
    make_shard(tmp_path / "shard-00000.h5", torch.randn(9, 2))
    with pytest.raises(UserError, match=r"no site 'blocks\.7"):
        Store(tmp_path).read("blocks.7.hook_resid_post", 0, 2)
    (tmp_path / "shard-00000.h5").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"shard-00000\.h5 is corrupt"):
        Store(tmp_path)


@pytest.mark.parametrize("missing", ["activations", "checksums", "batches", "tokens/role"])
def test_hdf5_that_is_no_shard_is_corrupt(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "shard-00001.h5"
    make_shard(tmp_path / "shard-00000.h5", torch.randn(9, 2))
    make_shard(path, torch.randn(9, 2))
    with h5py.File(path, "a") as file:
        del file[missing]
    with pytest.raises(UserError, match=r"shard-00001\.h5 is corrupt"):
        Store(tmp_path)


def _overwrite_chunk(path: Path, with_: bytes) -> None:
    with h5py.File(path) as file:
        data: Any = file[f"activations/{SITE}"]
        chunk = data.id.get_chunk_info(0)
    with path.open("r+b") as handle:
        os.pwrite(handle.fileno(), with_[: chunk.size], chunk.byte_offset)


def test_a_chunk_that_cannot_be_unpacked_is_told_when_it_is_read(tmp_path: Path) -> None:
    make_shard(tmp_path / "shard-00000.h5", torch.randn(500, 8), gzip=True)
    _overwrite_chunk(tmp_path / "shard-00000.h5", bytes(100))
    with pytest.raises(UserError, match="corrupt"):
        Store(tmp_path).read(SITE, 0, 500)


def test_a_flipped_bit_and_a_value_that_is_not_finite_are_found(tmp_path: Path) -> None:
    values = torch.randn(500, 8)
    make_shard(tmp_path / "shard-00000.h5", values)
    Store(tmp_path).verify(SITE)
    _overwrite_chunk(tmp_path / "shard-00000.h5", b"\x01")
    with pytest.raises(UserError, match=r"blocks\.0\.hook_resid_post, rows 0 to 499: the checksum is wrong"):
        Store(tmp_path).verify(SITE)
    values[3, 3] = torch.inf
    make_shard(tmp_path / "other" / "shard-00000.h5", values)
    with pytest.raises(UserError, match="not finite"):
        Store(tmp_path / "other").verify(SITE)


def test_an_incomplete_shard_is_no_part_of_a_store_and_goes_on(tmp_path: Path) -> None:
    values = torch.randn(20, 4)
    path = tmp_path / "shard-00000.h5"
    batches = [planned(0, 12), planned(12, 8)]
    with unfinished_shard(path, batches, {SITE: 4}, values.dtype) as shard:
        assert shard.done == set()
        shard.write(1, {SITE: values[12:]})
        shard.close()
    with path.with_suffix(".journal").open("ab") as journal:
        journal.write(b"0")  # a line that a kill cut short
    with pytest.raises(UserError, match="no activations"):
        Store(tmp_path)
    with unfinished_shard(path, batches, {SITE: 4}, values.dtype) as shard:
        assert shard.done == {1}
        shard.write(0, {SITE: values[:12]})
        shard.finish(gzip=False)
    assert torch.equal(Store(tmp_path).read(SITE, 0, 20), values)


@pytest.mark.parametrize("rows", [range(12), range(12, 20)])
def test_a_batch_that_is_damaged_before_its_shard_is_finished_is_run_again(tmp_path: Path, rows: range) -> None:
    values = torch.randn(20, 4)
    path = tmp_path / "shard-00000.h5"
    batches = [planned(0, 12), planned(12, 8)]
    with unfinished_shard(path, batches, {SITE: 4}, values.dtype) as shard:
        shard.write(0, {SITE: values[:12]})
        shard.write(1, {SITE: values[12:]})
        shard.close()
    partial = path.with_suffix(".partial")
    written = values[rows[0] : rows[-1] + 1].numpy().tobytes()
    data = bytearray(partial.read_bytes())
    data[data.index(written) + 5] ^= 1
    partial.write_bytes(data)
    with unfinished_shard(path, batches, {SITE: 4}, values.dtype) as shard:
        assert shard.done == {0, 1} - {int(rows[0] > 0)}
        shard.write(int(rows[0] > 0), {SITE: values[rows[0] : rows[-1] + 1]})
        shard.finish(gzip=False)
    assert torch.equal(Store(tmp_path).read(SITE, 0, 20), values)


def test_a_partial_shard_of_other_rows_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.h5"
    with unfinished_shard(path, [planned(0, 12)], {SITE: 4}, torch.float32) as shard:
        shard.close()
    with (
        pytest.raises(UserError, match="rows are not those of the prompts"),
        unfinished_shard(path, [planned(4, 12)], {SITE: 4}, torch.float32),
    ):
        pass


@pytest.mark.parametrize("damage", ["journal: not a number", "journal: no such batch", "partial"])
def test_a_damaged_unfinished_shard_is_told_with_what_to_do(tmp_path: Path, damage: str) -> None:
    path, values = tmp_path / "shard-00000.h5", torch.randn(12, 4)
    with unfinished_shard(path, [planned(0, 12)], {SITE: 4}, values.dtype) as shard:
        shard.close()
    damaged = path.with_suffix(".partial" if damage == "partial" else ".journal")
    damaged.write_bytes({"journal: not a number": b"\xff\n", "journal: no such batch": b"0 0\n1 0\n"}.get(damage, b""))
    with (
        pytest.raises(UserError, match=rf"{damaged.name} is .*delete it and run the same command$"),
        unfinished_shard(path, [planned(0, 12)], {SITE: 4}, values.dtype),
    ):
        pass
    damaged.unlink()
    with unfinished_shard(path, [planned(0, 12)], {SITE: 4}, values.dtype) as shard:
        shard.write(0, {SITE: values})
        shard.finish(gzip=False)
    assert torch.equal(Store(tmp_path).read(SITE, 0, 12), values)
