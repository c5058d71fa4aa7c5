"""`sfc evaluate`: any circuits, ours or others', judged on test prompts."""

from pathlib import Path
from typing import Any, ClassVar

from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover.study import DISCOVER, baseline_inputs, circuit_of, needs_of_circuits
from sfc.studies.study import STUDIES, Finished, Made, Need, Study


class EvaluateOptions(Options):
    """Which circuits are judged, on whose test prompts."""

    section = "evaluate"
    circuits: list[str] = option(
        [],
        positional=True,
        description="circuit.json files, node lists (.json or .csv), graph files of circuit-tracer; none: the"
        " category's own circuit",
    )
    category: str | None = option(None, description="OR-Bench category, or all, whose test prompts judge them")


class Evaluate(Study[EvaluateOptions]):
    """Judge any circuits, ours or others', on a category's test prompts: faithfulness, completeness, random circuits.

    Nodes are named resid_post.21/F12 or resid_post.21/error, or by SAELens' or Neuronpedia's ids of the dictionaries
    in use, such as gpt2-small/6-res-jb/650.

    Example: sfc evaluate mine.csv circuits/smollm2/circuit-privacy-*/circuit.json --category violence
    """

    name = "evaluate"
    options = EvaluateOptions
    also = ((DiscoveryOptions, "population"), (DiscoveryOptions, "contrast"))
    files: ClassVar = {"page": "evaluation.html", "curves": "curves.csv", "prompts": "prompts.csv"}

    def check(self, run: Run) -> None:
        for path in self.of(run).circuits:
            if not Path(path).is_file():
                raise UserError(
                    f"no file {path}: `sfc evaluate` takes circuits, node lists in JSON or CSV, or graph files"
                )

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        return f"evaluation-{run.group(self.of(run).category)}{run.behavior.words.said(discovery.name_of_prompts)}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, discovery = run.experiment, DiscoveryOptions.of(run.experiment)
        files = [Path(path) for path in self.of(run).circuits]
        listed = [[path.resolve().parent.name, path.name, hash_of_file(path)] for path in files]
        return {
            "prompts": run.store.inputs,
            "saes": run.saes.inputs if NODES[discovery.nodes].needs_saes else None,
            "category": run.group(self.of(run).category),
            "hard_share": experiment.prompts.hard_share,
            "nodes": discovery.nodes,
            "population": discovery.population,
            "contrast": discovery.contrast,
            "baseline": discovery.baseline_choice,
            "evaluation": EvaluationOptions.of(experiment).model_dump(),
            "circuits": listed or DISCOVER.artifact(self._own(run)).inputs,
        } | baseline_inputs(run)

    def needs(self, run: Run) -> list[Need]:
        own = [] if self.of(run).circuits else [Need(DISCOVER, self._own(run))]
        return [*needs_of_circuits(run), *own]

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.evaluate.measure import evaluate

        run = session.run
        category = run.group(self.of(run).category)
        paths = [Path(path) for path in self.of(run).circuits]
        own = [] if paths else [circuit_of(run, category, session).folder / DISCOVER.files["circuit"]]
        return evaluate(session, folder, category, [*paths, *own])

    def page(self, finished: Finished) -> Page:
        from sfc.studies.evaluate.page import page

        return page(finished)

    def _own(self, run: Run) -> Run:
        """The run that discovers the category's own circuit."""
        return run.having(DiscoveryOptions, category=self.of(run).category)


STUDIES.register(Evaluate())
