"""What a behavior is: prompts on two sides, a score, a judge of replies, and the words that pages speak of it in.

A behavior is registered by name and chosen by `behavior` in a preset or by `--set behavior=NAME`. Nothing here imports
torch, and a module that declares a behavior should not either: `metric` imports what it needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pandas as pd

from sfc.core.config import Experiment
from sfc.core.errors import UserError, suggestion
from sfc.core.registry import Registry
from sfc.data.or_bench import CleaningReport
from sfc.data.prepare import Prepared, add_splits
from sfc.data.schema import ALL, normalise, with_ids

if TYPE_CHECKING:
    from sfc.circuits.problem import Task
    from sfc.models.loading import Model
    from sfc.models.score import Score
    from sfc.saes.dictionary import Dictionary

POSITIVE, NEGATIVE, HARD = "toxic", "safe_80k", "hard"
"""kinds of prompts, as OR-Bench's files are called; hard ones are negative and look positive"""


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
        """What kinds of prompts are called."""
        return {POSITIVE: self.positive, HARD: "hard", NEGATIVE: self.negative}

    def said(self, name: str) -> str:
        """A name that options have, such as `safe-mean`, with what the behavior calls the two sides."""
        sides = {"toxic": self.positive, "safe": self.negative}
        return "-".join(sides.get(part, part) for part in name.split("-"))

    @property
    def direction(self) -> str:
        """What the difference of the means of the two sides is called."""
        return f"{self.score.removesuffix(' score')} direction"

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
    has_own_saes: ClassVar[bool] = True
    """whether SAEs learn from the behavior's prompts; if not, they are those of the same experiment about refusal"""

    reads_data_set: ClassVar[bool] = False
    """whether its prompts are those of the data set, so that the data set's pairs and topics go with them"""

    @abstractmethod
    def prompts(self, folder: Path, experiment: Experiment) -> Prepared:
        """Its prompts with their sides, groups and splits (see `prompt_table`).

        Args:
            folder: the data set's folder.

        Raises:
            UserError: the prompts cannot be read.
        """

    @abstractmethod
    def metric(self, model: "Model", experiment: Experiment) -> "Score":
        """The score: a differentiable number per prompt, from the logits at its last position.

        Raises:
            UserError: the model cannot have it, for example because a token of the score is not one token.
        """

    def judge(self) -> Callable[[str], bool] | None:
        """Whether a reply shows the behavior; None where replies do not tell."""
        return None

    def inputs(self, experiment: Experiment) -> dict[str, Any]:
        """What its score depends on beside the model, for the fingerprints of whatever uses the score."""
        return {}

    def adapted(self, experiment: Experiment) -> Experiment:
        """The experiment with what the behavior asks of its other sections, such as a template."""
        return experiment

    def group(self, experiment: Experiment, name: str | None) -> str:
        """The group of prompts that a name means, `all` for all of them; None means the usual one.

        Raises:
            UserError: there is no such group.
        """
        return name or ALL

    def task(
        self, experiment: Experiment, group: str, model: "Model", spaces: "Mapping[str, Dictionary]"
    ) -> "Task | None":
        """What a circuit is to explain, where that is more than prompts of one side against those of the other.

        Raises:
            UserError: its prompts cannot be used with this model.
        """
        return None


BEHAVIORS: Registry[Behavior] = Registry("behavior")


def prompt_table(rows: pd.DataFrame, experiment: Experiment) -> Prepared:
    """A behavior's own prompts, brought to the form of a data set's: ids, kinds, splits; copies are dropped.

    Args:
        rows: columns `prompt`, `positive` (whether it calls for the behavior) and, where there are groups, `group`.
    """
    groups = rows["group"] if "group" in rows else pd.Series(ALL, index=rows.index)
    frame = pd.DataFrame(
        {
            "prompt": rows["prompt"].map(normalise),
            "category": groups,
            "refusal_label": rows["positive"].astype(bool),
            "dataset_type": rows["positive"].astype(bool).map({True: POSITIVE, False: NEGATIVE}),
            "original_source": "",
        }
    )
    unique = with_ids(frame.drop_duplicates("prompt").reset_index(drop=True))
    return Prepared(add_splits(unique, experiment.prompts, experiment.seed), CleaningReport(()))


def known_group(prepared: Prepared, name: str) -> str:
    """The name, if the prompts have such a group, or `all`.

    Raises:
        UserError: they do not.
    """
    known = [*sorted(prepared.frame["category"].unique()), ALL]
    if name not in known:
        raise UserError(f"no group of prompts {name!r}: {suggestion(name, known)}")
    return name
