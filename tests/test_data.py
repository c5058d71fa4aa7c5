"""The analysis of a data set."""

from pathlib import Path

import pandas as pd
from test_prompts import tables

from sfc.data.or_bench import clean
from sfc.data.schema import prompt_ids
from sfc.studies.data import ALL, analyse, data_page, write_analysis


def test_analysis_counts_lengths_and_pairs() -> None:
    frame, report = clean(
        tables(
            toxic=[("one two three", "hate"), ("one", "hate"), ("only toxic here", "violence")],
            safe=[("Please write a letter to my aunt", "hate"), ("Please write a letter to my uncle", "hate")],
        )
    )
    analysis = analyse(frame, report)
    counts = analysis.counts.set_index("category")
    assert counts.loc["hate", ["toxic", "safe_80k", "hard", "total"]].tolist() == [2, 2, 0, 4]
    assert counts.loc[ALL, "total"] == 5
    assert counts.loc["hate", "safe_per_toxic"] == 1
    lengths = analysis.lengths.set_index(["category", "kind", "unit"])
    toxic_words = lengths.loc[("hate", "toxic", "words"), ["mean", "median", "min", "max"]]
    assert toxic_words.tolist() == [2, 2, 1, 3]
    assert lengths.loc[("hate", "toxic", "characters"), "max"] == len("one two three")
    uncle = "Please write a letter to my uncle"
    assert analysis.near_duplicates["second_prompt"].tolist() == [uncle]
    assert analysis.near_duplicates["second_id"].tolist() == prompt_ids([uncle])


def test_page_stands_alone_and_escapes_prompts(tmp_path: Path) -> None:
    nasty = "Please write <script>alert('a letter')</script> to my"
    frame, report = clean(tables(toxic=[("b", "hate")], safe=[(f"{nasty} aunt", "hate"), (f"{nasty} uncle", "hate")]))
    analysis = analyse(frame, report)
    paths = write_analysis(analysis, data_page(analysis, "mine"), tmp_path)
    page = paths["page"].read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "<script src=" not in page and "Plotly.newPlot" in page and "default-src 'none'" in page
    assert "Length in words" in page
    assert pd.read_csv(paths["near_duplicates"])["first_prompt"].tolist() == [f"{nasty} aunt"]
    assert set(pd.read_csv(paths["counts"])["category"]) == {"hate", ALL}
