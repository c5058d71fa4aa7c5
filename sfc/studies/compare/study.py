"""`sfc compare`: do the circuits of several categories overlap more than chance, and as much as those of one?"""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from sfc.behaviors.behavior import BEHAVIORS
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.data.schema import ALL, CATEGORIES, canonical_category
from sfc.pages.blocks import Page
from sfc.run import CIRCUIT_SCHEMA, Run
from sfc.session import Session
from sfc.studies.study import STUDIES, Finished, Made, Study

_BY_PROMPTS = ("learned-mask", "attribution", "integrated-gradients", "exact")


class ComparisonOptions(Options):
    """How the circuits of categories are compared: a protocol of its own, with few sizes and draws."""

    section = "comparison"

    categories: list[str] = option([ALL], description="categories among the ten, or all")
    size: int = option(200, ge=1, description="nodes of each circuit; the overlap depends on it")
    shuffles: int = Field(5, ge=0, description="shuffled pools of two categories, as a yardstick")
    edges: int = Field(500, ge=0, description="strongest edges of each circuit, whose overlap is measured as well")
    replies: int = Field(20, ge=0, description="test prompts per category that are answered with nodes ablated")
    reply_tokens: int = Field(16, ge=1, description="length of those replies, which are judged")

    @property
    def wanted(self) -> list[str]:
        """The categories by their canonical names, each once, in alphabetical order.

        Raises:
            UserError: there is no such category.
        """
        return sorted(CATEGORIES if self.categories == [ALL] else set(map(canonical_category, self.categories)))


class Compare(Study[ComparisonOptions]):
    """Are the categories one mechanism or many? Overlap and transfer of their circuits, and their shared core.

    Example: sfc compare --categories violence,privacy,illegal
    """

    name = "compare"
    options = ComparisonOptions
    schema = 3
    also = ((DiscoveryOptions, "method"), (DiscoveryOptions, "contrast"))
    files: ClassVar = {
        "page": "comparison.html",
        "overlap": "overlap.csv",
        "transfer": "transfer.csv",
        "core": "core.csv",
    }

    def check(self, run: Run) -> None:
        if len(self.of(run).wanted) < 2:
            raise UserError("compare needs at least two categories, for example --categories violence,privacy")
        discovery = DiscoveryOptions.of(run.experiment)
        if discovery.reference_choice in ("paired", "base", "complied-mean"):
            raise UserError(
                f"compare pools prompts of categories, whose reference {discovery.reference_choice!r} is not the same"
            )
        if discovery.method not in _BY_PROMPTS:
            raise UserError(
                f"compare needs a method that halves of the prompts can be given to: one of {', '.join(_BY_PROMPTS)}"
            )

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        return f"comparison{discovery.name_of_prompts}-{discovery.method}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options = run.experiment, self.of(run)
        return {
            "circuit": CIRCUIT_SCHEMA,
            "prompts": run.store.inputs,
            "saes": run.saes.inputs,
            "score": BEHAVIORS[experiment.behavior].inputs(experiment),
            "categories": options.wanted,
            "hard_share": experiment.prompts.hard_share,
            "discovery": DiscoveryOptions.of(experiment).identity(),
            "evaluation": EvaluationOptions.of(experiment).model_dump(include={"error_mode", "min_denominator"}),
            "comparison": options.model_dump(exclude={"categories"}),
        }

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.pipeline import ensure_saes, ensure_store
        from sfc.studies.compare.measure import measure

        ensure_saes(session.run)
        ensure_store(session.run)
        return measure(session, self.of(session.run).wanted, folder)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.compare.page import page

        return page(finished)


STUDIES.register(Compare())
