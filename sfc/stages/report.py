"""Stage: the report of a run, from the files of its artifacts alone."""

from collections.abc import Sequence

from sfc.artifacts import Artifact, write_text
from sfc.reports.found import Found
from sfc.reports.markdown import markdown_report
from sfc.reports.page import write_report_page
from sfc.reports.report import report_sections, report_title
from sfc.run import Run

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
        write_report_page(folder / FILES["page"], title, description, sections)
        result = {"preset": run.experiment.name, "artifacts": [each.place for each in found]}
        artifact.finish(result=result, files=FILES)
