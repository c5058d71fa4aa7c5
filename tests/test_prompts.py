"""The table of prompts: loaded, cleaned, with ids, split and balanced."""

import csv
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfc.core.config import PromptsConfig
from sfc.core.errors import UserError
from sfc.data.balance import balance
from sfc.data.or_bench import clean, load_prompts
from sfc.data.prepare import add_splits, prepare_prompts, prompts_fingerprint
from sfc.data.schema import (
    CATEGORIES,
    COLUMNS,
    FILES,
    SPLITS,
    canonical_category,
    comparison_key,
    keyed_numbers,
    normalise,
    prompt_ids,
    with_ids,
)

Rows = list[tuple[str, str]]
CONFIG = PromptsConfig()  # pyright: ignore[reportCallIssue]


def write_folder(folder: Path, toxic: Rows, safe: Rows, hard: Rows) -> Path:
    """A data folder of the three files."""
    for kind, rows in (("toxic", toxic), ("safe_80k", safe), ("hard", hard)):
        with (folder / FILES[kind]).open("w", encoding="utf-8", newline="") as handle:
            csv.writer(handle).writerows([("prompt", "category"), *rows])
    return folder


def make_frame(toxic: int, safe: int, hard: int, category: str = "violence") -> pd.DataFrame:
    """A clean frame of made-up prompts, so many of each kind."""
    rows = [
        (f"{kind} prompt {number} on {category}", category, kind == "toxic", kind, f"{FILES[kind]}:{number + 2}")
        for kind, count in (("toxic", toxic), ("safe_80k", safe), ("hard", hard))
        for number in range(count)
    ]
    return with_ids(pd.DataFrame(rows, columns=list(COLUMNS[1:])))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path,
        toxic=[("Hurt him", "violence"), ("Forge it", "illegal")],
        safe=[("Bake a cake", "violence"), ("Kill the process", "Self_Harm")],
        hard=[("Kill the process", "self-harm"), ("Shoot a film", "violence")],
    )


# --- categories and texts


@pytest.mark.parametrize("name", ["self-harm", "self_harm", "Self Harm", "  SELF - HARM "])
def test_category_spellings(name: str) -> None:
    assert canonical_category(name) == "self-harm"


def test_unknown_category_suggests_or_lists() -> None:
    with pytest.raises(UserError, match="did you mean 'violence'"):
        canonical_category("violense")
    with pytest.raises(UserError, match=r"known: deception, .*, violence"):
        canonical_category("weather")


@pytest.mark.parametrize(
    ("raw", "clean_text"),
    [
        ("  two\t words \r\n", "two words"),
        ("no\u00a0break\u2003space", "no break space"),
        ("zero\u200bwidth\ufeff and \u202ebidi", "zerowidth and bidi"),
        ("bell\x07 and \x1b[0m", "bell and [0m"),
        ("cafe\u0301", "caf\u00e9"),
        ("e\u200b\u0301", "\u00e9"),
        ("x\u00b2 + \u00bd", "x\u00b2 + \u00bd"),  # NFKC would have changed the meaning
        ("\u200b\u00a0", ""),
    ],
)
def test_normalise(raw: str, clean_text: str) -> None:
    assert normalise(raw) == clean_text


def test_comparison_ignores_case_and_compatibility_forms() -> None:
    assert comparison_key("How TO") == comparison_key("ｈｏｗ  ｔｏ")
    assert comparison_key("STRASSE") == comparison_key("straße")
    assert comparison_key("how to") != comparison_key("how two")


def test_an_id_is_short_stable_and_never_read_as_a_number() -> None:
    """By hand: `printf 'how to' | sha256sum` begins with these twelve digits."""
    assert prompt_ids(["How TO", "ｈｏｗ  ｔｏ"]) == ["p11e316cbc95e"] * 2
    assert len(set(prompt_ids(f"prompt {number}" for number in range(10_000)))) == 10_000


def test_a_table_with_ids_has_them_first_and_once() -> None:
    frame = pd.DataFrame({"category": ["hate"], "prompt": ["Hurt"]})
    assert list(with_ids(frame).columns) == ["id", "category", "prompt"]
    assert with_ids(with_ids(frame)).equals(with_ids(frame))


