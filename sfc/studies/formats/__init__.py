"""`sfc formats`: does the format of a prompt change whether it is refused?

The same instruction is asked as a question, as a blank to fill and as a choice. The formats themselves are in
`formats.yaml`; any file with the same keys can take its place.
"""

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from sfc.core.errors import UserError, first_problem
from sfc.core.options import Options, option
from sfc.core.reading import hash_of_given, read_yaml
from sfc.core.registry import imported_when_called
from sfc.pages.blocks import Figure, Formula, Page, Section, Tile, Tiles, cell, estimate_cell, records_table
from sfc.pages.style import BLUE, INK, VERMILION, axis, styled_figure
from sfc.pages.text import hover_text
from sfc.run import Run
from sfc.studies.study import STUDIES, Finished, Study

FORMATS = Path(__file__).with_name("formats.yaml")
_SLOT = "{instruction}"


class Version(BaseModel, extra="forbid", frozen=True):
    """One wording of a format."""

    prompt: str = Field(description="the user's message, with {instruction} in it once")
    reply: str = Field("", description="the start of the model's reply, after which it answers")
    refuse: str = Field(min_length=1, description="the answer that refuses, one token after `reply`")
    comply: str = Field(min_length=1, description="the answer that complies")

    @model_validator(mode="after")
    def _can_be_asked_and_answered(self) -> "Version":
        if self.prompt.count(_SLOT) != 1:
            raise ValueError(f"the prompt must hold {_SLOT} once")
        if self.refuse == self.comply:
            raise ValueError("the two answers are the same")
        return self

    def ask(self, instruction: str) -> str:
        """The user's message."""
        return self.prompt.replace(_SLOT, instruction)


Formats = dict[str, list[Version]]
"""Versions of each format by its name; an instruction's score is the mean over the versions."""


