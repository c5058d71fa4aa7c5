"""What a behavior is: prompts on two sides, a score, a judge of replies, and the words that pages speak of it in.

A behavior is registered by name and chosen by `behavior` in a preset or by `--set behavior=NAME`. Nothing here imports
torch, and a module that declares a behavior should not either: `metric` imports what it needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sfc.core.registry import Registry

if TYPE_CHECKING:
    from sfc.models.loading import Model
    from sfc.models.score import Score


class Words(NamedTuple):
    """How a behavior is spoken of, on pages, in tables and in exports."""

    behind: str = "the model's refusals"
    """what a circuit lies behind"""
    score: str = "refusal score"
    unit: str = "nats of refusal score"
    score_formula: str = (
        "logsumexp(log p over R) - logsumexp(log p over all others), R the tokens that open a refusal, at the last"
        " prompt position (Arditi et al. 2024)"
    )
    positive: str = "toxic"
    """the side whose prompts call for the behavior: "toxic prompts" """
    negative: str = "safe"
    acts: str = "refuse"
    """what replies do that show it: "20 of 20 replies refuse" """
    acted: str = "refused"
    """what such prompts are: "the share refused" """
    group: str = "category"

    @property
    def kinds(self) -> dict[str, str]:
        """What kinds of prompts (`dataset_type`) are called; hard ones are negative and look positive."""
        return {"toxic": self.positive, "hard": "hard", "safe_80k": self.negative}

    @property
    def raises(self) -> str:
        """What a positive effect does."""
        return f"raises the {self.score}"

    @property
    def lowers(self) -> str:
        """What a negative effect does."""
        return f"lowers the {self.score}"


class Behavior(ABC):
    """Something that a model does with some prompts and not with others."""

    name: ClassVar[str]
    words: ClassVar[Words]

    def inputs(self, experiment: Any) -> dict[str, Any]:
        """What its score depends on beside the model, for fingerprints of whatever uses the score."""
        return {}

    @abstractmethod
    def metric(self, model: "Model", experiment: Any) -> "Score":
        """The score: a differentiable number per prompt, from the logits at its last position.

        Raises:
            UserError: the model cannot have it, for example because a token of the score is not one token.
        """

    def judge(self) -> Callable[[str], bool] | None:
        """Whether a reply shows the behavior; None where replies do not tell."""
        return None


BEHAVIORS: Registry[Behavior] = Registry("behavior")
