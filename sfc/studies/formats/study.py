"""`sfc formats`: does the format of a prompt change whether it is refused?"""

from pathlib import Path
from typing import Any, ClassVar

from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError
from sfc.data.prepare import prompts_fingerprint
from sfc.models.sources import model_identity
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.formats.formats import FormatsOptions
from sfc.studies.study import STUDIES, Finished, Made, Study


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
            "model": model_identity(run.experiment.model),
            "formats": {name: [version.model_dump() for version in versions] for name, versions in formats.items()},
            "prompts": [prompts_fingerprint(run.prompts.frame), run.experiment.prompts.model_dump()],
            "file": hash_of_file(options.prompts) if options.prompts else None,
            "category": run.group(options.category),
            "limit": options.limit,
        }

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.formats.measure import measure

        return measure(session, self.of(session.run), folder)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.formats.page import page

        return page(finished)


STUDIES.register(PromptFormats())