def test_keyed_numbers_differ_by_key_and_stick_to_the_prompt() -> None:
    texts = ["How to", "how two"]
    first, second = keyed_numbers(texts, "a"), keyed_numbers(texts, "b")
    assert len({*first.tolist(), *second.tolist()}) == 4
    assert keyed_numbers(["how  TWO", "HOW to"], "a").tolist() == first[::-1].tolist()


odd_text = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\u00a0\u200b\x07\u0301\u1100\u1161ab")),
    max_size=20,
)


@given(odd_text)
def test_cleaning_a_text_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == " ".join(once.split())
    assert comparison_key(once) == comparison_key(text)
    assert prompt_ids([once]) == prompt_ids([text])


# --- loading


def test_load_gives_the_schema(folder: Path) -> None:
    frame, report = load_prompts(folder)
    assert list(frame.columns) == list(COLUMNS)
    rows = {row.prompt: row for row in frame.itertuples()}
    assert rows["Forge it"].refusal_label and rows["Forge it"].original_source == "or-bench-toxic.csv:3"
    assert not rows["Shoot a film"].refusal_label and rows["Shoot a film"].dataset_type == "hard"
    assert (report.read, report.kept) == (6, 5)


def test_hard_rows_are_recognised_inside_the_80k_file(folder: Path) -> None:
    frame, report = load_prompts(folder)
    (row,) = frame[frame["prompt"] == "Kill the process"].itertuples()
    assert (row.dataset_type, row.category) == ("hard", "self-harm")
    counts = {counts.file: counts for counts in report.files}["or-bench-80k.csv"]
    assert (counts.also_hard, counts.kept) == (1, 1)
    assert "or-bench-80k.csv: 1 of 2 rows kept (1 also in the hard file)" in report.lines()


def test_texts_are_cleaned_and_rows_counted_as_a_spreadsheet_counts(folder: Path) -> None:
    text = '\ufeffid,category,prompt\r\n1,hate,"a, ""quoted""\r\nprompt"\r\n\r\n3,hate,next\r\n'
    (folder / FILES["toxic"]).write_text(text, encoding="utf-8", newline="")
    frame, _ = load_prompts(folder)
    toxic = frame[frame["refusal_label"]]
    assert toxic["prompt"].tolist() == ['a, "quoted" prompt', "next"]
    assert toxic["original_source"].tolist() == ["or-bench-toxic.csv:2", "or-bench-toxic.csv:4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt,category\na,hate\n", r"or-bench-toxic\.csv has no column 'prompt'"),
        ("prompt,category\na,hate\nb,violense\n", r"or-bench-toxic\.csv row 3: .*did you mean 'violence'"),
        ("prompt,category\na,\n", r"or-bench-toxic\.csv row 2: unknown category ''; known: deception"),
        ("prompt,category\n ,nothing\n,\n", r"or-bench-toxic\.csv holds no prompts: all its 2 rows are blank"),
    ],
)
def test_a_bad_file_is_named_in_one_line(folder: Path, text: str, message: str) -> None:
    (folder / FILES["toxic"]).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / FILES["hard"]).unlink()
    with pytest.raises(UserError, match=r"lacks or-bench-hard-1k\.csv: `sfc download`"):
        load_prompts(folder)


def test_importing_needs_no_torch() -> None:
    code = "import sys, sfc.data.prepare, sfc.data.balance, sfc.data.download; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "plotly", "huggingface_hub"} & set(loaded)


# --- cleaning


def tables(toxic: Rows = (), hard: Rows = (), safe: Rows = ()) -> dict[str, pd.DataFrame]:  # type: ignore[assignment]
    kinds = {"toxic": toxic, "hard": hard, "safe_80k": safe}
    return {
        kind: pd.DataFrame(list(rows), columns=["prompt", "category"]).assign(original_source="x")
        for kind, rows in kinds.items()
    }


