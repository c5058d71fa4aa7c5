"""Behaviour, the refusal direction with its probe, prompt formats, and whatever else left figures behind."""

from collections.abc import Mapping
from typing import Any

from sfc.reports.blocks import Block, Figure, Formula, Paragraph, Table, cell, interval_cell
from sfc.reports.found import Found
from sfc.reports.kinds.kind import Kind, records_table
from sfc.viewer.formats import violins
from sfc.viewer.probe import accuracy_figure, separation_figure

_MOST_ROWS = 40


def _rates(found: Found) -> Table:
    rows = [
        (
            row["category"],
            row["label"],
            cell(row["n"]),
            cell(row["refusals"]),
            cell(row["rate"]),
            interval_cell(row["low"], row["high"]),
        )
        for row in found.table("groups.csv").to_dict("records")
    ]
    return Table("Judged refusals", ("category", "label", "prompts", "refusals", "rate", "95 %"), rows)


BEHAVIOUR = Kind(
    title=lambda found: f"Behaviour: {found.name.partition('-')[2]}",
    summary=lambda found: [("AUROC of the score against judged refusals", cell(found.result.get("auroc")))],
    blocks=lambda found: [_rates(found)],
    methods=(
        Formula(
            "Refusal", "a greedy reply whose first words refuse, by a judge of phrases; never the data set's label"
        ),
        Formula("Interval of a rate", "Wilson 1927, 95 %"),
    ),
    limits=lambda found: ["Refusals are judged by phrases that open a reply; a refusal in other words is missed."],
)

_LAYERS = {
    "layer": "layer", "norm": "norm", "separation": "separation", "from": "separation_low", "to": "separation_high",
    "AUROC": "auroc", "probe": "accuracy", "shuffled": "control", "shuffled, 95th percentile": "control_high",
    "p": "p_value",
}  # fmt: skip


def _probe_summary(found: Found) -> list[tuple[str, str]]:
    best = max(found.result["layers"], key=lambda row: (row["separation"] is not None, row["separation"]))
    place = f"layer {best['layer']}, where separation is largest"
    names = {"separation": "separation", "probe accuracy": "accuracy", "with shuffled labels": "control"}
    return [(f"{name}, {place}", cell(best[field])) for name, field in names.items()]


def _probe_blocks(found: Found) -> list[Block]:
    layers = found.table("layers.csv")
    table = records_table("Every layer", _LAYERS, layers.to_dict("records"))  # pyright: ignore[reportArgumentType]
    return [Figure(separation_figure(layers), table), Figure(accuracy_figure(layers))]


PROBE = Kind(
    title=lambda found: f"Refusal direction and probe: {found.result['category']}",
    summary=_probe_summary,
    blocks=_probe_blocks,
    methods=(
        Formula(
            "Refusal direction (Arditi et al. 2024)",
            "mean over toxic - mean over safe discovery prompts, residual stream at the last position",
        ),
        Formula("Separation", "(mean of toxic - mean of safe projections) / pooled standard deviation, test prompts"),
        Formula(
            "Probe",
            "ridge regression on the standardised residual stream, accuracy by cross-validation; the"
            " control is the same with labels shuffled within folds (Hewitt and Liang 2019)",
        ),
    ),
    limits=lambda found: ["That a probe can read a layer does not mean that the model reads it."],
)

_FORMATS = {
    "format": "format", "refuse - comply, nats": "mean", "from": "low", "to": "high", "harmless": "harmless_mean",
    "refused": "refused", "AUROC": "auroc", "z": "z_mean",
}  # fmt: skip
_PAIRS = {
    "first": "first", "second": "second", "z first - second": "mean_difference", "p": "p_value", "p, Holm": "p_holm",
    "rank-biserial r": "rank_biserial",
}  # fmt: skip


def _formats_blocks(found: Found) -> list[Block]:
    result = found.result
    test = records_table("Friedman's test of z", {"chi2": "chi2", "degrees of freedom": "degrees", "p": "p_value",
                                                  "Kendall's W": "kendall_w"}, [result["friedman"]])  # fmt: skip
    return [
        Figure(
            violins(found.table("scores.csv"), "z", "Standardised within each format", "z"),
            records_table("Harmful instructions by format", _FORMATS, result["formats"]),
        ),
        test,
        records_table("Pairs of formats (Wilcoxon)", _PAIRS, result["pairs"]),
    ]


FORMATS = Kind(
    title=lambda found: f"Prompt formats: {found.result['prompts']}",
    summary=lambda found: [
        ("Friedman's p", cell(found.result["friedman"]["p_value"])),
        ("Kendall's W", cell(found.result["friedman"]["kendall_w"])),
    ],
    blocks=_formats_blocks,
    methods=(
        Formula(
            "z",
            "(logit difference - mean of its format) / standard deviation of its format, over harmful and"
            " harmless instructions",
        ),
        Formula("Tests", "Friedman 1937 over formats; Wilcoxon signed-rank between pairs of formats, Holm 1979"),
    ),
)


def _other_blocks(found: Found) -> list[Block]:
    """Every figure of a result: plain ones in one table, lists of records each in one of their own."""
    plain, tables = [], []
    for name, value in _flat(found.result):
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            fields = {str(field).replace("_", " "): str(field) for field in value[0]}
            tables.append(records_table(name.replace("_", " "), fields, value[:_MOST_ROWS]))
        elif isinstance(value, list):
            plain.append((name, ", ".join(map(cell, value[:_MOST_ROWS]))))
        else:
            plain.append((name, cell(value)))
    rows = [(name.replace("_", " "), value) for name, value in plain]
    return [Table("Figures", ("figure", "value"), rows) if rows else Paragraph("It left no figures."), *tables]


def _flat(result: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in result.items():
        if name in ("files", "seconds", "preset"):
            continue
        pairs += _flat(value, f"{before}{name}: ") if isinstance(value, Mapping) else [(f"{before}{name}", value)]
    return pairs


def _first_words(name: str) -> str:
    return f"{name[:1].upper()}{name[1:]}".replace("-", ": ", 1)


OTHER = Kind(title=lambda found: _first_words(found.name), summary=lambda found: [], blocks=_other_blocks)

REPLICATION = OTHER._replace(
    title=lambda found: (
        f"Replication with SAEs from another seed: {found.result['category']}, {found.result['method']}"
    ),
    summary=lambda found: [
        ("Jaccard, nodes of both circuits", cell(found.result["jaccard"])),
        ("by chance", cell(found.result["chance"])),
    ],
    methods=(
        Formula(
            "The same feature (after Paulo and Belrose 2025)",
            "mutual nearest neighbours by the cosine of decoder directions, of at least 0.7",
        ),
    ),
)
