"""Pairs of prompts that differ in a few words: one to be declined, one harmless."""

from pathlib import Path

import pandas as pd

from sfc.artifacts import hash_of_file
from sfc.config import PromptsConfig
from sfc.errors import UserError
from sfc.prompts.schema import canonical_category
from sfc.prompts.split import add_splits
from sfc.prompts.table import read_table

PAIRS_FILE = "pairs.csv"


def load_pairs(folder: Path, category: str, config: PromptsConfig, seed: int) -> pd.DataFrame:
    """The pairs of one category from `pairs.csv`, with columns `toxic`, `safe` and `split`.

    Pairs bring their own references, so that they are split in two: discovery and test, in their configured ratio.

    Raises:
        UserError: the file is missing or malformed, or has fewer than two pairs of the category.
    """
    path = folder / PAIRS_FILE
    pairs = _read(path)
    pairs = pairs[pairs["category"].map(canonical_category) == category]
    if len(pairs) < 2:
        raise UserError(f"{path} has {len(pairs)} pairs of category {category!r}: discovery and test need one each")
    share = config.discovery / (config.discovery + config.test)
    shares = config.model_copy(update={"discovery": share, "reference": 0.0, "test": 1 - share})
    split = add_splits(pairs.assign(prompt=pairs["toxic"], dataset_type="pair"), shares, seed)
    return split[["toxic", "safe", "split"]].reset_index(drop=True)


def pairs_fingerprint(folder: Path) -> str:
    """SHA-256 of the file of pairs.

    Raises:
        UserError: it is missing or malformed.
    """
    _read(folder / PAIRS_FILE)
    return hash_of_file(folder / PAIRS_FILE)


def _read(path: Path) -> pd.DataFrame:
    return read_table(path, ("category", "toxic", "safe"))
