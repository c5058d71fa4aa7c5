"""The page of a run's dictionaries: what they reconstruct, how often their features fire, what splicing them costs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.pages.blocks import Figure, Formula, Page, Section, Table, cell, records_table
from sfc.pages.graph import Columns, columns_of_sites
from sfc.pages.style import BLUE, INK, PINK, QUIET, ROLE_COLOURS, VERMILION, axis, styled_figure
from sfc.pages.text import count_text, hover_text
from sfc.studies.study import Finished

_HEIGHT = 470
_BINS_PER_DECADE = 5


def density_figure(density: pd.DataFrame, dense_rate: float) -> go.Figure:
    """Histograms of log10 firing rates, a colour for each role, with a slider over the sites.

    Features that never fire have no logarithm; the title counts them.

    Args:
        density: a row per `site` and `feature`, a column per role: the share of rows in which it is active.
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
    # Whole numbers first: a rate that is a power of ten must not fall to one side by rounding. Rates have six digits.
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


_ALL, _IN_SERIES = "all", "in series"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_MOST_LABELS = 12


class _Panel(NamedTuple):
    column: str
    title: str
    unit: str
    digits: str


class _Line(NamedTuple):
    column: str
    name: str
    colour: str
    symbol: str
    dash: str


_FIGURES = (
    _Panel("fvu", "Variance unexplained", "share of variance", ".3f"),
    _Panel("cosine", "Cosine of x and its reconstruction", "cosine", ".3f"),
    _Panel("l0", "Active features (L0)", "features per row", ",.1f"),
    _Panel("dead_share", "Dead features", "share of features", ".1%"),
    _Panel("dense_share", "Dense features", "share of features", ".2%"),
)
_RUNS = (
    _Line("{}", "as it is", INK, "circle", "dash"),
    _Line("{}_spliced", "SAE spliced in", BLUE, "circle", "solid"),
    _Line("{}_mean_ablated", "mean-ablated", VERMILION, "square", "solid"),
    _Line("{}_zero_ablated", "zero-ablated", PINK, "diamond", "solid"),
)
_RECOVERED = (
    _Line("{}_recovered", "recovered of mean-ablation", VERMILION, "square", "dot"),
    _Line("{}_recovered_zero", "recovered of zero-ablation", PINK, "diamond", "dot"),
)


def reconstruction_figure(quality: pd.DataFrame) -> go.Figure:
    """Small multiples: one figure per panel, sites from left to right, a line for each role.

    Args:
        quality: a row per `site` and `role`, with `fvu`, `cosine`, `l0`, `dead_share`, `dense_share`.
    """
    figure = styled_figure("Reconstruction of held-out rows, by site and role of the token", 560)
    make_subplots(
        rows=2, cols=3, figure=figure, subplot_titles=_headings([panel.title for panel in _FIGURES]),
        horizontal_spacing=0.07, vertical_spacing=0.2,
    )  # fmt: skip
    columns = columns_of_sites(_sites(quality))
    for number, panel in enumerate(_FIGURES):
        row, column = divmod(number, 3)
        for rank, role in enumerate(quality["role"].unique()):
            values = _by_site(quality[quality["role"] == role], panel.column, columns)
            line = _Line(
                panel.column, role, ROLE_COLOURS[rank % len(_SYMBOLS)], _SYMBOLS[rank % len(_SYMBOLS)], "solid"
            )
            hover = f"{role}: <b>%{{y:{panel.digits}}}</b> {panel.unit}"
            figure.add_trace(_line(line, values, columns, hover, number == 0), row + 1, column + 1)
        # Cosines lie close together, far from 0.
        ticks = {"rangemode": "normal" if panel.column == "cosine" else "tozero"}
        if panel.digits.endswith("%"):
            ticks["tickformat"] = ".0%"
        figure.update_yaxes(axis(panel.unit, **ticks), row=row + 1, col=column + 1)
        figure.update_xaxes(_site_axis(columns), row=row + 1, col=column + 1)
    # The sixth place is the legend's.
    figure.update_layout(legend={"orientation": "v", "x": 0.72, "y": 0.34, "yanchor": "top", "title": "rows"})
    return figure