def test_what_is_dropped_is_counted() -> None:
    frame, report = clean(
        tables(
            toxic=[("Bad", "hate"), ("  bad ", "hate"), ("", "hate")],
            hard=[("Odd", "hate"), ("BAD", "hate")],
            safe=[("odd", "hate"), ("bad", "hate"), ("Good", "hate"), ("\u200b", "hate"), ("good", "hate")],
        )
    )
    counts = {counts.file: counts[1:] for counts in report.files}
    #                        read, empty, duplicates, also toxic, also hard, kept
    assert counts[FILES["toxic"]] == (3, 1, 1, 0, 0, 1)
    assert counts[FILES["hard"]] == (2, 0, 0, 1, 0, 1)
    assert counts[FILES["safe_80k"]] == (5, 1, 1, 1, 1, 1)
    assert sorted(frame["prompt"]) == ["Bad", "Good", "Odd"]
    assert (report.read, report.duplicates, report.kept) == (10, 5, 3)


few_prompts = st.lists(
    st.tuples(st.sampled_from(["a", "A ", "b", "B\u00a0b", "c", "", "\u200b", "d"]), st.sampled_from(CATEGORIES[:3])),
    max_size=8,
)


@given(few_prompts, few_prompts, few_prompts, st.randoms())
@settings(deadline=None, max_examples=40)
def test_cleaning_is_idempotent_and_indifferent_to_order(
    toxic: Rows, hard: Rows, safe: Rows, rng: random.Random
) -> None:
    frame, report = clean(tables(toxic, hard, safe))
    assert report.kept == len(frame)
    assert all(counts.read == sum(counts[2:]) for counts in report.files)
    assert frame["prompt"].map(comparison_key).is_unique
    assert frame["id"].is_unique and frame["id"].tolist() == prompt_ids(frame["prompt"])
    again, second = clean({kind: frame[frame["dataset_type"] == kind][["prompt", "category", "original_source"]]
                           for kind in FILES})  # fmt: skip
    assert second.duplicates == 0
    assert again["prompt"].tolist() == frame["prompt"].tolist()
    shuffled = [rng.sample(rows, len(rows)) for rows in (toxic, hard, safe)]
    assert prompts_fingerprint(clean(tables(*shuffled))[0]) == prompts_fingerprint(frame)


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
    assert report.lines()[0] == "hate: 29 of 300 safe_80k; 11 of 30 hard; 40 of 40 toxic"


def test_what_runs_short_is_filled_and_reported() -> None:
    chosen, report = balance(make_frame(100, 60, 40), "violence", 0.25, seed=0)
    assert chosen["dataset_type"].value_counts().to_dict() == {"toxic": 100, "safe_80k": 60, "hard": 40}
    line = "violence: 60 of 60 safe_80k, 75 wanted; 40 of 40 hard, 25 wanted; 100 of 100 toxic"
    assert report.lines() == [line]


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


# --- the real size


MEASURE = """
import json, sys, time
from pathlib import Path
from sfc.core.config import PromptsConfig
from sfc.data.prepare import prepare_prompts
from sfc.data.balance import balance
start = time.perf_counter()
frame, report = prepare_prompts(Path(sys.argv[1]), PromptsConfig(), 0)
chosen, _ = balance(frame, None, 0.25, 0)
seconds = time.perf_counter() - start
# Not getrusage: its peak counts the parent that this process was forked from.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
megabytes = int(peak.split()[1]) / 1024
print(json.dumps({"seconds": seconds, "megabytes": megabytes, "kept": len(frame), "chosen": len(chosen)}))
"""


def test_eighty_thousand_rows(tmp_path: Path) -> None:
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(6, 22))) for _ in range(80_359 + 1 + 655)]
    rows = [(text, rng.choice(CATEGORIES)) for text in texts]
    safe, hard, toxic = rows[:80_359], [*rows[:1_318], rows[80_359]], rows[80_360:]
    write_folder(tmp_path, toxic, safe, hard)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout)
    assert measured["kept"] == 80_359 + 1 + 655
    assert measured["chosen"] == 2 * 655
    assert measured["megabytes"] < 500
    assert measured["seconds"] < 15  # about 1.3 s; the bound only catches something quadratic on a busy machine
