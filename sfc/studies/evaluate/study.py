"""`sfc evaluate`: any circuits, ours or others', judged on test prompts, or on prompts of files."""

from pathlib import Path
from typing import Any, ClassVar

from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover.inputs import baseline_inputs, needs_of_circuits
from sfc.studies.discover.study import DISCOVER, circuit_of
from sfc.studies.evaluate.options import EvaluateOptions, PromptFile
from sfc.studies.nulls import nulls_of
from sfc.studies.study import STUDIES, Finished, Made, Need, Study


class Evaluate(Study[EvaluateOptions]):
    """Judge any circuits, ours or others', on test prompts of both sides: do they decide, or refuse whatever is asked?

    Nodes are named resid_post.21/F12 or resid_post.21/error, or by SAELens' or Neuronpedia's ids of the dictionaries
    in use, such as gpt2-small/6-res-jb/650.

    Example: sfc evaluate mine.csv circuits/smollm2/circuit-privacy-*/circuit.json --category violence
    """

    name = "evaluate"
    options = EvaluateOptions
    schema = 2
    also = ((DiscoveryOptions, "population"), (DiscoveryOptions, "contrast"))
    files: ClassVar = {
        "page": "evaluation.html",
        "curves": "curves.csv",
        "scores": "scores.csv",
        "replies": "replies.csv",
        "prompts": "prompts.csv",
    }

    def check(self, run: Run) -> None:
        for path in self.of(run).circuits:
            if not Path(path).is_file():
                raise UserError(
                    f"no file {path}: `sfc evaluate` takes circuits, node lists in JSON or CSV, or graph files"
                )
        for file in self.prompt_files(run):
            if not file.path.is_file():
                raise UserError(f"no file {file.path}: --prompts takes CSV files with a column 'prompt'")
        discovery = DiscoveryOptions.of(run.experiment)
        of_its_own = discovery.contrast == "refused-complied" or discovery.baseline_choice == "paired"
        if self.of(run).prompts and (of_its_own or not run.behavior.has_own_saes):
            raise UserError(
                f"--prompts: contrast {discovery.contrast!r} with baseline {discovery.baseline_choice!r} has prompts of"
                " its own, which no file can replace"
            )

    def prompt_files(self, run: Run) -> list[PromptFile]:
        """The files whose prompts judge; none where the test prompts do."""
        return [PromptFile.of(text) for text in self.of(run).prompts]

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        asked = "".join(f"-{file.path.stem}" for file in self.prompt_files(run))
        of_prompts = run.behavior.words.said(discovery.name_of_prompts)
        return f"evaluation-{run.group(self.of(run).category)}{of_prompts}{asked}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options, discovery = run.experiment, self.of(run), DiscoveryOptions.of(run.experiment)
        files = [Path(path) for path in options.circuits]
        listed = [[path.resolve().parent.name, path.name, hash_of_file(path)] for path in files]
        asked = [[file.path.name, file.label, hash_of_file(file.path)] for file in self.prompt_files(run)]
        return {
            "prompts": run.store.inputs,
            "saes": run.saes.inputs if NODES[discovery.nodes].needs_saes else None,
            "category": run.group(options.category),
            "hard_share": experiment.prompts.hard_share,
            "nodes": discovery.nodes,
            "population": discovery.population,
            "contrast": discovery.contrast,
            "baseline": discovery.baseline_choice,
            "pairs_per_prompt": discovery.pairs_per_prompt,
            "evaluation": EvaluationOptions.of(experiment).model_dump(),
            "circuits": listed or DISCOVER.artifact(self._own(run)).inputs,
            "asked": [*asked, options.limit] if asked else None,
        } | baseline_inputs(run)

    def needs(self, run: Run) -> list[Need]:
        own = [] if self.of(run).circuits else [Need(DISCOVER, self._own(run))]
        return [*needs_of_circuits(run), *own]

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.evaluate.measure import evaluate

        # Whoever reads the category from the run's options reads the one whose prompts judge.
        run, files = self._own(session.run), self.prompt_files(session.run)
        if circuits := [Path(path) for path in self.of(run).circuits]:
            return evaluate(session, run, folder, circuits, files)
        own = circuit_of(run, run.group(self.of(run).category), session)
        return evaluate(session, run, folder, [own.files["circuit"]], files, None if files else nulls_of(run))

    def page(self, finished: Finished) -> Page:
        from sfc.studies.evaluate.page import page

        return page(finished)

    def _own(self, run: Run) -> Run:
        """The run that discovers the category's own circuit."""
        return run.having(DiscoveryOptions, category=self.of(run).category)


STUDIES.register(Evaluate())
