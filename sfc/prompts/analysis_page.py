"""Write an analysis down: three CSV files, and one page to look at that works without a network."""

from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.artifacts import write_csv, write_text
from sfc.offline import PLOTLY_CONFIG
from sfc.prompts.analyse import ALL, Analysis
from sfc.prompts.schema import FILES

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
