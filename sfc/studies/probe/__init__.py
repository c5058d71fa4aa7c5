"""`sfc probe`: at which layers can the two sides be told apart?"""

from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd
import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.core.options import Options, option
from sfc.core.registry import imported_when_called
from sfc.pages.blocks import Figure, Formula, Page, Section, cell, records_table
from sfc.pages.style import BLUE, QUIET, VERMILION, axis, error_bars, styled_figure
from sfc.run import Run
from sfc.studies.study import STUDIES, Finished, Study


class ProbeOptions(Options):
    """Whose prompts are told apart."""

    section = "probe"
    category: str | None = option(None, description="OR-Bench category, or all. [default: violence]")


class Probe(Study[ProbeOptions]):
    """At which layers can the two sides be told apart? The refusal direction, and a linear probe beside it.

    Example: sfc probe --category all
    """

    name = "probe"
    options = ProbeOptions
    files: ClassVar = {"page": "probe.html", "layers": "layers.csv"}
    model_columns: ClassVar = {
        "n_layers": "layers", "best_layer": "best layer", "separation": "separation", "probe_accuracy": "probe",
        "probe_control": "shuffled",
    }  # fmt: skip
    model_headline: ClassVar = ("separation", "probe_accuracy")

    def label(self, run: Run) -> str:
        return f"probe-{run.group(self.of(run).category)}"

    def inputs(self, run: Run) -> dict[str, Any]:
        return {**run.identity, "category": run.group(self.of(run).category)}

    make = imported_when_called(f"{__name__}.measure:measure")

    def page(self, finished: Finished) -> Page:
        layers = finished.table("layers.csv")
        result, words = finished.result, finished.words
        best = max(result["layers"], key=lambda row: (row["separation"] is not None, row["separation"]))
        place = f"layer {best['layer']}, where separation is largest"
        named = {"separation": "separation", "probe accuracy": "accuracy", "with shuffled labels": "control"}
        title = (
            f"{result['category']}: {words.direction} (separation in pooled standard deviations on {result['n_test']}"
            f" test prompts) and linear probe ({result['n_folds']}-fold accuracy on {result['n_prompts']})"
        )
        table = records_table("Every layer", _COLUMNS, finished.records("layers.csv"))
        return Page(
            title=f"{words.direction.capitalize()} and probe · {result['category']} · {result['preset']}",
            sentence=(
                f"At which layers can {result['n_prompts']} {words.positive} and {words.negative} prompts be told apart"
                " from the residual stream at the last position? The direction comes from"
                f" {result['n_discovery']} discovery prompts and is judged on {result['n_test']} test prompts; the"
                f" probe is judged by {result['n_folds']}-fold cross-validation over all."
            ),
            summary=[records_table(title, _SUMMARY, result["layers"])],
            sections=[
                Section("", [Figure("separation", lambda: separation_figure(layers, words), table)]),
                Section("", [Figure("accuracy", lambda: accuracy_figure(layers))]),
            ],
            guide=_guide(result, words),
            findings=[(f"{name}, {place}", cell(best[field])) for name, field in named.items()],
            methods=_methods(words),
            limits=["That a probe can read a layer does not mean that the model reads it."],
        )

    def model_row(self, finished: Finished) -> dict[str, Any]:
        layers = finished.result["layers"]
        measured = [row for row in layers if row["separation"] is not None]
        if not measured:
            return {"n_layers": len(layers)}
        best = max(measured, key=lambda row: row["separation"])
        return {
            "n_layers": len(layers),
            "best_layer": best["layer"],
            "separation": best["separation"],
            "probe_accuracy": best["accuracy"],
            "probe_control": best["control"],
        }


_HEIGHT = 420
_BAND = "rgba(122,130,140,0.22)"


def separation_figure(layers: pd.DataFrame, words: Words) -> go.Figure:
    """Separation along the direction on test prompts, layer by layer, with its interval."""
    figure = styled_figure(f"Separation along the {words.direction}, test prompts", _HEIGHT)
    known = layers.dropna(subset=["separation"])
    figure.add_scatter(
        x=known["layer"].tolist(),
        y=known["separation"].tolist(),
        error_y=error_bars(known["separation"], known["separation_low"], known["separation_high"]),
        mode="lines+markers",
        line={"color": VERMILION},
        customdata=known[["separation_low", "separation_high", "auroc"]].to_numpy().tolist(),
        hovertemplate="layer %{x}: <b>%{y:.2f}</b> (%{customdata[0]:.2f} to %{customdata[1]:.2f})<br>"
        "AUROC %{customdata[2]:.3f}<extra></extra>",
    )
    return figure.update_layout(
        xaxis=axis("layer", tickformat="d", showgrid=False),
        yaxis=axis("pooled standard deviations", zeroline=True, rangemode="tozero"),
    )


