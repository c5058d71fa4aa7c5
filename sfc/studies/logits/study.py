"""`sfc attribute-logits`: what does each part of the model write into the logits that the score reads?"""

from pathlib import Path
from typing import Any, ClassVar

from sfc.core.options import Options, option
from sfc.data.prepare import prompts_fingerprint
from sfc.models.sources import model_identity
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.study import STUDIES, Finished, Made, Study


class LogitsOptions(Options):
    """Whose prompts are attributed."""

    section = "attribute-logits"
    category: str | None = option(
        None, description="group of prompts, such as an OR-Bench category, or all; by default violence"
    )


class LogitAttributions(Study[LogitsOptions]):
    """Split the refusal logit difference into what each head, MLP, embedding and bias writes; classify the heads.

    Example: sfc attribute-logits --category all
    """

    name = "attribute-logits"
    options = LogitsOptions
    schema = 2
    files: ClassVar = {
        "page": "logits.html",
        "components": "components.csv",
        "layers": "layers.csv",
        "groups": "groups.csv",
        "prompts": "prompts.csv",
    }
    model_columns: ClassVar = {
        "n_heads": "heads",
        "n_guardrail": "guardrail heads",
        "n_compliance": "compliance heads",
        "strongest_head": "strongest head",
    }
    model_headline: ClassVar = ("n_guardrail",)

    def label(self, run: Run) -> str:
        return f"logits-{run.group(self.of(run).category)}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment = run.experiment
        return {
            "model": model_identity(experiment.model),
            "behavior": [run.behavior.name, run.behavior.inputs(experiment)],
            "prompts": [prompts_fingerprint(run.prompts.frame), experiment.prompts.model_dump()],
            "category": run.group(self.of(run).category),
        }

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.logits.measure import measure

        return measure(session, session.run.group(self.of(session.run).category), folder)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.logits.page import page

        return page(finished)

    def model_row(self, finished: Finished) -> dict[str, Any]:
        result = finished.result
        counts = {f"n_{role}": len(result[role]) for role in ("guardrail", "compliance")}
        return {"n_heads": result["n_heads"], **counts, "strongest_head": result["heads"][0]["component"]}


STUDIES.register(LogitAttributions())
