"""`sfc report`: everything that is finished of a preset in one document, read from the files of its artifacts alone.

A summary, how figures are measured, each artifact by what its study has to say of it, what the limits are, and how to
reproduce it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sfc.behaviors.behavior import BEHAVIORS, Words
from sfc.core.artifacts import MANIFEST, hash_of_file, write_text
from sfc.core.contents import check, check_sizes
from sfc.core.errors import UserError
from sfc.core.options import Options
from sfc.models.sources import model_identity
from sfc.pages.blocks import Block, Commands, Figure, Page, Pair, Paragraph, Section, Table, Widget, cell, records_table
from sfc.pages.plain import markdown_report
from sfc.run import Run
from sfc.session import Session
from sfc.studies.study import RESULT, STUDIES, Finished, Made, Study, complete

_MOST_ROWS = 40


class Report(Study[Options]):
    """Put all that is finished of a preset into one report, in Markdown and as one HTML page.

    Example: sfc report --preset smollm2
    """

    name = "report"
    options = Options  # it has none
    files: ClassVar = {"page": "report.html", "markdown": "report.md"}

    def check(self, run: Run) -> None:
        if not any(found_artifacts(run)):
            raise UserError(
                f"nothing to report: {_folder(run)} holds no finished artifact of this model; run `sfc discover`,"
                " `sfc patch` or another command first"
            )

    def inputs(self, run: Run) -> dict[str, Any]:
        found, left_out = found_artifacts(run)
        if run.saes.is_complete():
            found.append(Finished(run.saes.folder))
        return {
            "description": run.experiment.description,
            "artifacts": {_place(each, run.root): _hashes(each.folder) for each in found},
            "left_out": [_place(each, run.root) for each in left_out],
        }

    def make(self, session: Session, folder: Path) -> Made:
        run, inputs = session.run, self.inputs(session.run)
        words = BEHAVIORS[run.experiment.behavior].words
        page = report_page(run.root, run.experiment.name, inputs, words)
        sections = [Section("Summary", page.summary), *page.sections]
        write_text(folder / self.files["markdown"], markdown_report(page.title, sections))
        return Made({"preset": run.experiment.name, "artifacts": list(inputs["artifacts"])})

    def page(self, finished: Finished) -> Page:
        root = finished.folder.parents[2]
        return report_page(root, finished.result["preset"], finished.inputs, finished.words)


def found_artifacts(run: Run) -> tuple[list[Finished], list[Finished]]:
    """The finished artifacts of a preset, oldest first: those of the run's model, and those of another model."""
    found = [Finished(path.parent) for path in sorted(_folder(run).glob(f"*/{MANIFEST}"))]
    found = [each for each in found if each.name != Report.name]
    found.sort(key=lambda each: each.manifest.get("created", ""))
    model = model_identity(run.experiment.model)
    mine = [_model(each) in (None, model) for each in found]
    both = list(zip(found, mine, strict=True))
    return [each for each, is_mine in both if is_mine], [each for each, is_mine in both if not is_mine]


def report_page(root: Path, preset: str, inputs: Mapping[str, Any], words: Words) -> Page:
    """Everything a report says. Every figure is read from one of the artifacts' files.

    Args:
        inputs: as `Report.inputs` gives them: the places of `artifacts`, and of those `left_out`, which are named only.

    Raises:
        UserError: a file is missing, or lacks a figure.
    """
    found = sorted((Finished(root / place) for place in inputs["artifacts"]), key=_order)
    pages = [each.page if each.manifest.get("study") in STUDIES else figures_page(each) for each in found]
    told, findings = [], []
    for each, page in zip(found, pages, strict=True):
        title = f"{page.title.removesuffix(f' · {preset}')} ({each.folder.name.rpartition('-')[2]})"
        told.append(Section(title, list(_blocks(each, page))))
        findings += [(f"{title}: {name}", value) for name, value in page.findings]
    description = [Paragraph(inputs["description"])] if inputs["description"] else []
    return Page(
        title=f"What was found behind {words.behind}: {preset}",
        sentence="Every finished artifact of the preset, read from its files.",
        summary=[*description, Table("", ("figure", "value"), findings)],
        sections=[
            Section("How it was measured", [_SPLITS, *dict.fromkeys(m for page in pages for m in page.methods)]),
            *told,
            _limits(pages, inputs["left_out"], words),
            *_provenance(found, root),
        ],
    )


