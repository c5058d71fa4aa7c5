"""Refusal: toxic prompts are declined, safe ones are answered."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfc.behaviors.behavior import BEHAVIORS, Behavior, Words
from sfc.core.config import Experiment
from sfc.data.prepare import Prepared, prepare_prompts
from sfc.data.schema import category_or_all

if TYPE_CHECKING:
    from sfc.models.loading import Model
    from sfc.models.score import Score


class Refusal(Behavior):
    """The model declines what it is asked."""

    name = "refusal"
    words = Words()
    reads_data_set = True

    def prompts(self, folder: Path, experiment: Experiment) -> Prepared:
        """OR-Bench's three files, or any folder that looks like them."""
        return prepare_prompts(folder, experiment.prompts, experiment.seed)

    def metric(self, model: "Model", experiment: Experiment) -> "Score":
        """The log-odds of refusal-opening tokens (see `RefusalScore`)."""
        from sfc.models.score import RefusalScore

        return RefusalScore.of(model)

    def judge(self) -> Callable[[str], bool]:
        from sfc.models.judge import is_refusal

        return is_refusal

    def inputs(self, experiment: Experiment) -> dict[str, Any]:
        return {"refusal_tokens": experiment.model.refusal_tokens, "against_tokens": experiment.model.against_tokens}

    def group(self, experiment: Experiment, name: str | None) -> str:
        """One of OR-Bench's ten categories, or `all`; by default violence."""
        return category_or_all(name or "violence")


BEHAVIORS.register(Refusal())