def splicing_figure(quality: pd.DataFrame, score: str) -> go.Figure:
    """Cross-entropy and score of the model with each site replaced, above the shares that are recovered."""
    quality = quality[quality["role"] == _ALL]
    columns = columns_of_sites(_sites(quality))
    figure = styled_figure("The model with one site replaced, on held-out prompts", 640)
    score = f"{score[:1].upper()}{score[1:]}"
    headings = (
        "Cross-entropy of the next token", f"{score} after the prompt",
        "Loss recovered by the SAE", f"{score} recovered by the SAE",
    )  # fmt: skip
    make_subplots(
        rows=2,
        cols=2,
        figure=figure,
        subplot_titles=_headings(headings),
        horizontal_spacing=0.08,
        vertical_spacing=0.18,
    )
    for column, (level, recovered) in enumerate((("cross_entropy", "loss"), ("score", "score")), start=1):
        for row, lines, prefix, unit in ((1, _RUNS, level, "nats"), (2, _RECOVERED, recovered, "share recovered")):
            for line in lines:
                values = _by_site(quality, line.column.format(prefix), columns)
                hover = f"{line.name}: <b>%{{y:.3f}}</b>{' nats' if row == 1 else ''}"
                figure.add_trace(_line(line, values, columns, hover, column == 1), row, column)
            figure.update_yaxes(axis(unit), row=row, col=column)
            figure.update_xaxes(_site_axis(columns), row=row, col=column)
        figure.add_hline(1, line={"color": QUIET, "width": 1}, row=2, col=column)  # pyright: ignore[reportArgumentType]
    figure.update_layout(margin={"t": 118}, legend={"y": 1.06})
    return figure


def _headings(titles: Sequence[str]) -> list[str]:
    return [f"<span style='font-size:13px'><b>{title}</b></span>" for title in titles]


def _sites(quality: pd.DataFrame) -> list[str]:
    return list(quality["site"].unique())


def _by_site(quality: pd.DataFrame, column: str, columns: Columns) -> list[float | None]:
    """A value for each site; None, a gap in the line, where there is none or it is not measurable."""
    values = dict(zip(quality["site"], quality[column], strict=True))
    return [float(values[site]) if np.isfinite(values.get(site, np.nan)) else None for site in columns.sites]


def _line(line: _Line, values: list[float | None], columns: Columns, hover: str, in_legend: bool) -> go.Scatter:
    return go.Scatter(
        x=list(range(len(values))),
        y=values,
        mode="lines+markers",
        line={"color": line.colour, "width": 2, "dash": line.dash},
        marker={"color": line.colour, "size": 7, "symbol": line.symbol},
        name=line.name,
        legendgroup=line.name,
        showlegend=in_legend,
        customdata=[hover_text(site) for site in columns.sites],
        hovertemplate=f"{hover}<br>%{{customdata}}<extra></extra>",
    )


def _site_axis(columns: Columns) -> dict:
    places = list(range(len(columns.sites)))
    step = -(-len(places) // _MOST_LABELS) or 1
    return axis(columns.title, tickvals=places[::step], ticktext=columns.labels[::step], tickangle=0, showgrid=False)


def quality_page(finished: Finished) -> Page:
    """The page of a run's dictionaries."""
    quality, density = finished.table("quality.csv"), finished.table("density.csv")
    quality = quality[quality["role"] != _IN_SERIES].astype({"rows": int})
    words, score = finished.words, finished.words.score
    rows = {role: [row for row in finished.result["quality"] if row["role"] == role] for role in (_ALL, _IN_SERIES)}
    of_all, restored = rows[_ALL], [*rows[_ALL], *({**row, "site": _IN_SERIES} for row in rows[_IN_SERIES])]
    came_back = any(row.get("matched") is not None for row in of_all)
    fvu = [row["fvu"] for row in of_all if row["fvu"] is not None]
    return Page(
        title=f"SAE quality · {finished.result['preset']}",
        sentence=_sentence(quality, density),
        summary=[
            records_table("SAEs on held-out rows (loss, score: share recovered)", _SUMMARY, of_all),
            records_table("What all features restore, errors ablated", {
                "site": "site", words.positive: "restored_toxic", words.negative: "restored_safe",
                "agreement": "agreement",
            }, restored),
            records_table("What features tell of test prompts (AUROC)", _PROBED, of_all),
            *([records_table("Features that came back", _MATCHED, of_all)] if came_back else []),
        ],
        sections=[
            Section("", [Figure("reconstruction", lambda: reconstruction_figure(quality))]),
            Section("", [Figure("density", lambda: density_figure(density, finished.result["dense_rate"]))]),
            Section("", [Figure("splicing", lambda: splicing_figure(quality, score))]),
            Section("Spliced into the model", [
                records_table("Cross-entropy (nats), and the share recovered of each ablation", _LOSSES, of_all),
                records_table(f"{score[:1].upper()}{score[1:]} (nats), and the share recovered", _SCORES, of_all),
            ]),
            Section("Reconstruction", [
                _reconstruction_table([row for row in finished.result["quality"] if row["role"] != _IN_SERIES])
            ]),
        ],
        guide=_guide(finished.result["dense_rate"]),
        findings=[("fraction of variance unexplained, mean over sites", cell(sum(fvu) / len(fvu) if fvu else None))],
        methods=(
            Formula("Variance unexplained", "sum |x - x_hat|^2 / sum |x - mean x|^2, over held-out rows"),
            Formula("Restored", "(s_spliced - s_counterfactual) / (s - s_counterfactual), sums over pairs of prompts"),
            Formula("Recovered", "share of what ablating the site to its mean costs that the reconstruction wins back"),
        ),
    )  # fmt: skip


_SUMMARY = {
    "site": "site", "FVU": "fvu", "cosine": "cosine", "L0": "l0", "dead": "dead_share", "loss": "loss_recovered",
    "score": "score_recovered",
}  # fmt: skip


_PROBED = {
    "site": "site",
    **{
        f"{target}: {name}": f"probe_{target}_{column}"
        for target in ("label", "category")
        for name, column in {
            "all of x": "dense", "1 feature": "1", "5": "5", "random: 1": "1_random", "5 ": "5_random",
        }.items()
    },
}  # fmt: skip
_MATCHED = {"site": "site", "in the other half": "matched", "by chance": "matched_chance"}


_LOSSES = {
    "site": "site", "as it is": "cross_entropy", "spliced": "cross_entropy_spliced",
    "mean": "cross_entropy_mean_ablated", "zero": "cross_entropy_zero_ablated", "recovered of mean": "loss_recovered",
    "of zero": "loss_recovered_zero",
}  # fmt: skip
_SCORES = {
    "site": "site", "as it is": "score", "spliced": "score_spliced", "mean": "score_mean_ablated",
    "zero": "score_zero_ablated", "|change|": "score_change_spliced", "recovered of mean": "score_recovered",
    "of zero": "score_recovered_zero",
}  # fmt: skip


def _reconstruction_table(quality: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            row["site"],
            row["role"],
            *(cell(row[name]) for name in ("rows", "fvu", "cosine", "l0")),
            *(_percent(row[name]) for name in ("dead_share", "dense_share")),
        )
        for row in quality
    ]
    columns = ("site", "role", "rows", "variance unexplained", "cosine", "L0", "dead", "dense")
    return Table("", columns, rows, texts=("role",))


