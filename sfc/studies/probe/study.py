"""`sfc probe`: at which layers can the two sides be told apart?"""

from pathlib import Path
from typing import Any, ClassVar

from sfc.core.options import Options, option
from sfc.data.prepare import prompts_fingerprint
from sfc.models.sources import model_identity
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.study import STUDIES, Finished, Made, Study


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
        return {
            "model": model_identity(run.experiment.model),
            "prompts": [prompts_fingerprint(run.prompts.frame), run.experiment.prompts.model_dump()],
            "category": run.group(self.of(run).category),
        }

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.probe.measure import measure

        return measure(session, session.run.group(self.of(session.run).category), folder / self.files["layers"])

    def page(self, finished: Finished) -> Page:
        from sfc.studies.probe.page import page

        return page(finished)

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


STUDIES.register(Probe())
