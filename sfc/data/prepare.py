"""The prompts of an experiment: loaded, limited, and split into discovery, reference and test.

Prompts are split, never tokens or pairs, and within each category and kind, so that the three splits are alike.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.core.config import PromptsConfig
from sfc.data.or_bench import CleaningReport, load_prompts
from sfc.data.schema import keyed_ranks

_STRATUM = ["category", "dataset_type"]


class Prepared(NamedTuple):
    """Clean prompts with their splits, and what cleaning did."""

    frame: pd.DataFrame
    report: CleaningReport


def prepare_prompts(folder: Path, config: PromptsConfig, seed: int) -> Prepared:
    """Load a folder, keep at most `config.limit` prompts per category and kind, and split what is left.

    Raises:
        UserError: the folder or a file in it is missing or malformed.
    """
    frame, report = load_prompts(folder)
    if config.limit is not None:
        frame = frame[keyed_ranks(frame, _STRATUM, f"limit {seed}") < config.limit].reset_index(drop=True)
    return Prepared(add_splits(frame, config, seed), report)


def add_splits(frame: pd.DataFrame, config: PromptsConfig, seed: int) -> pd.DataFrame:
    """The same rows with a column `split`: `discovery`, `reference` or `test` in the configured shares.

    Which split a prompt falls into depends on the seed and on which prompts its stratum holds, not on their order.
    A stratum is cut at rounded multiples of its size; one of three prompts or more leaves no split empty (unless its
    share is zero), a smaller one fills discovery first and then test.
    """
    sizes = frame.groupby(_STRATUM)["prompt"].transform("size")
    places = keyed_ranks(frame, _STRATUM, f"split {seed}")
    reserved = 1 if config.reference > 0 else 0
    discovery = _rounded(sizes * config.discovery).clip(upper=sizes - 1 - reserved).clip(lower=1)
    before_test = _rounded(sizes * (config.discovery + config.reference)).clip(lower=discovery + reserved)
    before_test = before_test.clip(upper=(sizes - 1).clip(lower=discovery))
    split = pd.Series("discovery", index=frame.index)
    return frame.assign(split=split.mask(places >= discovery, "reference").mask(places >= before_test, "test"))


def _rounded(numbers: pd.Series) -> pd.Series:
    # Halves round up, in favour of discovery; the small term keeps 0.1 + 0.2 and the like from spoiling a half.
    return np.floor(numbers + 0.5 + 1e-9)


def add_two_splits(frame: pd.DataFrame, config: PromptsConfig, seed: int) -> pd.DataFrame:
    """Like `add_splits`, but without `reference`: for pairs, each of which brings its own.

    The shares of discovery and test keep their ratio.
    """
    share = config.discovery / (config.discovery + config.test)
    shares = config.model_copy(update={"discovery": share, "reference": 0.0, "test": 1 - share})
    return add_splits(frame, shares, seed)


def prompts_fingerprint(frame: pd.DataFrame) -> str:
    """SHA-256 over prompts, categories and kinds; the order of the rows, their source and split do not matter."""
    # Sorted digests, not sorted rows: of equal length, so that no choice of texts can imitate other rows.
    rows = zip(frame["prompt"], frame["category"], frame["dataset_type"], strict=True)
    digests = sorted(hashlib.sha256(repr(row).encode()).digest() for row in rows)
    return hashlib.sha256(b"".join(digests)).hexdigest()
