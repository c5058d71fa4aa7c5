"""Counterfactuals: for each prompt, equally long prompts of the other side.

What a circuit carries is what differs between a prompt and its counterfactual, at the same positions, so that both must
have equally many tokens, and the same first token, which no ablation touches. Pairs stay within a split. Nothing here
depends on the order of the prompts: choices follow from their ids and the seed. No torch here.
"""

from collections import Counter
from hashlib import sha256
from typing import NamedTuple

import pandas as pd

from sfc.core.errors import UserError

COLUMNS = ("id", "positive", "category", "split", "length", "first_token")


class CounterfactualPairs(NamedTuple):
    """Prompts with their counterfactuals."""

    table: pd.DataFrame
    """a row per pair: `prompt` and `counterfactual` (labels of the rows of the table of prompts), `positive` (whether
    the prompt is of the positive side) and `split`; those of a prompt are next to each other"""
    counts: dict[str, dict[str, int]]
    """by split: `pairs`, `positive` and `negative` (prompts with a counterfactual), `unmatched_positive` and
    `unmatched_negative` (prompts without), `other_category` (pairs of two categories)"""

    def lines(self, positive: str, negative: str) -> list[str]:
        """What was paired and what was not, a line per split; the arguments are what the two sides are called."""
        return [
            f"counterfactuals for {split}: {n['pairs']:,} pairs, of {n['positive']:,} {positive} and"
            f" {n['negative']:,} {negative} prompts; left out: {n['unmatched_positive']:,} and"
            f" {n['unmatched_negative']:,} without an equally long one of the other side"
            for split, n in self.counts.items()
        ]


def counterfactual_pairs(
    prompts: pd.DataFrame, explained: "pd.Series[bool]", pairs_per_prompt: int, seed: int
) -> CounterfactualPairs:
    """Pair each prompt that is explained with equally long ones of the other side and of its split.

    Counterfactuals are of the same category where there is one, else of any. Those that have served least come first,
    so that no prompt serves much more often than others.

    Args:
        prompts: with the columns `COLUMNS`, `length` in tokens; every row may serve as a counterfactual.
        explained: which rows are to be paired.
        pairs_per_prompt: at most so many counterfactuals per prompt.

    Raises:
        UserError: in some split no prompt of one of the sides finds a counterfactual.
    """
    rows = prompts[list(COLUMNS)].assign(explained=explained).drop_duplicates(["id", "split"])
    found: list[pd.DataFrame] = []
    counts: dict[str, dict[str, int]] = {}
    for split, of_split in rows.groupby("split", sort=True):
        pairs, unmatched = _paired(of_split, pairs_per_prompt, seed)
        found.append(pd.DataFrame(pairs).assign(split=split))
        counts[str(split)] = _counts(rows, pairs, unmatched)
    missing = [split for split, n in counts.items() if not (n["positive"] and n["negative"])]
    if missing or not counts:
        where = f" in the split {missing[0]!r}" if missing else ""
        raise UserError(
            f"no prompt of one side has an equally long one of the other{where}: counterfactuals need more prompts;"
            " take --category all, or a mean as discovery.baseline"
        )
    return CounterfactualPairs(pd.concat(found, ignore_index=True), counts)


def _paired(rows: pd.DataFrame, pairs_per_prompt: int, seed: int) -> tuple[list[dict], list]:
    """The pairs of one split, and the labels of the prompts that found no counterfactual."""
    candidates = dict(iter(rows.groupby(["positive", "length", "first_token"])))
    served: Counter = Counter()
    pairs, unmatched = [], []
    wanted = rows[rows["explained"]].to_dict("index")
    names = {row: str(prompt["id"]) for row, prompt in wanted.items()}
    for row in sorted(wanted, key=lambda row: _number(seed, names[row])):
        prompt = wanted[row]
        others = candidates.get((not prompt["positive"], prompt["length"], prompt["first_token"]))
        if others is None:
            unmatched.append(row)
            continue
        alike = others[others["category"] == prompt["category"]]
        ids = (alike if len(alike) else others)["id"].to_dict()
        chosen = sorted(ids, key=lambda other: (served[other], _number(seed, names[row], ids[other])))
        for other in chosen[:pairs_per_prompt]:
            served[other] += 1
            pairs.append({"prompt": row, "counterfactual": other, "positive": bool(prompt["positive"])})
    return pairs, unmatched


def _counts(rows: pd.DataFrame, pairs: list[dict], unmatched: list) -> dict[str, int]:
    sides = {bool(side): {pair["prompt"] for pair in pairs if pair["positive"] == side} for side in (True, False)}
    without = Counter(rows.loc[unmatched, "positive"].astype(bool))
    category = rows["category"]
    return {
        "pairs": len(pairs),
        "positive": len(sides[True]),
        "negative": len(sides[False]),
        "unmatched_positive": without[True],
        "unmatched_negative": without[False],
        "other_category": sum(category[pair["prompt"]] != category[pair["counterfactual"]] for pair in pairs),
    }


def _number(seed: int, *ids: str) -> str:
    """A number that depends on the seed and these ids alone, as hexadecimal digits."""
    return sha256("\n".join([f"counterfactual {seed}", *ids]).encode()).hexdigest()
