"""Refusal: toxic prompts are declined, safe ones are answered."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sfc.behaviors.behavior import BEHAVIORS, Behavior, Words

if TYPE_CHECKING:
    from sfc.models.loading import Model
    from sfc.models.score import Score


class Refusal(Behavior):
    """The model declines what it is asked."""

    name = "refusal"
    words = Words()

    def inputs(self, experiment: Any) -> dict[str, Any]:
        return {"refusal_tokens": experiment.model.refusal_tokens, "against_tokens": experiment.model.against_tokens}

    def metric(self, model: "Model", experiment: Any) -> "Score":
        """The log-odds of refusal-opening tokens (see `RefusalScore`)."""
        from sfc.models.score import RefusalScore

        return RefusalScore.of(model)

    def judge(self) -> Callable[[str], bool]:
        from sfc.models.judge import is_refusal

        return is_refusal


BEHAVIORS.register(Refusal())
