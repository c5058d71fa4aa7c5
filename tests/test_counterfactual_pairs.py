"""Counterfactuals by hand: equally long, of the other side, of the same split, evenly spread."""

from collections import Counter

import pandas as pd
import pytest

from sfc.core.errors import UserError
from sfc.data.counterfactual import counterfactual_pairs


def table(rows: list[tuple[str, bool, str, str, int, int]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["id", "positive", "category", "split", "length", "first_token"])


PROMPTS = table(
    [
        ("t1", True, "violence", "test", 9, 0),
        ("t2", True, "violence", "test", 9, 0),
        ("t3", True, "violence", "test", 12, 0),  # only a counterfactual of another category
        ("t4", True, "violence", "test", 30, 0),  # nothing so long
        ("t5", True, "violence", "test", 15, 0),  # another first token
        ("s1", False, "violence", "test", 9, 0),
        ("s2", False, "violence", "test", 9, 0),
        ("s3", False, "hate", "test", 9, 0),
        ("s4", False, "hate", "test", 12, 0),
        ("s5", False, "violence", "test", 15, 1),
        ("d1", True, "violence", "discovery", 9, 0),
        ("d2", False, "violence", "discovery", 9, 0),
    ]
)
ALL = pd.Series(True, index=PROMPTS.index)


def named(pairs: pd.DataFrame, prompts: pd.DataFrame) -> set[tuple[str, str]]:
    ids = prompts["id"]
    return {(ids[a], ids[b]) for a, b in zip(pairs["prompt"], pairs["counterfactual"], strict=True)}


def test_pairs_by_hand() -> None:
    found = counterfactual_pairs(PROMPTS, PROMPTS["category"] == "violence", 4, 0)
    forth = {("t1", "s1"), ("t1", "s2"), ("t2", "s1"), ("t2", "s2"), ("t3", "s4"), ("d1", "d2")}
    back = {("s1", "t1"), ("s1", "t2"), ("s2", "t1"), ("s2", "t2"), ("d2", "d1")}
    assert named(found.table, PROMPTS) == forth | back
    assert found.counts["test"] == {
        "pairs": 9, "positive": 3, "negative": 2, "unmatched_positive": 2, "unmatched_negative": 1, "other_category": 1,
    }  # fmt: skip
    assert found.counts["discovery"]["pairs"] == 2 and "left out: 2 and 1" in found.lines("toxic", "safe")[1]
    assert (found.table["positive"] == PROMPTS["positive"][found.table["prompt"]].to_numpy()).all()
    assert found.table["prompt"].ne(found.table["prompt"].shift()).sum() == found.table["prompt"].nunique()


def test_partners_serve_equally_often_and_choices_depend_on_ids_and_seed_alone() -> None:
    rows = [(f"t{i}", True, "hate", "test", 9, 0) for i in range(12)]
    rows += [(f"s{i}", False, "hate", "test", 9, 0) for i in range(8)]
    prompts = table(rows)
    everyone = pd.Series(True, index=prompts.index)
    found = counterfactual_pairs(prompts, everyone, 2, 0).table
    assert len(found) == 40 and not found.duplicated(["prompt", "counterfactual"]).any()
    served = Counter(found["counterfactual"])
    assert {served[i] for i in range(12, 20)} == {3} and {served[i] for i in range(12)} <= {1, 2}
    shuffled = prompts.sample(frac=1, random_state=1)
    again = counterfactual_pairs(shuffled, everyone[shuffled.index], 2, 0).table
    assert named(again, prompts) == named(found, prompts)
    assert named(counterfactual_pairs(prompts, everyone, 2, 1).table, prompts) != named(found, prompts)


def test_a_split_in_which_a_side_finds_nothing_is_an_error() -> None:
    alone = PROMPTS.assign(length=PROMPTS["length"] + 50 * PROMPTS["id"].eq("d2"))
    with pytest.raises(UserError, match=r"'discovery'.*--category all"):
        counterfactual_pairs(alone, ALL, 4, 0)
