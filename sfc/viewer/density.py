"""How often the features of a run's dictionaries fire: a histogram for each site and role."""

from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sfc.viewer.columns import columns_of_sites
from sfc.viewer.style import INK, QUIET, ROLE_COLOURS, axis, styled_figure
from sfc.viewer.text import hover_text

_HEIGHT = 470
_BINS_PER_DECADE = 5


def density_figure(density: pd.DataFrame, dense_rate: float) -> go.Figure:
    """Histograms of log10 firing rates, a colour for each role, with a slider over the sites.

    Features that never fire have no logarithm; the title counts them.

    Args:
        density: `density.csv` as `write_quality_page` takes it.
        dense_rate: where the line stands beyond which features are dense.
    """
    roles = [column for column in density.columns if column not in ("site", "feature")]
    edges = _edges(density[roles].to_numpy())
    figure, titles, highest = styled_figure("", _HEIGHT), [], 1
    by_site = dict(iter(density.groupby("site", sort=False)))
    for site, rates in by_site.items():
        never = ", ".join(f"{int((rates[role] == 0).sum()):,} ({role})" for role in roles)
        titles.append(f"{hover_text(str(site))}: how often its {len(rates):,} features fire. Never: {never}")
        for role, colour in zip(roles, ROLE_COLOURS, strict=False):
            alive = rates.loc[rates[role] > 0, role]
            counts, _ = np.histogram(np.log10(alive), edges)
            highest = max(highest, int(counts.max()))
            figure.add_trace(_bars(edges, counts, role, colour, visible=len(titles) == 1))
    columns = columns_of_sites([str(site) for site in by_site])
    steps = []
    for number, label in enumerate(columns.labels):
        visible = [place // len(roles) == number for place in range(len(roles) * len(titles))]
        changes = [{"visible": visible}, {"title.text": titles[number]}]
        steps.append({"label": label, "method": "update", "args": changes})
    _set_axes(figure, edges, highest)
    figure.add_vline(np.log10(dense_rate), line={"color": INK, "width": 1, "dash": "dot"})
    figure.add_annotation(
        text="dense ▸",
        x=np.log10(dense_rate),
        y=1,
        yref="paper",
        xanchor="left",
        yanchor="top",
        showarrow=False,
        font={"size": 12, "color": QUIET},
    )
    figure.update_layout(
        title={"text": titles[0]},
        sliders=[
            {
                "steps": steps,
                "currentvalue": {"prefix": f"{columns.title}: ", "font": {"size": 13, "color": INK}},
                "font": {"size": 12, "color": QUIET},
                "pad": {"t": 54, "b": 4},
            }
        ],
    )
    return figure


def _edges(rates: np.ndarray) -> np.ndarray:
    """Edges of equal bins in log10, from below the smallest rate that occurs up to 1."""
    lowest = np.log10(rates[rates > 0].min(initial=0.1))
    # Whole numbers first: a rate that is a power of ten shall not fall to one side by rounding. Rates have six digits.
    return np.arange(np.floor(lowest * _BINS_PER_DECADE - 1e-5), 1) / _BINS_PER_DECADE + 1e-6


def _bars(edges: np.ndarray, counts: np.ndarray, role: str, colour: str, visible: bool) -> go.Bar:
    shares = [f"{100 * 10**edge:.3g} %" for edge in edges]
    return go.Bar(
        x=((edges[1:] + edges[:-1]) / 2).tolist(),
        y=counts.tolist(),
        marker={"color": colour},
        name=role,
        visible=visible,
        customdata=[f"{low} to {high}" for low, high in pairwise(shares)],
        hovertemplate=f"{role}: <b>%{{y:,}}</b> features<br>active in %{{customdata}} of the rows<extra></extra>",
    )


def _set_axes(figure: go.Figure, edges: np.ndarray, highest: int) -> None:
    """The same axes for all sites, so that they can be compared."""
    powers = range(int(np.ceil(edges[0])), 1)
    figure.update_layout(
        barmode="group",
        bargap=0.1,
        xaxis=axis(
            "share of rows in which a feature is active",
            tickvals=list(powers),
            ticktext=[f"{100 * 10.0**power:g} %" for power in powers],
            range=[float(edges[0]), float(edges[-1])],
        ),
        yaxis=axis("features", range=[0, 1.05 * highest], tickformat=",d"),
    )
