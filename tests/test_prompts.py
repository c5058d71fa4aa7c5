"""Prompts: their texts and ids; loaded and cleaned."""

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

import sfc.data.schema
from sfc.core.config import PromptsConfig
from sfc.core.errors import UserError
from sfc.data.or_bench import clean, load_prompts
from sfc.data.prepare import prompts_fingerprint
from sfc.data.schema import (
    CATEGORIES,
    COLUMNS,
    FILES,
    canonical_category,
    comparison_key,
    keyed_numbers,
    looked_up,
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


def test_values_are_looked_up_by_id() -> None:
    frame = with_ids(pd.DataFrame({"prompt": ["Hurt", "Rob"], "number": [3, 7]}))
    assert looked_up(prompt_ids(["rob", "hurt", "ROB"]), frame, "number").tolist() == [7, 3, 7]
    with pytest.raises(KeyError):
        looked_up(prompt_ids(["Burn"]), frame, "number")
    with pytest.raises(ValueError, match="two rows have the same id"):
        looked_up([], pd.concat([frame, frame]), "number")


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
    modules = [f"sfc.data.{path.stem}" for path in Path(sfc.data.schema.__file__).parent.glob("*.py")]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(modules) <= set(loaded)
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


# --- the real size


MEASURE = """
import json, sys, time
from pathlib import Path
from sfc.core.config import PromptsConfig
from sfc.data.prepare import prepare_prompts
from sfc.data.prepare import balance
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
