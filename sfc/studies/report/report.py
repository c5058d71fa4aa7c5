"""The report: a summary, how figures are measured, each artifact, what the limits are, and how to reproduce it.

Stage: the report of a run, from the files of its artifacts alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sfc.core.artifacts import Artifact, write_text
from sfc.core.errors import UserError
from sfc.pages.blocks import Commands, Formula, Paragraph, Section, Table, cell
from sfc.pages.html import report_html
from sfc.pages.markdown import markdown_report
from sfc.run import Run
from sfc.studies.report.found import Found
from sfc.studies.report.kinds import (
    BEHAVIOUR,
    CIRCUIT,
    FORMATS,
    LOGITS,
    OTHER,
    PATCHING,
    PROBE,
    REPLICATION,
    SAES,
    Kind,
)

KINDS: Mapping[str, Kind] = {
    "behaviour": BEHAVIOUR,
    "probe": PROBE,
    "logits": LOGITS,
    "patching": PATCHING,
    "formats": FORMATS,
    "saes": SAES,
    "circuit": CIRCUIT,
    "replication": REPLICATION,
}
"""in the order of the report; other kinds of artifacts come after them"""
_LIMITS = (
    "What is found is found in one model, with one chat template, on the prompts of one data set.",
    "The refusal score looks at the first token of the reply only; that it follows behaviour is measured, not given.",
    "Toxic and safe are the data set's labels. What the model does is another thing, and is judged by its replies.",
    "Intervals are those of the prompts or pairs drawn; they say nothing of other seeds, models or data.",
)


def report_title(preset: str) -> str:
    """The heading of a report."""
    return f"What was found behind the refusals of {preset}"


def report_sections(found: Sequence[Found], left_out: Sequence[Found], description: str) -> list[Section]:
    """Everything a report says of these artifacts. Every figure is read from one of their files.

    Args:
        left_out: artifacts of the same preset that were made with another model; they are named only.
        description: what the model is.

    Raises:
        UserError: a file is missing, or lacks a figure.
    """
    ordered = sorted(found, key=_place)
    told = [_told(each) for each in ordered]
    rows = [(f"{section.title}: {name}", value) for section, summary, _ in told for name, value in summary]
    return [
        Section("Summary", [Paragraph(description), Table("", ("figure", "value"), rows)]),
        _methods(ordered),
        *(section for section, _, _ in told),
        _limits([limit for _, _, limits in told for limit in limits], left_out),
        *_provenance(ordered),
    ]


class _Told(NamedTuple):
    """What there is to say of an artifact."""

    section: Section
    summary: list[tuple[str, str]]
    limits: list[str]


def _told(found: Found) -> _Told:
    kind = KINDS.get(found.kind, OTHER)
    try:
        section = Section(f"{kind.title(found)} ({_mark(found)})", kind.blocks(found))
        return _Told(section, kind.summary(found), kind.limits(found))
    except KeyError as error:
        raise UserError(
            f"{found.folder} lacks {error}: it is damaged or of another version; make it again with --rebuild"
        ) from None


def _place(found: Found) -> int:
    return list(KINDS).index(found.kind) if found.kind in KINDS else len(KINDS)


def _mark(found: Found) -> str:
    return found.folder.name.rpartition("-")[2]


def _methods(found: Sequence[Found]) -> Section:
    formulas = dict.fromkeys(formula for each in found for formula in KINDS.get(each.kind, OTHER).methods)
    blocks: list[Paragraph | Formula] = [
        Paragraph(
            "Prompts are split by hash. Discovery prompts choose, reference prompts give the values that ablated parts"
            " are set to, and test prompts give the figures, so that nothing is judged on what it was chosen on."
        )
    ]
    return Section("How it was measured", [*blocks, *formulas])


def _limits(limits: Sequence[str], left_out: Sequence[Found]) -> Section:
    of_kinds = dict.fromkeys(limits)
    stale = [f"Left out, because another model made it: {each.place}." for each in left_out]
    return Section("Limits", [Paragraph(text) for text in (*_LIMITS, *of_kinds, *stale)])


def _provenance(found: Sequence[Found]) -> list[Section]:
    rows = [
        (each.place, each.manifest.get("created", ""), cell(_seed(each)), _versions(each)) for each in found
    ]  # fmt: skip
    commands = list(dict.fromkeys(str(each.manifest["command"]) for each in found if "command" in each.manifest))
    unknown = [each.place for each in found if "command" not in each.manifest]
    note = [Paragraph(f"The command is not known of: {', '.join(unknown)}.")] if unknown else []
    return [
        Section("Artifacts", [Table("", ("folder", "made", "seed", "versions"), rows)]),
        Section("Commands that reproduce it", [Commands(commands), *note]),
    ]


def _seed(found: Found) -> object:
    return found.inputs.get("seed")


def _versions(found: Found) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.manifest.get("versions", {}).items())


FILES = {"page": "report.html", "markdown": "report.md"}


def make_report(
    run: Run, artifact: Artifact, found: Sequence[Found], left_out: Sequence[Found], rebuild: bool = False
) -> None:
    """Write the report of these artifacts, as Markdown and as a page.

    Raises:
        UserError: a file of theirs is missing or malformed.
    """
    title, description = report_title(run.experiment.name), run.experiment.description
    with artifact.being_made(rebuild) as folder:
        sections = report_sections(found, left_out, description)
        write_text(folder / FILES["markdown"], markdown_report(title, sections))
        write_text(folder / FILES["page"], report_html(title, description, sections))
        result = {"preset": run.experiment.name, "artifacts": [each.place for each in found]}
        artifact.finish(result=result, files=FILES)
