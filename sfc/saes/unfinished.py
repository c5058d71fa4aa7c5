"""Shards as they are written, so that a kill costs one batch at most.

An unfinished shard is `shard-00000.partial`. Everything but the activations and their checksums is in it from the
start, with a place in the file for every chunk. Batches are written to those places without HDF5, whose own tables,
which a kill would tear, never change again. `shard-00000.journal` lists the batches that are on the disk, each with the
CRC-32 of its rows, so that one that is damaged before the shard is finished is run again. When all are there, the
checksums are filled in and the file gets its name.
"""

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from sfc.core.contents import read_bytes
from sfc.core.errors import UserError, first_problem
from sfc.core.files import open_in_place, open_journal, replacing, writing
from sfc.core.progress import say
from sfc.saes.plan import PlannedBatch, TokenTable, joined
from sfc.saes.shard import (
    as_bytes,
    finished_sites,
    names_of,
    open_shard,
    opened_shard,
    sites_of,
    token_column,
    verify_shard,
)

CHUNK_BYTES = 1 << 20
_JOURNAL = TypeAdapter(list[tuple[NonNegativeInt, NonNegativeInt]])
_DELETE = "delete it and run the same command"
_TABLES_BYTES = 1 << 12
"""about as much of HDF5's own tables comes with each site, and four times as much with the file"""


