"""`sfc compare`: how alike are the circuits of several categories, and do they work on each other's prompts?"""

from pathlib import Path
from typing import Any, ClassVar

from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions, discovery_identity
from sfc.core.errors import UserError
from sfc.data.schema import ALL
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.compare.options import ComparisonOptions
from sfc.studies.discover.study import DISCOVER, needs_of_circuits
from sfc.studies.study import STUDIES, Finished, Made, Need, Study


class Compare(Study[ComparisonOptions]):
    """How alike are the circuits of categories? Their overlap, what each does on the others' prompts, and their core.

    Example: sfc compare --categories violence,privacy,illegal
    """

    name = "compare"
    options = ComparisonOptions
    schema = 4
    also = ((DiscoveryOptions, "method"), (DiscoveryOptions, "contrast"))
    files: ClassVar = {
        "page": "comparison.html",
        "overlap": "overlap.csv",
        "transfer": "transfer.csv",
        "core": "core.csv",
    }

    def categories(self, run: Run) -> list[str]:
        """The categories by their canonical names, each once, in alphabetical order.

        Raises:
            UserError: there is no such category.
        """
        names = self.of(run).categories
        known = run.prompts.frame["category"].unique() if names == [ALL] else map(run.group, names)
        return sorted(set(known))

    def check(self, run: Run) -> None:
        if len(self.categories(run)) < 2:
            raise UserError("compare needs at least two categories, for example --categories violence,privacy")
        discovery = DiscoveryOptions.of(run.experiment)
        if discovery.baseline_choice in ("paired", "base", "complied-mean"):
            raise UserError(
                f"compare pools prompts of categories, whose baseline {discovery.baseline_choice!r} is not the same"
            )
        if not METHODS[discovery.method].per_prompt:
            possible = [method.name for method in METHODS if method.per_prompt]
            raise UserError(f"compare needs a method that halves of the prompts can be given to: {', '.join(possible)}")

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        return f"comparison{run.behavior.words.said(discovery.name_of_prompts)}-{discovery.method}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options = run.experiment, self.of(run)
        return {
            "circuit": DISCOVER.schema,
            "prompts": run.store.inputs,
            "saes": run.saes.inputs if NODES[DiscoveryOptions.of(experiment).nodes].needs_saes else None,
            "categories": self.categories(run),
            "hard_share": experiment.prompts.hard_share,
            "discovery": discovery_identity(experiment),
            "evaluation": EvaluationOptions.of(experiment).model_dump(include={"error_mode", "min_denominator"}),
            "comparison": options.model_dump(exclude={"categories"}),
        }

    def needs(self, run: Run) -> list[Need]:
        return needs_of_circuits(run)

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.compare.measure import measure

        return measure(session, self.categories(session.run), folder)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.compare.page import page

        return page(finished)


STUDIES.register(Compare())
