"""The prompts of an experiment: loaded, limited, split into discovery, reference and test, and balanced.

Prompts are split, never tokens or pairs, and within each category and kind, so that the three splits are alike.

To balance is to take all toxic prompts and as many safe ones, of which a stated share is hard. Where one safe kind runs
short the other fills in; where both together do, toxic prompts are left out as well, because equal sides matter more
than size: means over toxic and over safe prompts are compared everywhere. All of it is reported.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.core.config import PromptsConfig
from sfc.core.errors import UserError
from sfc.data.or_bench import CleaningReport, load_prompts
from sfc.data.schema import FILES, canonical_category, keyed_ranks

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


class BalanceRow(NamedTuple):
    """One kind of prompt in one category (and split, where there are splits)."""

    category: str
    split: str | None
    kind: str
    available: int
    wanted: int
    taken: int


class BalanceReport(NamedTuple):
    """What was available, what the shares asked for, and what was taken."""

    rows: tuple[BalanceRow, ...]

    def table(self) -> pd.DataFrame:
        """The rows as a table; `split` is empty where the prompts were not split."""
        return pd.DataFrame(self.rows, columns=list(BalanceRow._fields))

    def lines(self, names: Mapping[str, str]) -> list[str]:
        """One line per category, for people, summed over the splits; `names` are those of the kinds."""
        sums = self.table().groupby(["category", "kind"], sort=False)[["available", "wanted", "taken"]].sum()
        return [_line(str(name), sums.loc[name].rename(index=names)) for name in sums.index.unique("category")]


def balance(
    frame: pd.DataFrame, category: str | None, hard_share: float, seed: int
) -> tuple[pd.DataFrame, BalanceReport]:
    """Choose as many safe prompts as toxic ones in one category, or in each where `category` is None.

    If the frame has a column `split`, each split is balanced by itself, so that every one of them has both sides.
    The rows chosen keep their order and index. The choice depends on the seed and the prompts, not on their order.

    Raises:
        UserError: the category is unknown, or it (or one of its splits) has nothing on one of the two sides.
    """
    if category is not None:
        frame = _of_category(frame, category)
    groups = ["category", "split"] if "split" in frame else ["category"]
    places = keyed_ranks(frame, [*groups, "dataset_type"], f"balance {seed}")
    rows: list[BalanceRow] = []
    chosen = pd.Series(False, index=frame.index)
    for _, group in frame.groupby(groups):
        for row in _quotas(group, hard_share):
            rows.append(row)
            chosen |= (frame.index.isin(group.index)) & (frame["dataset_type"] == row.kind) & (places < row.taken)
    return frame[chosen], BalanceReport(tuple(rows))


def _of_category(frame: pd.DataFrame, category: str) -> pd.DataFrame:
    rows = frame[frame["category"] == category]
    if rows.empty:
        rows = frame[frame["category"] == canonical_category(category)]
    if rows.empty:
        present = ", ".join(sorted(frame["category"].unique())) or "none"
        raise UserError(f"there are no prompts of category {category!r} in the data; categories there: {present}")
    return rows


def _quotas(group: pd.DataFrame, hard_share: float) -> list[BalanceRow]:
    """How many of each kind to take from one group."""
    category = group["category"].iloc[0]
    split = group["split"].iloc[0] if "split" in group else None
    available = {kind: int((group["dataset_type"] == kind).sum()) for kind in FILES}
    _check_sides(category, split, available)
    wanted_hard = math.floor(available["toxic"] * hard_share + 0.5)
    wanted = {
        "toxic": available["toxic"],
        "safe_80k": available["toxic"] - wanted_hard,
        "hard": wanted_hard,
    }
    size = min(available["toxic"], available["safe_80k"] + available["hard"])
    hard = min(math.floor(size * hard_share + 0.5), available["hard"])
    safe = min(size - hard, available["safe_80k"])
    taken = {"toxic": size, "safe_80k": safe, "hard": size - safe}
    return [BalanceRow(category, split, kind, available[kind], wanted[kind], taken[kind]) for kind in FILES]


def _check_sides(category: str, split: str | None, available: dict[str, int]) -> None:
    toxic, safe = available["toxic"], available["safe_80k"] + available["hard"]
    if toxic and safe:
        return
    where = f"category {category!r}" + (f" in the split {split!r}" if split else "")
    side = "safe or hard" if toxic else "toxic"
    raise UserError(
        f"{where} has no {side} prompts ({toxic} toxic, {safe} safe), so there is nothing to compare: "
        f"add {side} prompts of that category (three or more of each kind), or choose another category"
    )


def _line(category: str, counts: pd.DataFrame) -> str:
    parts = []
    for kind, row in counts.iterrows():
        wanted = f", {row['wanted']:,} wanted" if row["wanted"] != row["taken"] else ""
        parts.append(f"{row['taken']:,} of {row['available']:,} {kind}{wanted}")
    return f"{category}: " + "; ".join(parts)
