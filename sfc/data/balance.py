"""Balance toxic against safe prompts, category by category and split by split.

All toxic prompts are taken and as many safe ones, of which a stated share is hard. Where one safe kind runs short the
other fills in; where both together do, toxic prompts are left out as well, because equal sides matter more than size:
means over toxic and over safe prompts are compared everywhere. All of it is reported.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from sfc.core.errors import UserError
from sfc.data.schema import FILES, canonical_category, keyed_ranks


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