class UnfinishedShard:
    """A partial shard, open for the batches that it still lacks."""

    def __init__(self, path: Path) -> None:
        """Open the partial file of `path` (the finished shard's)."""
        self.path = path
        with opened_shard(_partial(path), _DELETE) as file:
            self._starts = np.append(np.asarray(file["batches"]), len(token_column(file, "prompt")))
            copied = finished_sites(path)
            self._new = {site: _Place.of(file, site) for site in sites_of(file) if site not in copied}
        self._rows = open_in_place(_partial(path))
        self._file = self._rows.fileno()
        self._journal = open_journal(_journal(path))
        journalled = _journalled(path, len(self._starts) - 1)
        self.done = {number for number, crc in journalled.items() if self._crc(number) == crc}
        """numbers, within the shard, of the batches that are on the disk"""
        if damaged := len(journalled) - len(self.done):
            say(f"{_partial(path)}: {damaged} of {len(journalled)} batches are not what was written, and run again")

    def write(self, number: int, activations: Mapping[str, Tensor]) -> None:
        """Put one batch, [rows, d] for each site that is new, in the dtype of the store, on the disk."""
        rows = {site: as_bytes(activations[site]) for site in self._new}
        for site, place in self._new.items():
            place.write(self._file, int(self._starts[number]), rows[site])
        os.fsync(self._file)
        self._journal.write(f"{number} {_crc_of(rows.values())}\n".encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _crc(self, number: int) -> int:
        """The CRC-32 of a batch's rows as they are on the disk."""
        first, end = self._starts[number : number + 2].tolist()
        return _crc_of(part for place in self._new.values() for part in place.read(self._file, first, end))

    def finish(self, gzip: bool) -> None:
        """Fill in the checksums and give the file its name; every batch must have been written."""
        for place in self._new.values():
            place.write_checksums(self._file)
        os.fsync(self._file)
        self.close()
        if gzip:
            _compress(_partial(self.path), self.path)
        else:
            _partial(self.path).replace(self.path)
        discard_unfinished(self.path)

    def close(self) -> None:
        """Close the files; what was written stays."""
        self._rows.close()
        self._journal.close()


def discard_unfinished(path: Path) -> None:
    """Delete what is left of the unfinished shard of a finished one, the journal last: alone it means nothing."""
    _partial(path).unlink(missing_ok=True)
    _journal(path).unlink(missing_ok=True)


@contextmanager
def unfinished_shard(
    path: Path, batches: Sequence[PlannedBatch], widths: Mapping[str, int], dtype: torch.dtype
) -> Iterator[UnfinishedShard]:
    """Go on with the partial shard of `path`, or start it; sites that a finished `path` has are copied from it.

    Args:
        widths: dimensions of each site that the finished shard is to have.

    Raises:
        UserError: the disk is full, or the partial shard or its journal is damaged.
    """
    with writing(path):
        tokens = joined([batch.tokens for batch in batches])
        if not _has_partial(path, widths, tokens):
            _start(path, batches, tokens, widths, dtype)
        shard = UnfinishedShard(path)
        try:
            yield shard
        except BaseException:
            shard.close()
            raise


@dataclass(frozen=True)
class _Place:
    """Where the chunks of one site and their checksums are in a partial file, in bytes from its start."""

    offsets: list[int]
    checksums: int
    chunk_rows: int
    row_bytes: int
    n_rows: int

    @classmethod
    def of(cls, file: h5py.File, site: str) -> "_Place":
        data: Any = file[f"activations/{site}"]
        checksums: Any = file[f"checksums/{site}"]
        chunks = [data.id.get_chunk_info(i) for i in range(data.id.get_num_chunks())]
        offsets = [chunk.byte_offset for chunk in sorted(chunks, key=lambda chunk: chunk.chunk_offset)]
        row_bytes = data.shape[1] * data.dtype.itemsize
        return cls(offsets, checksums.id.get_offset(), data.chunks[0], row_bytes, data.shape[0])

    def write(self, file: int, first_row: int, rows: memoryview) -> None:
        for offset, size in self._pieces(first_row, first_row + len(rows) // self.row_bytes):
            _write_all(file, rows[:size], offset)
            rows = rows[size:]

    def read(self, file: int, first_row: int, end: int) -> Iterator[bytes]:
        return (os.pread(file, size, offset) for offset, size in self._pieces(first_row, end))

    def _pieces(self, first_row: int, end: int) -> Iterator[tuple[int, int]]:
        """Where these rows are: in each chunk that has some of them, from which byte, and how many bytes."""
        while first_row < end:
            chunk, within = divmod(first_row, self.chunk_rows)
            n = min(self.chunk_rows - within, end - first_row)
            yield self.offsets[chunk] + within * self.row_bytes, n * self.row_bytes
            first_row += n

    def write_checksums(self, file: int) -> None:
        """Read what was written back, and note the CRC-32 of each chunk (of its rows, where the last is not full)."""
        checksums = np.zeros(len(self.offsets), np.uint32)
        for chunk, offset in enumerate(self.offsets):
            n_rows = min(self.chunk_rows, self.n_rows - chunk * self.chunk_rows)
            checksums[chunk] = zlib.crc32(os.pread(file, n_rows * self.row_bytes, offset))
        _write_all(file, memoryview(checksums.tobytes()), self.checksums)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _start(
    path: Path, batches: Sequence[PlannedBatch], tokens: TokenTable, widths: Mapping[str, int], dtype: torch.dtype
) -> None:
    """Make the partial file, of its full size on the disk and with room for every chunk, and no journal."""
    _journal(path).unlink(missing_ok=True)
    n_rows = [batch.n_rows for batch in batches]
    with replacing(_partial(path)) as temporary:
        # What the disk or a limit refuses must be refused before HDF5 writes, which cannot close a file that is cut.
        with temporary.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, bytes_of_shard(sum(n_rows), widths, dtype))
        with h5py.File(temporary, "w") as file:
            file.create_dataset("batches", data=np.cumsum([0, *n_rows])[:-1])
            for name, column in tokens._asdict().items():
                file.create_dataset(f"tokens/{name}", data=column.astype(np.int32))
            for site, width in widths.items():
                _make_room(file, site, sum(n_rows), width, dtype)
            if path.exists():
                _copy_sites(path, file)
        with temporary.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, temporary.stat().st_size)


