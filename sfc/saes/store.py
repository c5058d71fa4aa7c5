"""A finished store of activations, open for reading, and the table of its prompts."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from pydantic import BaseModel
from torch import Tensor

from sfc.core.artifacts import MANIFEST, Artifact, read_model, write_csv
from sfc.core.errors import UserError
from sfc.core.sites import in_order
from sfc.saes.plan import TokenTable, joined
from sfc.saes.shard import open_shard, read_rows, verify_shard

_PROMPTS_FILE = "prompts.csv"


def write_prompts(folder: Path, prompts: pd.DataFrame) -> None:
    """Write the table of a store's prompts: columns `store_index` (the number that rows of activations have), `id`,
    `prompt`, `split`, and what else is known of them."""
    write_csv(folder / _PROMPTS_FILE, prompts.reset_index(drop=True).reset_index(names="store_index"))


def read_prompts(folder: Path) -> pd.DataFrame:
    """The table of a store's prompts; `store_index` is its index."""
    texts = {"id": str, "prompt": str}
    return pd.read_csv(folder / _PROMPTS_FILE, index_col="store_index", keep_default_na=False, dtype=texts)


def stored_sites(artifact: Artifact) -> list[str]:
    """The sites that a store has, in the order in which they were collected; none where it is not complete.

    Raises:
        UserError: its manifest is damaged.
    """
    return read_model(artifact.folder / MANIFEST, _Manifest).sites if artifact.is_complete() else []


class _Manifest(BaseModel):
    sites: list[str]


class Store:
    """The shards of a folder, as one table of rows."""

    def __init__(self, folder: Path) -> None:
        """Open every shard.

        Raises:
            UserError: there are no shards, or one is corrupt.
        """
        self.folder = folder
        paths = sorted(folder.glob("shard-*.h5"))
        if not paths:
            raise UserError(f"{folder} holds no activations: run `sfc collect`")
        self._files = [open_shard(path) for path in paths]
        self.tokens = joined([_tokens(file) for file in self._files])
        self._starts = np.cumsum([0, *(_n_rows(file) for file in self._files)])
        in_all = set.intersection(*(set(file["activations"]) for file in self._files))  # pyright: ignore
        self.sites = in_order(list(in_all))
        """sites that every shard has"""

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
        return [block for shard in self.ranges(0, self.n_tokens) for block in _pieces(*shard, block_rows)]

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
        return read_rows(self._checked(site, shard), site, start - offset, stop - offset).float()

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


def _pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


def _n_rows(file: Any) -> int:
    return len(file["tokens/prompt"])


def _tokens(file: Any) -> TokenTable:
    return TokenTable(*(np.asarray(file[f"tokens/{name}"]) for name in TokenTable._fields))
