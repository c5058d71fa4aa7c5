"""Pairs of prompts with an answer each: which of the two answers does the model prefer?"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfc.behaviors.behavior import BEHAVIORS, Behavior, Words
from sfc.circuits.options import DiscoveryOptions
from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.core.reading import hash_of_given
from sfc.data.or_bench import CleaningReport
from sfc.data.pairs import load_counterfactuals, prompts_of
from sfc.data.prepare import Prepared

if TYPE_CHECKING:
    from sfc.circuits.problem import Task
    from sfc.models.loading import Model
    from sfc.models.score import Score
    from sfc.saes.dictionary import Dictionary


class PairsOptions(Options):
    """Which pairs."""

    section = "pairs"
    file: Path | None = option(
        None,
        flag="--pairs",
        implies="behavior=pairs",
        description="explain which answer is given instead: JSON lines with clean_prefix, patch_prefix, clean_answer,"
        " patch_answer and perhaps case",
    )


class Pairs(Behavior):
    """The model prefers the answer that goes with a prompt to the one that goes with its partner."""

    name = "pairs"
    words = Words(
        behind="the model's preference for one answer over another",
        score="answer difference",
        unit="nats of answer difference",
        score_formula="logit of the prompt's own answer - logit of its partner's, at the last prompt position",
        positive="clean",
        negative="patch",
        acts="give the prompt's own answer",
        acted="answered so",
        group="file",
    )
    has_own_saes = False  # of a few short prompts none could be learned

    def prompts(self, folder: Path, experiment: Experiment) -> Prepared:
        path = _file(experiment)
        pairs = load_counterfactuals(path, experiment.prompts, experiment.seed)
        return Prepared(prompts_of(pairs, path.stem), CleaningReport(()))

    def metric(self, model: "Model", experiment: Experiment) -> "Score":
        raise UserError("behavior 'pairs' scores each pair by its own two answers: use it with `sfc discover --pairs`")

    def inputs(self, experiment: Experiment) -> dict[str, Any]:
        return {"pairs": hash_of_given(_file(experiment))}

    def adapted(self, experiment: Experiment) -> Experiment:
        """No template, and each prompt against its partner."""
        _file(experiment)
        discovery = DiscoveryOptions.of(experiment)
        if discovery.contrast != "toxic-safe":
            raise UserError("--pairs are a contrast of their own: leave --contrast out")
        if discovery.baseline not in (None, "paired", "counterfactual"):
            raise UserError(
                f"--pairs: each prompt's baseline is its partner, so leave discovery.baseline={discovery.baseline} out"
            )
        usual = "counterfactual" if discovery.population == "toxic" else "paired"
        update = {
            "model": experiment.model.model_copy(update={"template": "{prompt}", "system_prompt": None}),
            "discovery": discovery.model_copy(update={"baseline": discovery.baseline or usual}),
        }
        return experiment.model_copy(update=update)

    def group(self, experiment: Experiment, name: str | None) -> str:
        """The file's name stands in the place of a category."""
        stem = _file(experiment).stem
        if name not in (None, stem):
            raise UserError("--pairs and --category are two questions: give one of them")
        return stem

    def task(self, experiment: Experiment, group: str, model: "Model", spaces: "Mapping[str, Dictionary]") -> "Task":
        from sfc.behaviors.pairs_task import pairs_task

        return pairs_task(experiment, _file(experiment), model, spaces)


def _file(experiment: Experiment) -> Path:
    path = PairsOptions.of(experiment).file
    if path is None or not path.is_file():
        raise UserError(f"no file {path}: --pairs takes JSON lines with clean_prefix, patch_prefix, clean_answer, …")
    return path


BEHAVIORS.register(Pairs())