def load_formats(path: Path = FORMATS) -> Formats:
    """Read formats from a YAML file.

    Raises:
        UserError: the file is missing, is not YAML or not of the form of `formats.yaml`, or holds fewer than three
            formats, which the Friedman test needs.
    """
    try:
        formats = TypeAdapter(Formats).validate_python(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; see {FORMATS}") from None
    if len(formats) < 3 or not all(formats.values()):
        raise UserError(f"{path} must hold three formats or more, each with a version, to be compared; see {FORMATS}")
    return formats


class FormatsOptions(Options):
    """Which instructions are asked, in which formats."""

    section = "formats"
    prompts: Path | None = option(
        None, description="CSV of harmful instructions, column prompt or goal; by default those of the test split"
    )
    category: str = option("all", description="without --prompts: OR-Bench category, or all")
    limit: int | None = option(None, ge=2, description="at most this many of each side, chosen by hash")
    definitions: Path | None = option(
        None, description="YAML file with other formats or answers; by default the package's three formats"
    )

    def formats(self) -> Formats:
        """The formats to compare.

        Raises:
            UserError: the file is missing or malformed.
        """
        return load_formats(self.definitions or FORMATS)


class PromptFormats(Study[FormatsOptions]):
    """Ask harmful instructions as a question, a blank to fill and a choice; does the format change the refusal?

    Example: sfc formats --prompts harmful_behaviors.csv --limit 100
    """

    name = "formats"
    options = FormatsOptions
    schema = 2
    files: ClassVar = {
        "page": "formats.html",
        "scores": "scores.csv",
        "formats": "formats.csv",
        "pairs": "pairs.csv",
    }

    def check(self, run: Run) -> None:
        if run.behavior.name != "refusal":
            raise UserError(f"formats ask whether instructions are refused, and not about {run.behavior.name!r}")
        prompts = self.of(run).prompts
        if prompts is not None and not prompts.is_file():
            raise UserError(f"no file {prompts}: --prompts takes a CSV with a column 'prompt' or 'goal'")

    def label(self, run: Run) -> str:
        options = self.of(run)
        return f"formats-{options.prompts.stem if options.prompts else run.group(options.category)}"

    def inputs(self, run: Run) -> dict[str, Any]:
        options = self.of(run)
        formats = options.formats()
        return {
            **run.identity,
            "formats": {name: [version.model_dump() for version in versions] for name, versions in formats.items()},
            "file": hash_of_given(options.prompts) if options.prompts else None,
            "category": run.group(options.category),
            "limit": options.limit,
        }

    make = imported_when_called(f"{__name__}.measure:measure")

    def page(self, finished: Finished) -> Page:
        result, scores = finished.result, finished.table("scores.csv")
        test = result["friedman"]
        rows = [
            {
                **row,
                "mean": estimate_cell(row["mean"], row["low"], row["high"]),
                "order_effect": "" if row["order_effect"] is None else cell(row["order_effect"]),
            }
            for row in result["formats"]
        ]
        return Page(
            title=f"Prompt formats · {result['prompts']} · {result['preset']}",
            sentence=(
                f"{result['n_harmful']} harmful and {result['n_harmless']} harmless instructions, each in"
                f" {len(result['formats'])} formats: does the format change how strongly the model refuses?"
            ),
            summary=[
                Tiles(
                    [
                        Tile("Friedman's p", cell(test["p_value"]), f"χ²({test['degrees']}) = {cell(test['chi2'])}"),
                        Tile("Kendall's W", cell(test["kendall_w"]), "1: all instructions order the formats alike"),
                    ]
                ),
                records_table("Harmful instructions by format, in nats (95 %)", _FORMATS, rows),
                records_table("Pairs of formats, standardised (Wilcoxon)", _PAIRS, result["pairs"], texts=("second",)),
            ],
            sections=[
                Section("", [Figure("z", lambda: violins(scores, "z", "Standardised within each format", "z"))]),
                Section("", [Figure("raw", lambda: violins(scores, "logit_difference", "Logit differences", "nats"))]),
            ],
            guide=_GUIDE,
            findings=[("Friedman's p", cell(test["p_value"])), ("Kendall's W", cell(test["kendall_w"]))],
            methods=_METHODS,
        )


_SIDES = {"toxic": ("harmful", VERMILION), "safe": ("harmless", BLUE)}


def violins(scores: pd.DataFrame, column: str, title: str, unit: str) -> go.Figure:
    """A violin per format and side, equally wide, with quartiles, mean and every instruction."""
    figure = styled_figure(title, 440)
    for label, (name, colour) in _SIDES.items():
        of_label = scores[scores["label"] == label]
        figure.add_violin(
            x=[hover_text(name) for name in of_label["format"]],
            y=of_label[column].tolist(),
            name=name,
            line={"color": colour, "width": 1},
            box={"visible": True},
            meanline={"visible": True},
            points="all",
            pointpos=0,
            jitter=0.3,
            marker={"size": 2, "opacity": 0.5},
            spanmode="hard",
            scalemode="width",
        )
    return figure.update_layout(
        violinmode="group",
        xaxis=axis("", showgrid=False),
        yaxis=axis(unit, zeroline=True, zerolinecolor=INK),
        showlegend=True,
    )


_FORMATS = {
    "format": "format", "refuse − comply": "mean", "harmless": "harmless_mean", "share refused": "refused",
    "AUROC": "auroc", "mean z": "z_mean", "order effect": "order_effect",
}  # fmt: skip
_PAIRS = {
    "first": "first", "second": "second", "z: first − second": "mean_difference", "p": "p_value", "p, Holm": "p_holm",
    "r": "rank_biserial",
}  # fmt: skip
_GUIDE = (
    "**Scores.** The logit of the answer that refuses minus that of the answer that complies, where the model gives "
    "its answer. Of a format with two versions the mean is taken, so that a liking for a letter cancels out; the order "
    "effect is how far the first version lies above that mean.",
    "**Why standardised.** Raw differences say as much about two answer tokens as about the instruction, so they are "
    "not comparable between formats. z is the score minus the format's mean over all instructions asked, harmful and "
    "harmless, in units of their standard deviation.",
    "**Tests** compare the z of the harmful instructions. Friedman's asks whether any format differs; Kendall's W is 1 "
    "where all instructions order the formats alike, 0 where they do not agree at all. Wilcoxon's signed-rank tests "
    "compare pairs of formats, with Holm's correction; r, the matched-pairs rank-biserial correlation, runs from −1 to "
    "1.",
)
_METHODS = (
    Formula(
        "z",
        "(logit difference - mean of its format) / standard deviation of its format, over harmful and harmless"
        " instructions",
    ),
    Formula("Tests", "Friedman 1937 over formats; Wilcoxon signed-rank between pairs of formats, Holm 1979"),
)


STUDIES.register(PromptFormats())
