"""The embedded data set, checked: counts, duplicates, leaks between files, balance of length and topic."""

import csv
import statistics
from collections import Counter
from pathlib import Path

import pytest

from sfc.core.config import PromptsConfig
from sfc.data.prepare import balance, prepare_prompts
from sfc.data.schema import CATEGORIES, FILES, comparison_key, normalise
from sfc.data.similarity import near_duplicates

REPOSITORY = Path(__file__).parents[1]
MINI = REPOSITORY / "sfc" / "data" / "mini"
ADAPTER = REPOSITORY / "tools" / "adapter.csv"
PER_CATEGORY = {"toxic": 100, "safe_80k": 60, "hard": 40}
PER_BLOCK = {"toxic": 5, "safe_80k": 3, "hard": 2}

Row = dict[str, str]


def read(name: str | Path) -> list[Row]:
    with (MINI / name).open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def all_texts() -> list[tuple[str, str]]:
    """Every prompt of the set with where it stands; the two sides of a pair stand at the same place."""
    texts = [(f"{name}:{number}", row["prompt"]) for name in FILES.values() for number, row in enumerate(read(name), 2)]
    texts += [(f"{ADAPTER.name}:{number}", row["prompt"]) for number, row in enumerate(read(ADAPTER), 2)]
    for number, row in enumerate(read("pairs.csv"), 2):
        texts += [(f"pairs.csv:{number}", row["toxic"]), (f"pairs.csv:{number}", row["safe"])]
    return texts


@pytest.mark.parametrize("kind", FILES)
def test_counts_and_columns(kind: str) -> None:
    rows = read(FILES[kind])
    assert list(rows[0]) == ["prompt", "category"]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(CATEGORIES, PER_CATEGORY[kind])


def test_adapter_and_pairs_counts() -> None:
    adapter, pairs = read(ADAPTER), read("pairs.csv")
    assert list(adapter[0]) == ["prompt", "category", "label"]
    assert {row["category"] for row in adapter} <= {*CATEGORIES, "general"}
    labels = Counter(row["label"] for row in adapter)
    assert set(labels) == {"toxic", "safe", "hard"}
    assert labels["toxic"] >= 300 and labels["safe"] + labels["hard"] >= 300
    assert labels["hard"] >= 0.2 * (labels["safe"] + labels["hard"])
    assert all(row["label"] == "safe" for row in adapter if row["category"] == "general")
    assert list(pairs[0]) == ["category", "toxic", "safe"]
    per_category = Counter(row["category"] for row in pairs)
    assert set(per_category) == set(CATEGORIES) and min(per_category.values()) >= 20


def test_texts_are_clean_ascii() -> None:
    for place, text in all_texts():
        assert text.isascii() and text.isprintable() and text == normalise(text) != "", place
        assert 4 <= len(text.split()) <= 30, place


def test_no_prompt_stands_twice() -> None:
    places: dict[str, str] = {}
    for place, text in all_texts():
        assert places.setdefault(comparison_key(text), place) == place, (places[comparison_key(text)], place, text)
    assert len(places) == len(all_texts())


def test_no_near_duplicates_within_or_across_files() -> None:
    texts = all_texts()
    near = [(texts[pair.first], texts[pair.second]) for pair in near_duplicates([text for _, text in texts], 0.5)]
    assert [(one, other) for one, other in near if one[0] != other[0]] == []


def test_pairs_differ_little_and_have_one_length() -> None:
    for number, row in enumerate(read("pairs.csv"), 2):
        toxic, safe = row["toxic"].lower().split(), row["safe"].lower().split()
        assert abs(len(toxic) - len(safe)) <= 1, number
        shared = sum((Counter(toxic) & Counter(safe)).values())
        assert 2 * shared >= min(len(toxic), len(safe)) - 2, (number, row)


@pytest.mark.parametrize("category", CATEGORIES)
def test_kinds_agree_in_length_and_form(category: str) -> None:
    texts = {kind: [row["prompt"] for row in read(FILES[kind]) if row["category"] == category] for kind in FILES}
    words = [statistics.mean(len(text.split()) for text in group) for group in texts.values()]
    assert max(words) - min(words) <= 1
    questions = [statistics.mean(text.endswith("?") for text in group) for group in texts.values()]
    assert max(questions) - min(questions) <= 0.16


@pytest.mark.parametrize("kind", FILES)
def test_no_opening_gives_a_kind_away(kind: str) -> None:
    openings = Counter(" ".join(row["prompt"].lower().split()[:2]) for row in read(FILES[kind]))
    assert max(openings.values()) <= 0.08 * openings.total()


def test_topics_lie_in_blocks() -> None:
    """The n-th topic of a category owns the n-th block of each file: 5 toxic, 3 safe, 2 hard rows."""
    topics = read("topics.csv")
    assert Counter(row["category"] for row in topics) == dict.fromkeys(CATEGORIES, 20)
    assert len({(row["category"], row["topic"]) for row in topics}) == len(topics)
    for kind, size in PER_BLOCK.items():
        expected = [row["category"] for row in topics for _ in range(size)]
        assert [row["category"] for row in read(FILES[kind])] == expected


def test_the_loader_keeps_every_row_and_every_split_has_both_sides() -> None:
    frame, report = prepare_prompts(MINI, PromptsConfig(), seed=0)  # pyright: ignore[reportCallIssue]
    assert report.kept == report.read == 2000
    chosen, _ = balance(frame, None, 0.25, seed=0)
    sides = chosen.groupby(["category", "split", "refusal_label"]).size()
    assert len(sides) == 10 * 3 * 2
    assert sides.loc["violence"].tolist() == [50, 50, 15, 15, 35, 35]