def figures_page(finished: Finished) -> Page:
    """The figures that an artifact left, whatever they are: for one whose study is not known here.

    Plain figures stand in one table, lists of records each in one of their own.
    """
    is_there = (finished.folder / RESULT).is_file()
    result = finished.result if is_there else finished.manifest.get("result", {})
    plain, tables = [], []
    for name, value in _flat(result):
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            fields = {str(field).replace("_", " "): str(field) for field in value[0]}
            tables.append(records_table(name, fields, value[:_MOST_ROWS]))
        elif isinstance(value, list):
            plain.append((name, ", ".join(map(cell, value[:_MOST_ROWS]))))
        else:
            plain.append((name, cell(value)))
    figures = Table("Figures", ("figure", "value"), plain) if plain else Paragraph("It left no figures.")
    title = f"{finished.name[:1].upper()}{finished.name[1:]}".replace("-", ": ", 1)
    return Page(title, "", summary=[figures, *tables])


def _folder(run: Run) -> Path:
    return run.root / "circuits" / run.experiment.name


def _place(finished: Finished, root: Path) -> str:
    return finished.folder.relative_to(root).as_posix()


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact that a report may read.

    Raises:
        UserError: a file of the artifact is missing, or is not what was written.
    """
    check_sizes(folder)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".csv") and path.is_file()]
    return {path.name: check(path) or hash_of_file(path) for path in files}


def _model(finished: Finished) -> Mapping[str, Any] | None:
    """What the manifest says of the model; circuits name it where their prompts were run."""
    prompts = finished.inputs.get("prompts")
    return finished.inputs.get("model") or (prompts.get("model") if isinstance(prompts, Mapping) else None)


def _order(finished: Finished) -> int:
    """Artifacts come in the order in which their studies are registered, then those of studies that are not known."""
    names = STUDIES.names()
    study = finished.manifest.get("study")
    return names.index(study) if study in names else len(names)


def _blocks(finished: Finished, page: Page) -> Iterator[Block]:
    """The blocks of an artifact's page, all under one heading."""
    yield from (_still(finished, block) for block in page.summary)
    for section in page.sections:
        if section.title:
            yield Paragraph(f"**{section.title}**")
        yield from (_still(finished, block) for block in section.blocks)


def _still(finished: Finished, block: Block) -> Block:
    """The block without what only works on a page of its own; a figure that cannot be drawn is the artifact's fault."""

    def drawn(figure: Figure) -> Any:
        with complete(finished.folder):
            return figure.draw()

    match block:
        case Figure():
            return block._replace(draw=lambda: drawn(block))
        case Pair(left, right):
            return Pair(_still(finished, left), _still(finished, right))
        case Widget(_, _, table):
            return table or Paragraph("A picture to explore is on its own page.")
        case _:
            return block


def _flat(result: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in result.items():
        words = f"{before}{name}".replace("_", " ")
        if isinstance(value, Mapping) and name not in ("files", "seconds"):
            yield from _flat(value, f"{words}: ")
        elif name not in ("files", "seconds", "preset"):
            yield words, value


def _limits(pages: Sequence[Page], left_out: Sequence[str], words: Words) -> Section:
    general = (
        "What is found is found in one model, with one chat template, on the prompts of one data set.",
        f"The {words.score} looks at the first token of the reply only; that it follows behaviour is measured, not"
        " given.",
        f"That a prompt is {words.positive} or {words.negative} is the data set's label. What the model does is another"
        " thing, and is judged by its replies.",
        "Intervals are those of the prompts or pairs drawn; they say nothing of other seeds, models or data.",
    )
    of_pages = dict.fromkeys(limit for page in pages for limit in page.limits)
    stale = (f"Left out, because another model made it: {place}." for place in left_out)
    return Section("Limits", [Paragraph(text) for text in (*general, *of_pages, *stale)])


class _Origin(NamedTuple):
    folder: str
    made: str
    seed: str
    versions: str


def _provenance(found: Sequence[Finished], root: Path) -> list[Section]:
    rows = [
        _Origin(
            _place(each, root),
            each.manifest.get("created", ""),
            cell(each.inputs.get("seed")),
            ", ".join(f"{name} {number}" for name, number in each.manifest.get("versions", {}).items()),
        )
        for each in found
    ]
    commands = list(dict.fromkeys(str(each.manifest["command"]) for each in found if "command" in each.manifest))
    unknown = [_place(each, root) for each in found if "command" not in each.manifest]
    note = [Paragraph(f"The command is not known of: {', '.join(unknown)}.")] if unknown else []
    return [
        Section("Artifacts", [Table("", _Origin._fields, rows)]),
        Section("Commands that reproduce it", [Commands(commands), *note]),
    ]


_SPLITS = Paragraph(
    "Prompts are split by hash. Discovery prompts choose, reference prompts give the values that ablated parts are set"
    " to, and test prompts give the figures, so that nothing is judged on what it was chosen on."
)
STUDIES.register(Report())
