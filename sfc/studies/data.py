"""`sfc data`: what is in the data, without a model: counts and imbalance, lengths, duplicates."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from sfc.core.artifacts import write_csv, write_text
from sfc.data.or_bench import CleaningReport, load_prompts
from sfc.data.schema import FILES
from sfc.data.similarity import near_duplicates
from sfc.pages.blocks import Figure, Page, Pair, Paragraph, Section, Table, cell
from sfc.pages.html import page_html
from sfc.pages.style import AMBER, BLUE, QUIET, VERMILION, axis, styled_figure
from sfc.pages.text import count_text
from sfc.run import Run

_KINDS = list(FILES)
_ALIKE = 0.5
"""the similarity from which on two prompts count as near-duplicates"""
_UNITS = ("words", "characters")
ALL = "all"  # the name of the row that sums up the categories


class Analysis(NamedTuple):
    """Tables that describe a set of prompts.

    counts: a row per category and one for all; `safe_per_toxic` is the imbalance ratio, missing without toxic prompts.
    lengths: a row per category (and all), kind and unit (words, characters), with mean, median, quartiles and range.
    near_duplicates: a row per pair, the most similar first.
    """

    counts: pd.DataFrame
    lengths: pd.DataFrame
    near_duplicates: pd.DataFrame
    cleaning: CleaningReport


def analyse(frame: pd.DataFrame, report: CleaningReport) -> Analysis:
    """Describe prompts as `load_prompts` gives them.

    Eighty thousand prompts take about a quarter of a minute, nearly all of it for the near-duplicates.
    """
    return Analysis(_counts(frame), _lengths(frame), _near_duplicates(frame), report)


def _counts(frame: pd.DataFrame) -> pd.DataFrame:
    counts = pd.crosstab(frame["category"], frame["dataset_type"]).reindex(columns=_KINDS, fill_value=0)
    counts.loc[ALL] = counts.sum()
    counts["total"] = counts[_KINDS].sum(axis=1)
    safe = counts["safe_80k"] + counts["hard"]
    counts["safe_per_toxic"] = (safe / counts["toxic"].where(counts["toxic"] > 0)).round(3)
    return counts.rename_axis(columns=None).reset_index()


def _lengths(frame: pd.DataFrame) -> pd.DataFrame:
    measured = pd.DataFrame(
        {
            "category": frame["category"],
            "kind": frame["dataset_type"],
            "words": [len(prompt.split()) for prompt in frame["prompt"]],
            "characters": frame["prompt"].str.len(),
        }
    )
    tall = pd.concat([measured, measured.assign(category=ALL)]).melt(["category", "kind"], var_name="unit")
    values = tall.groupby(["category", "kind", "unit"])["value"]
    lengths = values.agg(["count", "mean", "median", "min", "max"])
    lengths["lower_quartile"], lengths["upper_quartile"] = values.quantile(0.25), values.quantile(0.75)
    return lengths.round(2).reset_index()


def _near_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    pairs = near_duplicates(list(frame["prompt"]), _ALIKE)
    table = pd.DataFrame({"similarity": [round(pair.similarity, 3) for pair in pairs]})
    for side, places in (("first", [pair.first for pair in pairs]), ("second", [pair.second for pair in pairs])):
        rows = frame.iloc[places]
        for column in ("id", "prompt", "category", "dataset_type", "original_source"):
            table[f"{side}_{column}"] = rows[column].to_numpy()
    return table


_COLOURS = {"toxic": VERMILION, "hard": AMBER, "safe_80k": BLUE}
_PAIRS_SHOWN, _HEIGHT = 100, 430


def describe_data(run: Run) -> tuple[dict[str, Any], Page]:
    """Describe the data set in CSV files and on a page in `ROOT/data`; returns the figures and the page.

    Raises:
        UserError: the data cannot be read.
    """
    frame, report = load_prompts(run.data_folder)
    analysis = analyse(frame, report)
    page = data_page(analysis, run.data)
    files = write_analysis(analysis, page, run.root / "data" / f"analysis-{run.data_folder.name}")
    counts = analysis.counts.astype(object).where(analysis.counts.notna(), None).to_dict("records")
    figures = {
        "data": str(run.data_folder),
        "n_prompts": len(frame),
        "dropped": report.read - report.kept,
        "near_duplicates": len(analysis.near_duplicates),
        "counts": {row["category"]: row for row in counts},
        "files": {name: str(path) for name, path in files.items()},
    }
    return figures, page


def write_analysis(analysis: Analysis, page: Page, folder: Path) -> dict[str, Path]:
    """Write `counts.csv`, `lengths.csv`, `near_duplicates.csv` and `data.html`; returns their paths by name."""
    tables = {"counts": analysis.counts, "lengths": analysis.lengths, "near_duplicates": analysis.near_duplicates}
    files = {**{name: folder / f"{name}.csv" for name in tables}, "page": folder / "data.html"}
    for name, table in tables.items():
        write_csv(files[name], table)
    write_text(files["page"], page_html(page))
    return files


def data_page(analysis: Analysis, name: str) -> Page:
    """What there is to show of a data set; the page lists at most the hundred most similar pairs."""
    counts, lengths, pairs = analysis.counts, analysis.lengths, analysis.near_duplicates
    of_all = lengths[(lengths["unit"] == "words") & (lengths["category"] == ALL)]
    columns = ["kind", "mean", "median", "min", "max"]
    return Page(
        title=f"The prompts of {name}",
        sentence=f"{count_text(analysis.cleaning.kept, 'prompt')} by category and kind, how long they are, and which "
        "are nearly the same.",
        summary=[
            Paragraph("; ".join(analysis.cleaning.lines())),
            Table(f"Prompts of {name}", list(counts.columns), _cells(counts)),
            Table("Words per prompt", columns, _cells(of_all[columns])),
            Paragraph(f"Near-duplicates: {count_text(len(pairs), 'pair')}"),
        ],
        sections=[
            Section(
                "", [Pair(Figure("counts", lambda: counts_figure(counts)), Figure("ratio", lambda: _ratio(counts)))]
            ),
            Section("", [Pair(*(Figure(unit, lambda unit=unit: _boxes(lengths, unit)) for unit in _UNITS))]),
            _pairs(pairs),
        ],
    )


def counts_figure(counts: pd.DataFrame) -> go.Figure:
    """Prompts per category and kind, on a logarithmic axis where thousands stand beside dozens."""
    figure, counts = styled_figure("Prompts per category and kind", _HEIGHT), counts[counts["category"] != ALL]
    for kind in FILES:
        hover = f"%{{x}}: %{{y:,}} {kind} prompts<extra></extra>"
        figure.add_bar(
            x=counts["category"].tolist(),
            y=counts[kind].tolist(),
            name=kind,
            marker_color=_COLOURS[kind],
            hovertemplate=hover,
        )
    sizes = counts[list(FILES)].to_numpy()
    scale = "log" if sizes.max() > 30 * sizes.clip(min=1).min() else "linear"
    return figure.update_layout(barmode="group", xaxis=axis(""), yaxis=axis("prompts", type=scale))


def _ratio(counts: pd.DataFrame) -> go.Figure:
    figure, counts = styled_figure("Safe and hard prompts per toxic prompt", _HEIGHT), counts[counts["category"] != ALL]
    figure.add_bar(
        x=counts["category"].tolist(),
        y=counts["safe_per_toxic"].tolist(),
        marker_color=QUIET,
        hovertemplate="%{x}: %{y:.2f} safe or hard prompts per toxic one<extra></extra>",
        showlegend=False,
    )
    return figure.update_layout(xaxis=axis(""), yaxis=axis("ratio", rangemode="tozero"))


def _boxes(lengths: pd.DataFrame, unit: str) -> go.Figure:
    """Boxes from the quartiles, so that the page does not grow with the data; whiskers span the whole range."""
    figure = styled_figure(f"Length in {unit}", _HEIGHT)
    lengths = lengths[(lengths["unit"] == unit) & (lengths["category"] != ALL)]
    for kind in FILES:
        rows = lengths[lengths["kind"] == kind]
        figure.add_box(
            x=rows["category"].tolist(),
            q1=rows["lower_quartile"].tolist(),
            median=rows["median"].tolist(),
            q3=rows["upper_quartile"].tolist(),
            lowerfence=rows["min"].tolist(),
            upperfence=rows["max"].tolist(),
            mean=rows["mean"].tolist(),
            name=kind,
            marker_color=_COLOURS[kind],
        )
    return figure.update_layout(boxmode="group", xaxis=axis(""), yaxis=axis(unit, rangemode="tozero"))


def _pairs(pairs: pd.DataFrame) -> Section:
    titles = ("similarity", "one", "its source", "the other", "its source")
    fields = ["similarity", "first_prompt", "first_original_source", "second_prompt", "second_original_source"]
    rows = [[f"{similarity:.2f}", *texts] for similarity, *texts in pairs[fields].head(_PAIRS_SHOWN).to_numpy()]
    shown = f"the {_PAIRS_SHOWN} most similar of " if len(pairs) > _PAIRS_SHOWN else ""
    title = f"Near-duplicates ({shown}{count_text(len(pairs), 'pair')})"
    return Section(title, [Table("", titles, rows, texts=titles) if rows else Paragraph("None.")])


def _cells(table: pd.DataFrame) -> list[list[str]]:
    return [[cell(value) for value in row.values()] for row in table.to_dict("records")]
