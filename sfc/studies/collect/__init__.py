"""`sfc collect`: the activations of the discovery and reference prompts, in HDF5."""

from pathlib import Path
from typing import Any

from sfc.core.artifacts import Artifact
from sfc.core.options import Options, option
from sfc.core.ranks import is_leader
from sfc.core.registry import imported_when_called
from sfc.core.sites import in_order, site_from_short
from sfc.pages.blocks import Page, Paragraph
from sfc.run import Run
from sfc.session import Session
from sfc.studies.study import STUDIES, Finished, Made, Study


class CollectOptions(Options):
    """What is stored beside the sites of the SAEs."""

    section = "collect"
    sites: list[str] = option(
        [],
        flag="--site",
        description="further sites: hook_z.21, resid_mid.5 (also attn_out, mlp_out, resid_pre)",
    )


class Collect(Study[CollectOptions]):
    """Store the activations of the discovery and reference prompts in HDF5.

    Examples: sfc collect --set activations.layers=[20,21,22]; sfc collect --site hook_z.20,hook_z.21
    """

    name = "collect"
    options = CollectOptions
    is_shared = True

    def inputs(self, run: Run) -> dict[str, Any]:
        return dict(run.store.inputs)

    def artifact(self, run: Run) -> Artifact:
        return run.store

    def sites(self, run: Run) -> list[str]:
        """Every site that is wanted, in the order in which the model passes them.

        Raises:
            UserError: a name is not that of a site.
        """
        return in_order([*run.sites, *map(site_from_short, self.of(run).sites)])

    def is_current(self, run: Run, artifact: Artifact) -> bool:
        """Whether the store holds every site that is wanted."""
        return artifact.is_complete() and set(self.sites(run)) <= set(artifact.manifest()["sites"])

    work = imported_when_called(f"{__name__}.fill:work")

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.saes.store import shard_digests
        from sfc.studies.collect.fill import circuit_prompts, fill

        model, run = session.model, session.run
        sites = self.sites(run)
        model.check_sites(sites)
        facts = fill(run, folder, model, circuit_prompts(run, model.tokenize), sites)
        digests = shard_digests(folder) if is_leader() else {}
        return Made({"preset": run.experiment.name, **facts}, {"store": "."}, facts, digests)

    def page(self, finished: Finished) -> Page:
        result = finished.result
        text = f"{result['n_rows']:,} rows from {result['n_prompts']:,} prompts at {len(result['sites'])} sites"
        return Page(f"Activations · {result['preset']}", text, [Paragraph(text)])


COLLECT = Collect()
STUDIES.register(COLLECT)
