"""`sfc train`: one sparse autoencoder per site, and their quality.

Of several processes each trains a share of the sites; they share the collection before it, and the first one measures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sfc.core.artifacts import Artifact
from sfc.core.options import Options, option
from sfc.core.ranks import alone, is_leader
from sfc.core.registry import imported_when_called
from sfc.data.corpus import SAMPLED
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.collect import COLLECT
from sfc.studies.sample import SAMPLE
from sfc.studies.study import STUDIES, Finished, Made, Need, Study


class TrainOptions(Options):
    """Where the figures of a training go. What is trained, and how, are the sections `saes` and `corpus`."""

    section = "train"
    log: list[str] = option([], description="also send the figures to wandb or tensorboard")


class Train(Study[TrainOptions]):
    """Train one top-k sparse autoencoder per site and measure them; collects first where needed.

    Examples: sfc train --set saes.k=5% --set saes.steps=1000; torchrun --nproc-per-node 4 scripts/train_saes.py
    """

    name = "train"
    options = TrainOptions
    files: ClassVar = {
        "saes": ".", "quality": "quality.csv", "density": "density.csv", "page": "quality.html",
    }  # fmt: skip

    def inputs(self, run: Run) -> dict[str, Any]:
        return dict(run.saes.inputs)

    def artifact(self, run: Run) -> Artifact:
        return run.saes

    def build(self, session: Session, artifact: Artifact, rebuild: bool) -> None:
        """Train on every process; the first one measures and finishes."""
        from sfc.studies.train.train import train_dictionaries

        session = session.for_run(session.run.learned_by or session.run)
        with artifact.being_made(rebuild) as folder:
            rows = train_dictionaries(session, folder, self.of(session.run).log)
            if is_leader():
                with alone():
                    self.finish(session, artifact, rows)

    def finish(self, session: Session, artifact: Artifact, rows: Any) -> None:
        """Measure the dictionaries, and write down what was measured."""
        from sfc.saes.quality import DENSE_RATE
        from sfc.studies.train.train import CHECKPOINT, write_quality

        for of_other_groups in artifact.folder.glob(f"{CHECKPOINT}*"):  # saes.layers_at_once was another one
            of_other_groups.unlink()
        quality = write_quality(session, rows, artifact.folder)
        made = Made(
            {"preset": session.run.experiment.name, "dense_rate": DENSE_RATE, "quality": quality},
            facts={"source": session.run.experiment.saes.source or "trained"},
        )
        self.leave(session, artifact, made)

    def makes(self, run: Run) -> Sequence[Need]:
        """Conversations to learn from, and the store where it is the circuits' prompts that are learned from."""
        run, corpus = run.learned_by or run, (run.learned_by or run).experiment.corpus
        conversations = [Need(SAMPLE, run)] if SAMPLED in corpus.sources else []
        return [*conversations, *([Need(COLLECT, run)] if corpus.is_prompts_alone else [])]

    work = imported_when_called(f"{__name__}.work:work")

    def make(self, session: Session, folder: Path) -> Made:
        raise NotImplementedError("training is made by `build`, on several processes")

    def page(self, finished: Finished) -> Page:
        from sfc.studies.train.page import quality_page

        return quality_page(finished)


TRAIN = Train()
STUDIES.register(TRAIN)
