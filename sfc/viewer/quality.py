"""The page of a run's dictionaries: what they reconstruct, how often their features fire, what splicing them costs."""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sfc.viewer.density import density_figure
from sfc.viewer.document import figure_html, guide_html, header_html, write_document
from sfc.viewer.quality_figures import reconstruction_figure, splicing_figure
from sfc.viewer.text import NOT_MEASURABLE, count_text, number_text, printable


def write_quality_page(
    path: Path, preset: str, quality: pd.DataFrame, density: pd.DataFrame, dense_rate: float
) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes.

    Args:
        quality: a row per `site` and `role`, the role `all` first: `rows`, `fvu`, `cosine`, `l0`, `dead_share`,
            `dense_share`, and in the rows of `all` the figures of `sfc.saes.splice.SplicingQuality`. NaN is not
            measurable.
        density: a row per `site` and `feature`, a column per role: the share of rows in which the feature is active.
        dense_rate: above this share a feature counts as dense.
    """
    title = f"SAE quality · {preset}"
    of_all = quality[quality["role"] == "all"]
    body = f"""{header_html(title, _sentence(quality, density))}
<section class="card graph">{figure_html("reconstruction", reconstruction_figure(quality))}</section>
<section class="card graph">{figure_html("density", density_figure(density, dense_rate))}</section>
<section class="card graph">{figure_html("splicing", splicing_figure(quality))}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_guide(dense_rate))}</section>
<section class="card scroll"><h2>Spliced into the model</h2>{_table(of_all, ["site"], _SPLICING)}</section>
<section class="card scroll"><h2>Reconstruction</h2>{_table(quality, ["site", "role"], _RECONSTRUCTION)}</section>"""
    write_document(path, title, body)


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
        "<b>Variance unexplained</b> = squared error over squared distance from the mean of the same rows: of all of "
        "them, or of those of one role around that role's own mean. 0 is perfect, 1 no better than the mean. The "
        "figure of all rows counts the variance between the roles as well, and is no average of the roles'.",
        "<b>Roles.</b> Content is the user's text; the suffix is the template after it, a handful of tokens that are "
        "the same in every prompt, at whose end the model decides; a reply is what the model wrote after that. The "
        "fewer kinds of rows, the fewer features fire.",
        "<b>L0</b> is the mean number of active features in a row. <b>Dead</b> features are active in none of these "
        f"rows, <b>dense</b> ones in more than {100 * dense_rate:g} % of them. The histograms count features by the "
        "share of rows in which they are active; move the slider to change the site.",
        "<b>Splicing.</b> The reconstruction replaces the activation of every token at one site, except padding and "
        "the first token. Loss recovered = (ablated − spliced) / (ablated − as it is), of cross-entropies; score "
        "recovered = 1 − mean |s spliced − s| / mean |s ablated − s|, over prompts; |change| is mean |s spliced − s|. "
        "1 is perfect, 0 no better than the ablation, which sets the activation to its mean or to zero. Where that "
        "does hardly any harm there is nothing to recover: not measurable, a gap in the line.",
    )


class _Column(NamedTuple):
    name: str
    title: str
    text: Callable[[float], str] = number_text


class _Group(NamedTuple):
    title: str
    columns: Sequence[_Column]


def _count(value: float) -> str:
    return f"{int(value):,}"


def _percent(value: float) -> str:
    return NOT_MEASURABLE if math.isnan(value) else f"{100 * value:.2f} %"


_RECONSTRUCTION = (
    _Group("", [_Column("rows", "rows", _count)]),
    _Group(
        "x and its reconstruction",
        [_Column("fvu", "variance unexplained"), _Column("cosine", "cosine"), _Column("l0", "L0")],
    ),
    _Group("features", [_Column("dead_share", "dead", _percent), _Column("dense_share", "dense", _percent)]),
)
_SPLICING = (
    _Group(
        "cross-entropy (nats)",
        [
            _Column("cross_entropy", "as it is"),
            _Column("cross_entropy_spliced", "spliced"),
            _Column("cross_entropy_mean_ablated", "mean"),
            _Column("cross_entropy_zero_ablated", "zero"),
        ],
    ),
    _Group("recovered of", [_Column("loss_recovered", "mean"), _Column("loss_recovered_zero", "zero")]),
    _Group(
        "refusal score (nats)",
        [
            _Column("score", "as it is"),
            _Column("score_spliced", "spliced"),
            _Column("score_mean_ablated", "mean"),
            _Column("score_zero_ablated", "zero"),
            _Column("score_change_spliced", "|change|"),
        ],
    ),
    _Group("recovered of", [_Column("score_recovered", "mean"), _Column("score_recovered_zero", "zero")]),
)


def _table(quality: pd.DataFrame, keys: Sequence[str], groups: Sequence[_Group]) -> str:
    """A row for each row of the frame; `keys` are the columns of text that say what it is about."""
    columns = [column for group in groups for column in group.columns]
    above = "".join(
        f'<th scope="colgroup" colspan="{len(group.columns)}" class="number">{escape(group.title)}</th>'
        for group in groups
    )
    heads = [f'<th scope="col">{key}</th>' for key in keys]
    heads += [f'<th scope="col" class="number">{escape(column.title)}</th>' for column in columns]
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(printable(row[key]))}</td>" for key in keys)
        + "".join(f'<td class="number">{column.text(row[column.name])}</td>' for column in columns)
        + "</tr>"
        for row in quality.to_dict("records")
    )
    return (
        f'<table><thead><tr><th colspan="{len(keys)}"></th>{above}</tr><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
