"""What is in the data: counts and imbalance, lengths, duplicates.

Write an analysis down: three CSV files, and one page to look at that works without a network.

Stage: describe the data, without a model.
"""

from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.core.artifacts import write_csv, write_text
from sfc.core.progress import say
from sfc.data.or_bench import CleaningReport, load_prompts
from sfc.data.schema import FILES
from sfc.data.similarity import near_duplicates
from sfc.pages.style import PLOTLY_CONFIG
from sfc.run import Run
from sfc.tables import show_table

_KINDS = list(FILES)
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


def analyse(frame: pd.DataFrame, report: CleaningReport, threshold: float = 0.5) -> Analysis:
    """Describe prompts as `load_prompts` gives them; pairs count as near-duplicates from `threshold` on.

    Eighty thousand prompts take about a quarter of a minute, nearly all of it for the near-duplicates.
    """
    return Analysis(_counts(frame), _lengths(frame), _near_duplicates(frame, threshold), report)


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


def _near_duplicates(frame: pd.DataFrame, threshold: float) -> pd.DataFrame:
    pairs = near_duplicates(list(frame["prompt"]), threshold)
    table = pd.DataFrame({"similarity": [round(pair.similarity, 3) for pair in pairs]})
    for side, places in (("first", [pair.first for pair in pairs]), ("second", [pair.second for pair in pairs])):
        rows = frame.iloc[places]
        for column in ("id", "prompt", "category", "dataset_type", "original_source"):
            table[f"{side}_{column}"] = rows[column].to_numpy()
    return table


# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = {"toxic": "#D55E00", "hard": "#E69F00", "safe_80k": "#0072B2"}
_PAIRS_SHOWN = 100


def write_analysis(analysis: Analysis, folder: Path) -> dict[str, Path]:
    """Write `counts.csv`, `lengths.csv`, `near_duplicates.csv` and `data.html`; returns their paths by name.

    The CSV files hold all there is; the page shows at most the hundred most similar pairs.
    """
    tables = {
        "counts": analysis.counts,
        "lengths": analysis.lengths,
        "near_duplicates": analysis.near_duplicates,
    }
    paths = {name: folder / f"{name}.csv" for name in tables}
    for name, table in tables.items():
        write_csv(paths[name], table)
    paths["page"] = folder / "data.html"
    write_text(paths["page"], _page(analysis))
    return paths


def _page(analysis: Analysis) -> str:
    chart = _figure(analysis).to_html(full_html=False, include_plotlyjs=True, config=PLOTLY_CONFIG)
    cleaning = "".join(f"<li>{escape(line)}</li>" for line in analysis.cleaning.lines())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>sfc: the prompts</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }} td, th {{ padding: 0.3rem 0.6rem; text-align: left; }}
tr:nth-child(even) {{ background: #f4f4f4; }}
</style></head><body>
<h1>The prompts</h1>
<ul>{cleaning}</ul>
{chart}
{_pairs(analysis.near_duplicates)}
</body></html>
"""


def _figure(analysis: Analysis) -> go.Figure:
    titles = (
        "Prompts per category and kind",
        "Safe prompts per toxic prompt",
        "Length in words",
        "Length in characters",
    )
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles, vertical_spacing=0.16)
    counts = analysis.counts[analysis.counts["category"] != ALL]
    for kind in FILES:
        hover = f"%{{x}}: %{{y:,}} {kind} prompts<extra></extra>"
        bars = go.Bar(x=counts["category"], y=counts[kind], name=kind, marker_color=_COLOURS[kind], hovertemplate=hover)
        figure.add_trace(bars.update(legendgroup=kind), 1, 1)
    hover = "%{x}: %{y:.2f} safe or hard prompts per toxic one<extra></extra>"
    ratio = counts["safe_per_toxic"]
    bars = go.Bar(x=counts["category"], y=ratio, marker_color="#666666", hovertemplate=hover, showlegend=False)
    figure.add_trace(bars, 1, 2)
    for column, unit in enumerate(("words", "characters"), start=1):
        for kind in FILES:
            figure.add_trace(_boxes(analysis.lengths, kind, unit), 2, column)
        figure.update_yaxes(title_text=unit, rangemode="tozero", row=2, col=column)
    sizes = counts[list(FILES)].to_numpy()
    scale = "log" if sizes.max() > 30 * sizes.clip(min=1).min() else "linear"  # OR-Bench: thousands beside dozens
    figure.update_yaxes(title_text="prompts", type=scale, row=1, col=1)
    figure.update_yaxes(title_text="ratio", rangemode="tozero", row=1, col=2)
    return figure.update_layout(barmode="group", boxmode="group", height=860, template="plotly_white")


def _boxes(lengths: pd.DataFrame, kind: str, unit: str) -> go.Box:
    """Boxes from the quartiles, so that the page does not grow with the data; whiskers span the whole range."""
    rows = lengths[(lengths["kind"] == kind) & (lengths["unit"] == unit) & (lengths["category"] != ALL)]
    return go.Box(
        x=rows["category"],
        q1=rows["lower_quartile"],
        median=rows["median"],
        q3=rows["upper_quartile"],
        lowerfence=rows["min"],
        upperfence=rows["max"],
        mean=rows["mean"],
        name=kind,
        marker_color=_COLOURS[kind],
        legendgroup=kind,
        showlegend=False,
    )


def _pairs(pairs: pd.DataFrame) -> str:
    if pairs.empty:
        return "<h2>Near-duplicates</h2><p>None.</p>"
    rows = "".join(
        f"<tr><td>{similarity:.2f}</td><td>{escape(first)}<br><small>{escape(first_source)}</small></td>"
        f"<td>{escape(second)}<br><small>{escape(second_source)}</small></td></tr>"
        for similarity, first, first_source, second, second_source in pairs[
            ["similarity", "first_prompt", "first_original_source", "second_prompt", "second_original_source"]
        ]
        .head(_PAIRS_SHOWN)
        .itertuples(index=False)
    )
    shown = f"the {_PAIRS_SHOWN} most similar of " if len(pairs) > _PAIRS_SHOWN else ""
    return (
        f"<h2>Near-duplicates ({shown}{len(pairs):,} pairs)</h2>"
        f"<table><tr><th>similarity</th><th>one</th><th>other</th></tr>{rows}</table>"
    )


def describe_data(run: Run) -> dict[str, Any]:
    """Print what is in the data set and write it beside the circuits, as CSV files and a page; return the figures.

    Raises:
        UserError: the data cannot be read.
    """
    frame, report = load_prompts(run.data_folder)
    for line in report.lines():
        say(line)
    analysis = analyse(frame, report)
    show_table(f"Prompts of {run.data}", list(analysis.counts.columns), analysis.counts.itertuples(index=False))
    words = analysis.lengths[(analysis.lengths["unit"] == "words") & (analysis.lengths["category"] == "all")]
    columns = ["kind", "mean", "median", "min", "max"]
    show_table("Words per prompt", columns, words[columns].itertuples(index=False))
    say(f"near-duplicates: {len(analysis.near_duplicates):,} pairs")
    files = write_analysis(analysis, run.root / "data" / f"analysis-{run.data_folder.name}")
    return {
        "data": str(run.data_folder),
        "n_prompts": len(frame),
        "dropped": report.read - report.kept,
        "near_duplicates": len(analysis.near_duplicates),
        "counts": {
            row["category"]: row
            for row in analysis.counts.astype(object).where(analysis.counts.notna(), None).to_dict("records")
        },
        "files": {name: str(path) for name, path in files.items()},
    }
