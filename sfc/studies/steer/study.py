"""`sfc steer`: turn a behavior up and down along a direction."""

import re
from pathlib import Path
from typing import Any, ClassVar

from sfc.circuits.options import DiscoveryOptions
from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError
from sfc.data.prepare import prompts_fingerprint
from sfc.data.schema import ALL
from sfc.models.positions import check_positions
from sfc.models.sources import model_identity
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover.study import DISCOVER
from sfc.studies.steer.options import BEST, FORCE, SUPPRESS, SteeringOptions, intent_of, is_feature, named_feature
from sfc.studies.study import STUDIES, Finished, Made, Need, Study
from sfc.studies.train.study import TRAIN


class Steer(Study[SteeringOptions]):
    """Turn refusal up and down along a direction: learn it, choose it by what it does, sweep it, and control it.

    Example: sfc steer --direction probe --alphas=-0.3,-0.15,0.15,0.3 --limit 10
    """

    name = "steer"
    options = SteeringOptions
    files: ClassVar = {"page": "steering.html", "vectors": "vectors.safetensors"}
    model_columns: ClassVar = {
        "steered_site": "steered at", "force_alpha": "alpha that forces", "force_rate": "forced: {negative}, {acted}",
        "suppress_alpha": "alpha that suppresses", "suppress_rate": "suppressed: {positive}, no longer {acted}",
    }  # fmt: skip
    model_headline: ClassVar = ("force_rate", "suppress_rate")

    def check(self, run: Run) -> None:
        options = self.of(run)
        _ = run.judge, options.contrast
        check_positions(options.positions)
        if options.when not in (None, BEST) and not is_feature(str(options.when)):
            raise UserError(
                f"no condition {options.when!r}: --when takes a feature such as resid_post.21/F12, or {BEST}"
            )
        if options.when == BEST and options.when_above:
            raise UserError(
                f"--when {BEST} brings its own threshold: leave steering.when_above at 0, or name a feature"
            )
        if options.everywhere and options.when:
            raise UserError("--when is read before the steered site, and --everywhere leaves nothing before it")
        if options.everywhere and options.edit != "project-out":
            raise UserError("--everywhere goes with --edit project-out only")
        for name in (options.direction, options.when):
            if name and is_feature(name):
                named_feature(name, run.experiment.activations.sites)
        if not any(intent_of(options.edit, alpha) for alpha in options.dial):
            raise UserError(
                f"--alphas with --edit {options.edit} needs one that changes something: 0 leaves all as it is"
            )
        if options.xstest is not None and not Path(options.xstest).is_file():
            raise UserError(f"no file {options.xstest}: --xstest takes XSTest's CSV (`sfc download` fetches it)")
        if options.direction == "circuit" and run.group(options.category) == ALL:
            raise UserError("--direction circuit needs the --category whose circuit it is")

    def label(self, run: Run) -> str:
        options = self.of(run)
        direction = run.behavior.words.said(options.direction).lower()
        return f"steering-{re.sub(r'[^a-z0-9]+', '-', direction)}-{options.edit}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options = run.experiment, self.of(run)
        chosen = options.model_dump(exclude={"xstest"})
        inputs: dict[str, Any] = {
            "model": model_identity(experiment.model),
            "prompts": [prompts_fingerprint(run.prompts.frame), experiment.prompts.model_dump()],
            "steering": {**chosen, "category": run.group(options.category)},
        }
        if options.xstest is not None:
            inputs["xstest"] = hash_of_file(Path(options.xstest))
        if options.needs_saes:
            inputs["saes"] = run.saes.inputs
        if options.direction == "circuit":
            inputs["circuit"] = DISCOVER.artifact(self._discovering(run)).inputs
        return inputs

    def needs(self, run: Run) -> list[Need]:
        options = self.of(run)
        circuit = [Need(DISCOVER, self._discovering(run))] if options.direction == "circuit" else []
        return [*circuit, *([Need(TRAIN, run)] if options.needs_saes else [])]

    def _discovering(self, run: Run) -> Run:
        return run.having(DiscoveryOptions, category=self.of(run).category)

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.steer.measure import measure

        circuit = None
        if self.of(session.run).direction == "circuit":
            circuit = DISCOVER.artifact(self._discovering(session.run)).folder / DISCOVER.files["circuit"]
        return measure(session, folder, circuit)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.steer.page import page

        return page(finished)

    def model_row(self, finished: Finished) -> dict[str, Any]:
        points, row = finished.result["operating_points"], {"steered_site": finished.result["site"]}
        for intent in (FORCE, SUPPRESS):
            if intent in points:
                row |= {f"{intent}_alpha": points[intent]["alpha"], f"{intent}_rate": points[intent]["changed_rate"]}
        return row


STEER = STUDIES.register(Steer())
