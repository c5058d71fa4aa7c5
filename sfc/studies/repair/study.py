"""`sfc repair`: an edit that lowers over-refusal."""

from pathlib import Path
from typing import Any, ClassVar

from sfc.behaviors.behavior import HARD
from sfc.core.errors import UserError
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.collect.study import COLLECT
from sfc.studies.repair.options import RepairOptions
from sfc.studies.study import STUDIES, Finished, Made, Need, Study
from sfc.studies.train.study import TRAIN


class Repair(Study[RepairOptions]):
    """Find features that refuse hard prompts and not toxic ones, ablate them, and measure what that repairs and breaks.

    Example: sfc repair --category violence --sizes 5,20 --limit 20
    """

    name = "repair"
    options = RepairOptions
    files: ClassVar = {"page": "repair.html"}

    def check(self, run: Run) -> None:
        _ = run.judge
        if HARD not in set(run.prompts.frame["dataset_type"]):
            raise UserError(f"a repair needs hard prompts, and those of {run.experiment.behavior!r} have none")

    def label(self, run: Run) -> str:
        return f"repair-{run.group(self.of(run).category)}"

    def inputs(self, run: Run) -> dict[str, Any]:
        category = run.group(self.of(run).category)
        return {
            "prompts": run.store.inputs,
            "saes": run.saes.inputs,
            "hard_share": run.experiment.prompts.hard_share,
            "repair": {**self.of(run).model_dump(), "category": category},
        }

    def needs(self, run: Run) -> list[Need]:
        return [Need(TRAIN, run), Need(COLLECT, run)]

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.repair.measure import measure

        return measure(session, folder)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.repair.page import page

        return page(finished)


STUDIES.register(Repair())