def _percent(share: float | None) -> str:
    return cell(share) if share is None else f"{100 * share:.2f} %"


def _sentence(quality: pd.DataFrame, density: pd.DataFrame) -> str:
    first = quality[quality["site"] == quality["site"].iloc[0]]
    of_roles = ", ".join(f"{rows:,} {role}" for role, rows in zip(first["role"], first["rows"], strict=True))
    sizes = density.groupby("site", sort=False).size()
    features = f"{sizes.min():,}" if sizes.min() == sizes.max() else f"{sizes.min():,} to {sizes.max():,}"
    return (
        f"{count_text(len(sizes), 'sparse autoencoder')} of {features} features, measured on activations kept "
        f"from training. Rows at a site: {of_roles}."
    )


def _guide(dense_rate: float) -> tuple[str, ...]:
    return (
        "**Variance unexplained** = squared error over squared distance from the mean of the same rows: of all of "
        "them, or of those of one role around that role's own mean. 0 is perfect, 1 no better than the mean. The "
        "figure of all rows counts the variance between the roles as well, and is no average of the roles'.",
        "**Roles.** Content is the user's text; the suffix is the template after it, a handful of tokens that are "
        "the same in every prompt; deciding are the last of them, one in each prompt, after which the model begins its "
        "reply; a reply is what the model wrote after that. The fewer kinds of rows, the fewer features fire.",
        "**L0** is the mean number of active features in a row. **Dead** features are active in none of these "
        f"rows, **dense** ones in more than {100 * dense_rate:g} % of them. The histograms count features by the "
        "share of rows in which they are active; move the slider to change the site.",
        "**Restored.** A prompt and an equally long one of the other side: features are what the prompt gives them, "
        "errors are the other's. The share of the difference between their two scores that is there then, by the "
        "prompt's side, and the agreement of the scores on both (1 where every prompt has its own). One dictionary at "
        "a time, and all in series, as a circuit has them. The prompts explained are discovery prompts that were not "
        "trained on.",
        "**What features tell.** Features, averaged over the tokens of a prompt, tell its label, or its category among "
        "all (mean over categories). Probes read one feature, five, or the whole activation, and five or one of a "
        "dictionary of random directions; they are learned on discovery prompts, and the AUROC is of test prompts.",
        "**Features that came back**: where SAEs were trained on the other half of the prompts, the share of the live "
        "features that have one there of cosine 0.7, each the other's nearest; by chance: where those are turned at "
        "random.",
        "**Splicing.** The reconstruction replaces the activation of every token at one site, except padding and "
        "the first token. Loss recovered = (ablated − spliced) / (ablated − as it is), of cross-entropies; score "
        "recovered = 1 − mean |s spliced − s| / mean |s ablated − s|, over prompts; |change| is mean |s spliced − s|. "
        "1 is perfect, 0 no better than the ablation, which sets the activation to its mean or to zero. Where that "
        "does hardly any harm there is nothing to recover: not measurable, a gap in the line.",
    )