def bytes_of_shard(n_rows: int, widths: Mapping[str, int], dtype: torch.dtype) -> int:
    """Bytes that a shard takes at most: its rows, what they are, and HDF5's own tables."""
    chunks = [_chunk_rows(n_rows, width * dtype.itemsize) for width in widths.values()]
    rows = [-(-n_rows // chunk) * chunk for chunk in chunks]
    of_sites = sum(n * width for n, width in zip(rows, widths.values(), strict=True)) * dtype.itemsize
    return of_sites + 4 * n_rows * len(TokenTable._fields) + (4 + len(widths)) * _TABLES_BYTES


def _chunk_rows(n_rows: int, row_bytes: int) -> int:
    return min(max(CHUNK_BYTES // row_bytes, 1), n_rows)


def _make_room(file: h5py.File, site: str, n_rows: int, width: int, dtype: torch.dtype) -> None:
    stored = np.dtype("uint16") if dtype == torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))
    chunk_rows = _chunk_rows(n_rows, width * stored.itemsize)
    data = file.create_dataset(
        f"activations/{site}", (n_rows, width), stored, chunks=(chunk_rows, width), dcpl=_allocated_at_once()
    )
    data.attrs["dtype"] = str(dtype).removeprefix("torch.")
    n_chunks = -(-n_rows // chunk_rows)
    file.create_dataset(f"checksums/{site}", (n_chunks,), "uint32", dcpl=_allocated_at_once())


def _allocated_at_once() -> Any:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    return properties


def _copy_sites(finished: Path, into: h5py.File) -> None:
    with open_shard(finished) as file:
        for site in sites_of(file):
            verify_shard(file, site)
            _copy_chunks(file[f"activations/{site}"], into[f"activations/{site}"])
            into[f"checksums/{site}"][...] = file[f"checksums/{site}"][()]  # pyright: ignore


def _compress(partial: Path, path: Path) -> None:
    with replacing(path) as temporary, h5py.File(partial, "r") as source, h5py.File(temporary, "w") as target:
        for name in sorted(names_of(source)):
            data: Any = source[name]
            if not isinstance(data, h5py.Dataset):
                continue
            if not name.startswith("activations/"):
                target.create_dataset(name, data=data[()])
                continue
            copy = target.create_dataset(name, data.shape, data.dtype, chunks=data.chunks, compression="gzip")
            copy.attrs["dtype"] = data.attrs["dtype"]
            _copy_chunks(data, copy)


def _copy_chunks(source: Any, target: Any) -> None:
    for start in range(0, len(source), source.chunks[0]):
        target[start : start + source.chunks[0]] = source[start : start + source.chunks[0]]


def _has_partial(path: Path, widths: Mapping[str, int], tokens: TokenTable) -> bool:
    """Whether there is a partial file of exactly these sites and rows."""
    if not _partial(path).exists():
        return False
    with opened_shard(_partial(path), _DELETE) as file:
        if not all(np.array_equal(token_column(file, name), column) for name, column in tokens._asdict().items()):
            raise UserError(f"{_partial(path)} is damaged (its rows are not those of the prompts); {_DELETE}")
        return set(sites_of(file)) == set(widths)


def _journalled(path: Path, n_batches: int) -> dict[int, int]:
    """The batches that the journal lists, each with the CRC-32 of its rows."""
    journal = _journal(path)
    lines = read_bytes(journal).split(b"\n")[:-1]
    try:
        told = dict(_JOURNAL.validate_python([line.decode(errors="replace").split(" ") for line in lines]))
    except ValidationError as error:
        raise UserError(f"{journal} is damaged ({first_problem(error)}); {_DELETE}") from None
    if max(told, default=0) >= n_batches:
        raise UserError(f"{journal} is damaged (there is no batch {max(told)}); {_DELETE}")
    return told


def _crc_of(parts: Iterable[bytes | memoryview]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _journal(path: Path) -> Path:
    return path.with_suffix(".journal")
