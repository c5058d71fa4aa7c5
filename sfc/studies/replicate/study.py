"""`sfc replicate`: does the circuit depend on the seed that its SAEs were trained from, or on their prompts?"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.core.errors import UserError
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover.study import DISCOVER
from sfc.studies.replicate.options import ReplicationOptions
from sfc.studies.study import STUDIES, Finished, Made, Need, Study
from sfc.studies.train.study import TRAIN


class Replicate(Study[ReplicationOptions]):
    """Is the circuit the same with SAEs trained from another seed, or on other prompts? Trains and discovers if needed.

    Example: sfc replicate --category violence --sae-seed 2
    """

    name = "replicate"
    options = ReplicationOptions
    schema = 3
    also = ((DiscoveryOptions, "category"), (DiscoveryOptions, "method"))
    files: ClassVar = {"page": "replication.html", "nodes": "nodes.csv", "cosines": "cosines.csv"}

    def check(self, run: Run) -> None:
        nodes, saes, sae_seed = DiscoveryOptions.of(run.experiment).nodes, run.experiment.saes, self.of(run).sae_seed
        if not NODES[nodes].needs_saes:
            raise UserError(f"replicate needs circuits of SAE features: nodes {nodes!r} have no SAEs")
        if saes.source is not None:
            raise UserError("replicate trains SAEs from another seed, which those of saes.source are not: leave it out")
        if self.of(run).halves and saes.half:
            raise UserError(f"--halves trains SAEs on both halves: leave saes.half={saes.half} out")
        if not self.of(run).halves and sae_seed == run.experiment.sae_seed:
            raise UserError(f"--sae-seed {sae_seed} is the seed of the experiment's own SAEs: give another one")

    def both(self, run: Run) -> tuple[Run, Run]:
        """The runs whose circuits are compared: they differ in their SAEs' seed, or in what these learned from."""
        experiment, seed = run.experiment, self.of(run).sae_seed
        if self.of(run).halves:
            updates = [{"half": "first"}, {"half": "second"}]
        else:
            # The experiment's own seed is not written down as one of the SAEs: they would have a second name.
            updates = [{}, {"seed": None if seed == experiment.seed else seed}]
        first, second = (
            replace(run, experiment=experiment.model_copy(update={"saes": experiment.saes.model_copy(update=update)}))
            for update in updates
        )
        # Null dictionaries have the shape of the trained ones and nothing else: those of the first say it for both.
        return first, second.having(EvaluationOptions, null_draws=0)

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        of_prompts = run.behavior.words.said(discovery.name_of_prompts)
        halves = "-halves" if self.of(run).halves else ""
        return f"replication{halves}-{run.group(discovery.category)}{of_prompts}-{discovery.method}"

    def inputs(self, run: Run) -> dict[str, Any]:
        first, second = (DISCOVER.artifact(each).inputs for each in self.both(run))
        return {"prompts": run.store.inputs, "original": first, "replication": second}

    def needs(self, run: Run) -> list[Need]:
        # SAEs as well: a circuit that is there may have outlived those that it was found with.
        return [Need(study, each) for each in self.both(run) for study in (DISCOVER, TRAIN)]

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.replicate.measure import measure

        return measure(*self.both(session.run), folder)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.replicate.page import page

        return page(finished)


STUDIES.register(Replicate())
