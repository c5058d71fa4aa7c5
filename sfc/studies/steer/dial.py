"""The dial: a direction at a site, how far it is turned, and what is asked of the prompts that it steers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sfc.models import engine
from sfc.models.edits import Steering, SteeringEdit, residual_sites
from sfc.models.engine import NO_EDIT, PreparedPrompts, Progress, Replies
from sfc.models.loading import Model
from sfc.models.score import Score
from sfc.session import Session
from sfc.studies.steer import SteeringOptions, intent_of
from sfc.studies.steer.directions import Vector


class Candidate(NamedTuple):
    """A direction at a site."""

    site: str
    token: int | None
    """where its activations were read, counted from the end; None where it was not learned from activations"""
    vector: Vector
    by_fold: list[Vector]
    """for each fold, the direction learned without it"""
    norm: float
    """mean norm of the residual stream at the site: the unit of `alpha`"""

    @property
    def length(self) -> float:
        """The direction's length in units of the residual norm."""
        return float(self.vector.norm()) / self.norm

    def amount(self, alpha: float, options: SteeringOptions) -> float:
        """An alpha in the activation's own units; for `project-out` it is a share as it is."""
        if options.edit == "project-out":
            return alpha
        return alpha * (self.norm if options.units == "norm" else float(self.vector.norm()))


class Setting(NamedTuple):
    """A direction at a site, and how far the dial is turned."""

    name: str
    site: str
    token: int | None
    alpha: float
    edit: SteeringEdit

    @property
    def intent(self) -> str:
        """What turning the dial so is for."""
        return intent_of(self.edit.kind, self.alpha)


class Dial(NamedTuple):
    """How a model is steered, and by what its scores and replies are judged."""

    model: Model
    options: SteeringOptions
    score: Score
    judge: Callable[[str], bool]

    @classmethod
    def of(cls, session: Session) -> "Dial":
        """The dial of a run.

        Raises:
            UserError: the model cannot be loaded, or cannot have the score.
        """
        return cls(session.model, SteeringOptions.of(session.run.experiment), session.metric, session.run.judge)

    def sites(self, site: str) -> tuple[str, ...]:
        """Where an edit of the dial's own kind acts for a direction at a site."""
        everywhere = self.options.edit == "project-out" and self.options.everywhere
        return residual_sites(self.model) if everywhere else (site,)

    def setting(
        self, candidate: Candidate, alpha: float, vector: Vector | None = None, name: str = "chosen"
    ) -> Setting:
        """The dial at an alpha; another `vector` takes the place of the candidate's at an equal amount."""
        amount = candidate.amount(alpha, self.options)
        direction = candidate.vector if vector is None else vector
        edit = SteeringEdit(self.options.edit, self.sites(candidate.site), direction, amount)
        return Setting(name, candidate.site, candidate.token, alpha, edit)

    def steering(self, edits: Sequence[SteeringEdit]) -> Steering:
        """Edits at the tokens that the options name, which are those that prompts are prepared for."""
        return Steering(edits, self.options.positions, self.options.during_reply)

    def scores(
        self, prompts: PreparedPrompts, edits: Sequence[SteeringEdit], progress: Progress = lambda _: None
    ) -> Float[np.ndarray, "edits prompts"]:
        """The score of every prompt under every edit, in nats."""
        return engine.scores(prompts, self.score, self.steering(edits), progress)

    def plain_scores(self, prompts: Sequence[PreparedPrompts]) -> Float[np.ndarray, " prompts"]:
        """The scores of all these prompts in the model as it is, in nats."""
        return np.concatenate([engine.scores(some, self.score, NO_EDIT)[0] for some in prompts])

    def judged(self, replies: Replies) -> np.ndarray:
        """Whether each reply shows the behavior [edits, prompts]."""
        return np.array([[self.judge(text) for text in texts] for texts in replies.texts], dtype=bool)
