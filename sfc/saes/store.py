"""A finished store of activations, open for reading, and the table of its prompts."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from pydantic import BaseModel
from torch import Tensor

from sfc.core.artifacts import BEFORE, MANIFEST, Artifact, read_csv, read_model, write_csv
from sfc.core.contents import check_sizes, digests_of, remedy
from sfc.core.errors import UserError
from sfc.core.sites import in_order
from sfc.saes.plan import TokenTable, joined
from sfc.saes.shard import open_shard, read_rows, shard_digest, verify_shard

_PROMPTS_FILE, _SHARDS = "prompts.csv", "shard-*.h5"


def write_prompts(folder: Path, prompts: pd.DataFrame) -> None:
    """Write the table of a store's prompts: columns `store_index` (the number that rows of activations have), `id`,
    `prompt`, `split`, and what else is known of them."""
    write_csv(folder / _PROMPTS_FILE, prompts.reset_index(drop=True).reset_index(names="store_index"))


def read_prompts(folder: Path) -> pd.DataFrame:
    """The table of a store's prompts; `store_index` is its index.

    Raises:
        UserError: it is missing or damaged.
    """
    texts, wanted = {"id": str, "prompt": str}, ["store_index", "id", "prompt", "split"]
    table = read_csv(folder / _PROMPTS_FILE, wanted, keep_default_na=False, dtype=texts)
    return table.set_index("store_index")


def stored_sites(artifact: Artifact) -> list[str]:
    """The sites that a store has, in the order in which they were collected; none where it is not complete.

    Raises:
        UserError: its manifest is damaged.
    """
    return read_model(artifact.folder / MANIFEST, _Manifest).sites if artifact.is_complete() else []


def sites_before(folder: Path) -> list[str]:
    """The sites that a store had when more were begun to be added to it; none where it is a new one.

    Raises:
        UserError: what says so is damaged.
    """
    return read_model(folder / BEFORE, _Manifest).sites if (folder / BEFORE).is_file() else []


def shard_digests(folder: Path) -> dict[str, str]:
    """The digest of every shard of a folder, for the manifest (see `sfc.core.contents`).

    Raises:
        UserError: one is corrupt.
    """
    digests = {}
    for path in sorted(folder.glob(_SHARDS)):
        with open_shard(path) as file:
            digests[path.name] = shard_digest(file)
    return digests


class _Manifest(BaseModel):
    sites: list[str]


class Store:
    """The shards of a folder, as one table of rows."""

    def __init__(self, folder: Path) -> None:
        """Open every shard.

        Raises:
            UserError: there are no shards, or one is missing or corrupt.
        """
        self.folder = folder
        check_sizes(folder)
        paths = sorted(folder.glob(_SHARDS))
        if not paths:
            raise UserError(f"{folder} holds no activations: run `sfc collect`")
        self._files = [open_shard(path) for path in paths]
        _check_digests(folder, self._files)
        self.tokens = joined([_tokens(file) for file in self._files])
        self._starts = np.cumsum([0, *(len(file["tokens/prompt"]) for file in self._files)])  # pyright: ignore
        in_all = set.intersection(*(set(file["activations"]) for file in self._files))  # pyright: ignore
        self.sites = in_order(list(in_all))
        """sites that every shard has"""
        self._verified: dict[tuple[int, str], set[int]] = defaultdict(set)
        """of each shard and site, the chunks that were compared with their checksums"""

    @property
    def n_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def batch_starts(self) -> Int[np.ndarray, " batches"]:
        """The first row of each batch that was run."""
        return np.concatenate([np.asarray(f["batches"]) + s for f, s in zip(self._files, self._starts, strict=False)])

    def width(self, site: str) -> int:
        """Dimensions of the activations at a site."""
        return self._checked(site, 0)[f"activations/{site}"].shape[1]

    def blocks(self, block_rows: int) -> list[tuple[int, int]]:
        """Row ranges that cover the store, none across two shards, each of at most `block_rows` rows."""
        return [
            (first, min(first + block_rows, stop))
            for start, stop in self.ranges(0, self.n_tokens)
            for first in range(start, stop, block_rows)
        ]

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows `start` to `stop` as ranges none of which goes across two shards."""
        inside = [int(border) for border in self._starts if start < border < stop]
        return list(pairwise([start, *inside, stop]))

    def read(self, site: str, start: int, stop: int) -> Float[Tensor, "rows d"]:
        """Rows `start` to `stop` (within one shard) of a site, in float32.

        Raises:
            UserError: the site is not in the store, or the shard is corrupt.
        """
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset = int(self._starts[shard])
        file, verified = self._checked(site, shard), self._verified[shard, site]
        return read_rows(file, site, start - offset, stop - offset, verified).float()

    def verify(self, site: str) -> None:
        """Compare every chunk of a site with its checksum.

        Raises:
            UserError: a chunk is damaged, or holds values that are not finite.
        """
        for shard in range(len(self._files)):
            verify_shard(self._checked(site, shard), site)

    def _checked(self, site: str, shard: int) -> Any:
        if site not in self.sites:
            raise UserError(f"{self.folder} has no site {site!r}: it has {', '.join(self.sites)}")
        return self._files[shard]


def _check_digests(folder: Path, files: Sequence[Any]) -> None:
    """Compare all but the rows, which are compared when they are read, with what the manifest says of the shards."""
    expected = digests_of(folder) if (folder / MANIFEST).is_file() else None
    if expected is None:
        return
    for file in files:
        path = Path(file.filename)
        if expected.get(path.name) != shard_digest(file):
            raise UserError(f"{path} is damaged (it is not what was written); {remedy(path)}")


def _tokens(file: Any) -> TokenTable:
    return TokenTable(*(np.asarray(file[f"tokens/{name}"]) for name in TokenTable._fields))
