"""Prompts chosen by hash: split, balanced and limited."""

import random
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompts import write_folder

from sfc.core.config import PromptsConfig
from sfc.core.errors import UserError
from sfc.data.prepare import add_splits, balance, prepare_prompts, prompts_fingerprint
from sfc.data.schema import COLUMNS, FILES, SPLITS, with_ids

CONFIG = PromptsConfig()  # pyright: ignore[reportCallIssue]


def make_frame(toxic: int, safe: int, hard: int, category: str = "violence") -> pd.DataFrame:
    """A clean frame of made-up prompts, so many of each kind."""
    rows = [
        (f"{kind} prompt {number} on {category}", category, kind == "toxic", kind, f"{FILES[kind]}:{number + 2}")
        for kind, count in (("toxic", toxic), ("safe_80k", safe), ("hard", hard))
        for number in range(count)
    ]
    return with_ids(pd.DataFrame(rows, columns=list(COLUMNS[1:])))


# --- splits


sizes = st.integers(min_value=0, max_value=60)


@given(sizes, sizes, sizes, st.integers(0, 5), st.randoms())
@settings(deadline=None, max_examples=20)
def test_splits_are_exhaustive_and_stable_under_reordering(
    toxic: int, safe: int, hard: int, seed: int, rng: random.Random
) -> None:
    frame = make_frame(toxic, safe, hard)
    split = add_splits(frame, CONFIG, seed)
    assert split.drop(columns="split").equals(frame)
    assert set(split["split"]) <= set(SPLITS)
    order = rng.sample(range(len(frame)), len(frame))
    shuffled = add_splits(frame.iloc[order].reset_index(drop=True), CONFIG, seed)
    assert dict(zip(split["prompt"], split["split"], strict=True)) == dict(
        zip(shuffled["prompt"], shuffled["split"], strict=True)
    )
    for kind, count in (("toxic", toxic), ("safe_80k", safe), ("hard", hard)):
        found = split.loc[split["dataset_type"] == kind, "split"].value_counts().reindex(SPLITS, fill_value=0)
        assert abs(found - count * pd.Series({"discovery": 0.5, "reference": 0.15, "test": 0.35})).max() <= 1
        assert count < 3 or found.min() > 0


def test_shares_of_a_hundred_are_exact_and_seeds_differ() -> None:
    frame = make_frame(100, 60, 40)
    first, second = (add_splits(frame, CONFIG, seed)["split"] for seed in (0, 1))
    counts = pd.crosstab(frame["dataset_type"], first)[list(SPLITS)]
    assert counts.loc["toxic"].tolist() == [50, 15, 35]
    assert counts.loc["safe_80k"].tolist() == [30, 9, 21]
    assert counts.loc["hard"].tolist() == [20, 6, 14]
    assert not first.equals(second)


# --- balance


@given(st.integers(1, 60), sizes, sizes, st.floats(0, 1), st.randoms())
@settings(deadline=None, max_examples=20)
def test_balanced_sides_are_equal_and_choices_stable(
    toxic: int, safe: int, hard: int, hard_share: float, rng: random.Random
) -> None:
    frame = make_frame(toxic, safe, hard)
    if safe + hard == 0:
        with pytest.raises(UserError, match="'violence' has no safe or hard prompts"):
            balance(frame, None, hard_share, seed=0)
        return
    chosen, report = balance(frame, "violence", hard_share, seed=0)
    assert chosen["refusal_label"].sum() * 2 == len(chosen) == 2 * min(toxic, safe + hard)
    taken = {row.kind: row for row in report.rows}
    assert all(row.taken <= row.available for row in report.rows)
    if safe + hard >= toxic:
        assert taken["toxic"].taken == toxic
        assert abs(taken["hard"].wanted - hard_share * toxic) <= 0.5
        short = taken["hard"].available < taken["hard"].wanted or taken["safe_80k"].available < taken["safe_80k"].wanted
        assert short == (taken["hard"].taken != taken["hard"].wanted)
    order = rng.sample(range(len(frame)), len(frame))
    assert set(balance(frame.iloc[order], None, hard_share, seed=0)[0]["prompt"]) == set(chosen["prompt"])


def test_every_split_is_balanced_by_itself() -> None:
    frame = add_splits(pd.concat([make_frame(40, 300, 30, name) for name in ("hate", "violence")], ignore_index=True),
                       CONFIG, 0)  # fmt: skip
    chosen, report = balance(frame, None, 0.25, seed=0)
    sides = chosen.groupby(["category", "split", "refusal_label"]).size().unstack()
    assert (sides[True] == sides[False]).all()
    assert len(sides) == 6
    assert {(row.category, row.split) for row in report.rows} == set(sides.index)
    assert report.lines({})[0] == "hate: 29 of 300 safe_80k; 11 of 30 hard; 40 of 40 toxic"


def test_what_runs_short_is_filled_and_reported() -> None:
    chosen, report = balance(make_frame(100, 60, 40), "violence", 0.25, seed=0)
    assert chosen["dataset_type"].value_counts().to_dict() == {"toxic": 100, "safe_80k": 60, "hard": 40}
    line = "violence: 60 of 60 safe_80k, 75 wanted; 40 of 40 hard, 25 wanted; 100 of 100 toxic"
    assert report.lines({}) == [line]


def test_nothing_on_one_side() -> None:
    frame = make_frame(0, 5, 5)
    with pytest.raises(UserError, match=r"category 'violence' has no toxic prompts \(0 toxic, 10 safe\)"):
        balance(frame, "violence", 0.25, 0)
    with pytest.raises(UserError, match="no prompts of category 'hate' in the data; categories there: violence"):
        balance(frame, "hate", 0.25, 0)
    with pytest.raises(UserError, match="did you mean 'violence'"):
        balance(frame, "violenc", 0.25, 0)
    with pytest.raises(UserError, match="in the split 'reference' has no toxic prompts"):
        balance(add_splits(make_frame(2, 40, 40), CONFIG, 0), None, 0.25, 0)


# --- preparing


def test_prepare_limits_per_category_and_kind(tmp_path: Path) -> None:
    rows = [(f"prompt {number}", category) for number, category in enumerate(["hate", "violence"] * 10)]
    write_folder(tmp_path, *([(f"{kind} {text}", name) for text, name in rows] for kind in ("toxic", "safe", "hard")))
    config = PromptsConfig(limit=4)  # pyright: ignore[reportCallIssue]
    frame = prepare_prompts(tmp_path, config, seed=3).frame
    assert set(frame.groupby(["category", "dataset_type"]).size()) == {4}
    assert set(frame["split"]) == set(SPLITS)
    write_folder(tmp_path, *([(f"{kind} {text}", name) for text, name in rows[::-1]]
                             for kind in ("toxic", "safe", "hard")))  # fmt: skip
    reordered = prepare_prompts(tmp_path, config, seed=3).frame
    columns = ["prompt", "split"]
    assert set(map(tuple, frame[columns].to_numpy())) == set(map(tuple, reordered[columns].to_numpy()))
    assert prompts_fingerprint(frame) == prompts_fingerprint(reordered)


def test_fingerprint_follows_content_only() -> None:
    frame = make_frame(3, 3, 3)
    assert prompts_fingerprint(frame) == prompts_fingerprint(frame[::-1].assign(original_source="elsewhere"))
    assert prompts_fingerprint(frame) != prompts_fingerprint(frame.assign(category="hate"))
    assert prompts_fingerprint(frame) != prompts_fingerprint(frame[1:])
    assert prompts_fingerprint(frame) != prompts_fingerprint(frame.assign(prompt=frame["prompt"] + "?"))
