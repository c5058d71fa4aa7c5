"""`sfc replicate`: SAE-seed robustness. Does the circuit depend on the seed that its SAEs were trained from?"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions
from sfc.core.errors import UserError
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover.study import DISCOVER
from sfc.studies.replicate.options import ReplicationOptions
from sfc.studies.study import STUDIES, Finished, Made, Need, Study
from sfc.studies.train.study import TRAIN


class Replicate(Study[ReplicationOptions]):
    """SAE-seed robustness: is the circuit the same with SAEs trained from another seed? Trains and discovers if needed.

    Example: sfc replicate --category violence --sae-seed 2
    """

    name = "replicate"
    options = ReplicationOptions
    schema = 2
    also = ((DiscoveryOptions, "category"), (DiscoveryOptions, "method"))
    files: ClassVar = {"page": "replication.html", "nodes": "nodes.csv", "cosines": "cosines.csv"}

    def check(self, run: Run) -> None:
        nodes, saes, sae_seed = DiscoveryOptions.of(run.experiment).nodes, run.experiment.saes, self.of(run).sae_seed
        if not NODES[nodes].needs_saes:
            raise UserError(f"replicate needs circuits of SAE features: nodes {nodes!r} have no SAEs")
        if saes.source is not None:
            raise UserError("replicate trains SAEs from another seed, which those of saes.source are not: leave it out")
        if sae_seed == run.experiment.sae_seed:
            raise UserError(f"--sae-seed {sae_seed} is the seed of the experiment's own SAEs: give another one")

    def other(self, run: Run) -> Run:
        """The same run with SAEs from the other seed."""
        experiment, seed = run.experiment, self.of(run).sae_seed
        # The experiment's own seed is not written down as one of the SAEs: they would have a second name.
        saes = experiment.saes.model_copy(update={"seed": None if seed == experiment.seed else seed})
        return replace(run, experiment=experiment.model_copy(update={"saes": saes}))

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        of_prompts = run.behavior.words.said(discovery.name_of_prompts)
        return f"replication-{run.group(discovery.category)}{of_prompts}-{discovery.method}"

    def inputs(self, run: Run) -> dict[str, Any]:
        return {
            "prompts": run.store.inputs,
            "original": DISCOVER.artifact(run).inputs,
            "replication": DISCOVER.artifact(self.other(run)).inputs,
        }

    def needs(self, run: Run) -> list[Need]:
        # SAEs as well: a circuit that is there may have outlived those that it was found with.
        return [Need(study, each) for each in (run, self.other(run)) for study in (DISCOVER, TRAIN)]

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.replicate.measure import measure

        return measure(session.run, self.other(session.run), folder)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.replicate.page import page

        return page(finished)


STUDIES.register(Replicate())
