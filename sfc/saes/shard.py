"""One shard of a store: what its HDF5 file holds, and how it is written so that a kill costs one batch at most.

`shard-00000.h5` holds `activations/SITE` [rows, d] in chunks of about 1 MiB, the CRC-32 of every chunk in
`checksums/SITE`, row by row `tokens/prompt`, `tokens/position`, `tokens/token` and `tokens/role`, and in `batches` the
first row of each batch. bfloat16, which HDF5 does not have, is kept as uint16 with the attribute `dtype`. Rows are
compared with their checksums when they are read, and everything else with the digest in the store's manifest.

An unfinished shard is `shard-00000.partial`. Everything but the activations and their checksums is in it from the
start, with a place in the file for every chunk. Batches are written to those places without HDF5, whose own tables,
which a kill would tear, never change again. `shard-00000.journal` lists the batches that are on the disk. When all are,
the checksums are filled in and the file gets its name.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from sfc.core.contents import check, read_bytes
from sfc.core.errors import UserError, first_problem
from sfc.core.files import open_in_place, open_journal, replacing, writing
from sfc.saes.plan import PlannedBatch, TokenTable, joined

CHUNK_BYTES = 1 << 20
_REBUILD = "run `sfc collect --rebuild`"
_NUMBERS = TypeAdapter(set[NonNegativeInt])
_DELETE = "delete it and run the same command"


class UnfinishedShard:
    """A partial shard, open for the batches that it still lacks."""

    def __init__(self, path: Path) -> None:
        """Open the partial file of `path` (the finished shard's)."""
        self.path = path
        with _opened(_partial(path), _DELETE) as file:
            self._starts = np.asarray(file["batches"])
            self._places = {site: _Place.of(file, site) for site in _sites(file)}
        self._journal = open_journal(_journal(path))
        self.done = _journalled(path, len(self._starts))
        """numbers, within the shard, of the batches that are on the disk"""
        self._rows = open_in_place(_partial(path))
        self._file = self._rows.fileno()

    def write(self, number: int, activations: Mapping[str, Tensor]) -> None:
        """Put one batch, [rows, d] per site in the dtype of the store, on the disk."""
        for site, values in activations.items():
            self._places[site].write(self._file, int(self._starts[number]), _bytes(values))
        os.fsync(self._file)
        self._journal.write(f"{number}\n".encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def finish(self, gzip: bool) -> None:
        """Fill in the checksums and give the file its name; every batch must have been written."""
        for place in self._places.values():
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
        if not _has_partial(path, widths):
            _start(path, batches, widths, dtype)
        shard = UnfinishedShard(path)
        try:
            yield shard
        except BaseException:
            shard.close()
            raise


def open_shard(path: Path) -> h5py.File:
    """Open a finished shard for reading.

    Raises:
        UserError: it is not HDF5, or parts of it are missing.
    """
    return _opened(path, _REBUILD)


def _opened(path: Path, remedy: str) -> h5py.File:
    check(path)
    try:
        file = h5py.File(path, "r")
        wanted = {"activations", "checksums", "batches", *(f"tokens/{name}" for name in TokenTable._fields)}
        if not wanted <= _names(file):
            raise OSError("parts of it are missing")
        for name in wanted - {"activations", "checksums"}:
            if np.asarray(file[name]).ndim != 1:
                raise OSError(f"{name} is no table")
        for site in _sites(file):
            _check_shapes(file, site)
        return file
    except _HDF5_ERRORS as error:
        raise UserError(f"{path} is corrupt or not a shard ({_in_one_line(error)}); {remedy}") from None


_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, UnicodeDecodeError)
"""what h5py raises where a file is not as HDF5 has it"""


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_shapes(file: h5py.File, site: str) -> None:
    data: Any = file[f"activations/{site}"]
    checksums: Any = file[f"checksums/{site}"]
    n_rows = len(file["tokens/prompt"])  # pyright: ignore[reportArgumentType]
    if data.ndim != 2 or len(data) != n_rows or data.chunks is None or data.chunks[1] != data.shape[1]:
        raise OSError(f"{site} has not a row for each token")
    if checksums.shape != (-(-n_rows // data.chunks[0]),):
        raise OSError(f"{site} has not a checksum for each chunk")
    if data.attrs["dtype"] not in ("float16", "float32", "bfloat16"):
        raise OSError(f"{site} has values of no known type")


def shard_digest(file: h5py.File) -> str:
    """SHA-256 of all that a shard says, in hexadecimal; of the activations by their checksums."""
    digest = hashlib.sha256()
    for name in sorted(_names(file)):
        data: Any = file[name]
        if not isinstance(data, h5py.Dataset):
            continue
        is_rows = name.startswith("activations/")
        told = (name, data.shape, data.dtype.str, *((data.chunks, str(data.attrs["dtype"])) if is_rows else ()))
        digest.update(repr(told).encode())
        if not is_rows:
            digest.update(np.ascontiguousarray(data[()]).data)
    return digest.hexdigest()


def read_rows(file: h5py.File, site: str, start: int, stop: int, verified: set[int]) -> Float[Tensor, "rows d"]:
    """Rows of a site, in the dtype they are stored in.

    Args:
        verified: numbers of the chunks that were compared with their checksums already; those that are now are added.

    Raises:
        UserError: the shard is corrupt.
    """
    data: Any = file[f"activations/{site}"]
    size = data.chunks[0]
    chunks = range(start // size, -(-stop // size))
    if verified.issuperset(chunks):
        return _as_stored(file, site, start, stop)
    first = chunks.start * size
    values = _as_stored(file, site, first, min(chunks.stop * size, len(data)))
    checksums = np.asarray(file[f"checksums/{site}"])
    for chunk in chunks:
        rows = values[chunk * size - first : (chunk + 1) * size - first]
        if zlib.crc32(_bytes(rows)) != checksums[chunk]:
            where = f"{file.filename}: {site}, rows {chunk * size} to {chunk * size + len(rows) - 1}"
            raise UserError(f"{where}: the checksum is wrong; {_REBUILD}")
        verified.add(chunk)
    return values[start - first : stop - first]


def _as_stored(file: h5py.File, site: str, start: int, stop: int) -> Float[Tensor, "rows d"]:
    data: Any = file[f"activations/{site}"]
    try:
        values = torch.from_numpy(data[start:stop])
    except _HDF5_ERRORS as error:
        raise UserError(f"{file.filename} is corrupt ({_in_one_line(error)}); {_REBUILD}") from None
    return values.view(torch.bfloat16) if data.attrs["dtype"] == "bfloat16" else values


def verify_shard(file: h5py.File, site: str) -> None:
    """Read every chunk of a site, and compare it with its checksum.

    Raises:
        UserError: a chunk is damaged, or holds values that are not finite.
    """
    data: Any = file[f"activations/{site}"]
    for start in range(0, len(data), data.chunks[0]):
        values = read_rows(file, site, start, min(start + data.chunks[0], len(data)), set())
        if not values.isfinite().all():
            where = f"{file.filename}: {site}, rows {start} to {start + len(values) - 1}"
            raise UserError(f"{where}: values that are not finite; {_REBUILD}")


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
        written, n_rows = 0, len(rows) // self.row_bytes
        while written < n_rows:
            chunk, within = divmod(first_row + written, self.chunk_rows)
            n = min(self.chunk_rows - within, n_rows - written)
            part = rows[written * self.row_bytes : (written + n) * self.row_bytes]
            _write_all(file, part, self.offsets[chunk] + within * self.row_bytes)
            written += n

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


def _start(path: Path, batches: Sequence[PlannedBatch], widths: Mapping[str, int], dtype: torch.dtype) -> None:
    """Make the partial file, of its full size on the disk and with room for every chunk, and no journal."""
    _journal(path).unlink(missing_ok=True)
    n_rows = [batch.n_rows for batch in batches]
    with replacing(_partial(path)) as temporary:
        with h5py.File(temporary, "w") as file:
            file.create_dataset("batches", data=np.cumsum([0, *n_rows])[:-1])
            for name, column in joined([batch.tokens for batch in batches])._asdict().items():
                file.create_dataset(f"tokens/{name}", data=column.astype(np.int32))
            for site, width in widths.items():
                _make_room(file, site, sum(n_rows), width, dtype)
            if path.exists():
                _copy_sites(path, file)
        with temporary.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, temporary.stat().st_size)


def _make_room(file: h5py.File, site: str, n_rows: int, width: int, dtype: torch.dtype) -> None:
    stored = np.dtype("uint16") if dtype == torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))
    chunk_rows = min(max(CHUNK_BYTES // (width * stored.itemsize), 1), n_rows)
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
        for site in _sites(file):
            verify_shard(file, site)
            _copy_chunks(file[f"activations/{site}"], into[f"activations/{site}"])


def _compress(partial: Path, path: Path) -> None:
    with replacing(path) as temporary, h5py.File(partial, "r") as source, h5py.File(temporary, "w") as target:
        for name in sorted(_names(source)):
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


def _has_partial(path: Path, widths: Mapping[str, int]) -> bool:
    """Whether there is a partial file of exactly these sites."""
    if not _partial(path).exists():
        return False
    with _opened(_partial(path), _DELETE) as file:
        return set(_sites(file)) == set(widths)


def _journalled(path: Path, n_batches: int) -> set[int]:
    """The batches that the journal lists."""
    journal = _journal(path)
    lines = read_bytes(journal).split(b"\n")[:-1]
    try:
        done = _NUMBERS.validate_python([line.decode(errors="replace") for line in lines])
    except ValidationError as error:
        raise UserError(f"{journal} is damaged ({first_problem(error)}); {_DELETE}") from None
    if max(done, default=0) >= n_batches:
        raise UserError(f"{journal} is damaged (there is no batch {max(done)}); {_DELETE}")
    return done


def _sites(file: h5py.File) -> list[str]:
    group: Any = file["activations"]
    return list(group)


def _names(file: h5py.File) -> set[str]:
    names: list[str] = []
    file.visit(names.append)
    return set(names)


def _bytes(values: Tensor) -> memoryview:
    array: Any = values.contiguous().view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _journal(path: Path) -> Path:
    return path.with_suffix(".journal")