def accuracy_figure(layers: pd.DataFrame) -> go.Figure:
    """Accuracy of the probe on held-out prompts, layer by layer, above that of probes with shuffled labels."""
    figure = styled_figure("Linear probe, held-out prompts", _HEIGHT)
    places = layers["layer"].tolist()
    figure.add_scatter(
        x=[*places, *places[::-1]],
        y=[*layers["control_high"].tolist(), *layers["control"].tolist()[::-1]],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=_BAND,
        name="shuffled labels, up to the 95th percentile",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=places,
        y=layers["control"].tolist(),
        mode="lines+markers",
        line={"color": QUIET, "dash": "dot"},
        marker={"size": 4},
        name="shuffled labels, mean",
        hovertemplate="layer %{x}, shuffled: <b>%{y:.1%}</b><extra></extra>",
    )
    figure.add_scatter(
        x=places,
        y=layers["accuracy"].tolist(),
        error_y=error_bars(layers["accuracy"], layers["accuracy_low"], layers["accuracy_high"]),
        mode="lines+markers",
        line={"color": BLUE},
        name="probe",
        customdata=layers[["accuracy_low", "accuracy_high", "p_value"]].to_numpy().tolist(),
        hovertemplate="layer %{x}: <b>%{y:.1%}</b> (%{customdata[0]:.1%} to %{customdata[1]:.1%})<br>"
        "p %{customdata[2]:.2g}<extra></extra>",
    )
    return figure.update_layout(
        showlegend=True,
        xaxis=axis("layer", tickformat="d", showgrid=False),
        yaxis=axis("accuracy", tickformat=".0%", range=[min(0.4, float(layers["accuracy_low"].min())), 1.02]),
    )


def _guide(result: Mapping[str, Any], words: Words) -> tuple[str, ...]:
    positive, negative = words.positive, words.negative
    return (
        f"**Direction.** The difference of the means over {positive} and over {negative} discovery prompts. Separation"
        f" = (mean of {positive} − mean of {negative} projections on it) / pooled standard deviation, on test prompts."
        f" AUROC is the chance that a {positive} prompt lies further along it than a {negative} one.",
        "**Probe.** Ridge regression on the standardised residual stream, fitted to all folds but one and judged on "
        "that one: no prompt is judged by a probe that was fitted to it.",
        f"**Control.** The same with labels shuffled within folds, {result['n_shuffles']} times. What lies within "
        "the grey band, the procedure would find where there is nothing; p is the share of shuffles that do as well.",
        "**What it does not say.** That a layer can be read does not mean that the model reads it. Labels are the "
        f"data set's ({positive} or {negative}), not what the model did. Activation patching asks what is used.",
    )


_SUMMARY = {
    "layer": "layer", "norm": "norm", "separation": "separation", "AUROC": "auroc", "probe": "accuracy",
    "shuffled": "control", "p": "p_value",
}  # fmt: skip
_COLUMNS = {
    "layer": "layer", "norm": "norm", "of mean norm": "relative_norm", "separation": "separation",
    "from": "separation_low", "to": "separation_high", "AUROC": "auroc", "probe": "accuracy",
    "probe from": "accuracy_low", "probe to": "accuracy_high", "shuffled": "control",
    "shuffled, 95th percentile": "control_high", "p": "p_value",
}  # fmt: skip


def _methods(words: Words) -> tuple[Formula, ...]:
    positive, negative = words.positive, words.negative
    return (
        Formula(
            f"{words.direction.capitalize()} (Arditi et al. 2024)",
            f"mean over {positive} - mean over {negative} discovery prompts, residual stream at the last position",
        ),
        Formula(
            "Separation",
            f"(mean of {positive} - mean of {negative} projections) / pooled standard deviation, test prompts",
        ),
        Formula(
            "Probe",
            "ridge regression on the standardised residual stream, accuracy by cross-validation; the control is the"
            " same with labels shuffled within folds (Hewitt and Liang 2019)",
        ),
    )


STUDIES.register(Probe())
