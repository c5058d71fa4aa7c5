"""One shard of a store: what its HDF5 file holds, and how it is read.

`shard-00000.h5` holds `activations/SITE` [rows, d] in chunks of about 1 MiB, the CRC-32 of every chunk in
`checksums/SITE`, row by row `tokens/prompt`, `tokens/position`, `tokens/token` and `tokens/role`, and in `batches` the
first row of each batch. bfloat16, which HDF5 does not have, is kept as uint16 with the attribute `dtype`. Rows are
compared with their checksums when they are read, and everything else with the digest in the store's manifest. How a
shard is written is in `sfc.saes.unfinished`.
"""

import hashlib
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.core.contents import check
from sfc.core.errors import UserError, one_line
from sfc.saes.plan import TokenTable

_REBUILD = "run `sfc collect --rebuild`"


def open_shard(path: Path) -> h5py.File:
    """Open a finished shard for reading.

    Raises:
        UserError: it is not HDF5, or parts of it are missing.
    """
    return opened_shard(path, _REBUILD)


def finished_sites(path: Path) -> list[str]:
    """The sites of a finished shard; none where there is no such file.

    Raises:
        UserError: as `open_shard`.
    """
    if not path.exists():
        return []
    with open_shard(path) as file:
        return sites_of(file)


def opened_shard(path: Path, remedy: str) -> h5py.File:
    """Open a shard, finished or not, for reading.

    Raises:
        UserError: it is not HDF5, or parts of it are missing; then the remedy is given.
    """
    check(path)
    try:
        file = h5py.File(path, "r")
        wanted = {"activations", "checksums", "batches", *(f"tokens/{name}" for name in TokenTable._fields)}
        if not wanted <= names_of(file):
            raise OSError("parts of it are missing")
        for name in wanted - {"activations", "checksums"}:
            if np.asarray(file[name]).ndim != 1:
                raise OSError(f"{name} is no table")
        for site in sites_of(file):
            _check_shapes(file, site)
        return file
    except _HDF5_ERRORS as error:
        raise UserError(f"{path} is corrupt or not a shard ({one_line(error)}); {remedy}") from None


_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, UnicodeDecodeError)
"""what h5py raises where a file is not as HDF5 has it"""


def _check_shapes(file: h5py.File, site: str) -> None:
    data: Any = file[f"activations/{site}"]
    checksums: Any = file[f"checksums/{site}"]
    n_rows = len(token_column(file, "prompt"))
    if data.ndim != 2 or len(data) != n_rows or data.chunks is None or data.chunks[1] != data.shape[1]:
        raise OSError(f"{site} has not a row for each token")
    if checksums.shape != (-(-n_rows // data.chunks[0]),):
        raise OSError(f"{site} has not a checksum for each chunk")
    if data.attrs["dtype"] not in ("float16", "float32", "bfloat16"):
        raise OSError(f"{site} has values of no known type")


def shard_digest(file: h5py.File) -> str:
    """SHA-256 of all that a shard says, in hexadecimal; of the activations by their checksums."""
    digest = hashlib.sha256()
    for name in sorted(names_of(file)):
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
        if zlib.crc32(as_bytes(rows)) != checksums[chunk]:
            where = f"{file.filename}: {site}, rows {chunk * size} to {chunk * size + len(rows) - 1}"
            raise UserError(f"{where}: the checksum is wrong; {_REBUILD}")
        verified.add(chunk)
    return values[start - first : stop - first]


def _as_stored(file: h5py.File, site: str, start: int, stop: int) -> Float[Tensor, "rows d"]:
    data: Any = file[f"activations/{site}"]
    try:
        values = torch.from_numpy(data[start:stop])
    except _HDF5_ERRORS as error:
        raise UserError(f"{file.filename} is corrupt ({one_line(error)}); {_REBUILD}") from None
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


def token_column(file: h5py.File, name: str) -> np.ndarray:
    """One column of the table that says what the rows are."""
    return np.asarray(file[f"tokens/{name}"])


def sites_of(file: h5py.File) -> list[str]:
    """The sites of a shard."""
    group: Any = file["activations"]
    return list(group)


def names_of(file: h5py.File) -> set[str]:
    """All groups and data sets of a file."""
    names: list[str] = []
    file.visit(names.append)
    return set(names)


def as_bytes(values: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in order."""
    array: Any = values.contiguous().view(torch.uint8).numpy()
    return memoryview(array).cast("B")
