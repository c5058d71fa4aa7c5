"""`sfc discover`: the circuit of one group of prompts, with its evaluation and its page."""

from pathlib import Path
from typing import Any, ClassVar

import networkx as nx

from sfc.behaviors.pairs import PairsOptions
from sfc.circuits.files import load_circuit
from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions, discovery_identity
from sfc.core.artifacts import Artifact, amended, write_text
from sfc.core.ranks import is_leader, told, wait_for_all
from sfc.core.registry import imported_when_called
from sfc.features.explainer import LabelOptions, unexplained
from sfc.features.labels import CARDS_FILE, read_cards, shown_cards
from sfc.features.neuronpedia import fetch_explanations, unfetched
from sfc.pages.blocks import Page
from sfc.pages.circuit import circuit_page
from sfc.pages.html import page_html
from sfc.run import Run
from sfc.session import Session
from sfc.studies.collect import COLLECT
from sfc.studies.nulls import STUDY as NULLS
from sfc.studies.nulls import circuit_inputs, has_nulls, needs_of_circuits
from sfc.studies.study import STUDIES, Finished, Made, Need, Study, ensure
from sfc.studies.train import TRAIN


class Discover(Study[DiscoveryOptions]):
    """Discover, evaluate and draw the circuit of one category; collects and trains first where needed.

    Example: sfc discover --category privacy --method correlation --set correlation.threshold=0.2
    """

    name = "discover"
    options = DiscoveryOptions
    schema = 5
    also = (
        (PairsOptions, "file"),
        *((LabelOptions, name) for name in ("explainer", "explainer_model", "neuronpedia")),
    )
    files: ClassVar = {
        "page": "circuit.html",
        "circuit": "circuit.json",
        "features": CARDS_FILE,
        "curve": "curve.csv",
        "scores": "scores.csv",
        "replies": "replies.csv",
        "prompts": "prompts.csv",
    }
    model_columns: ClassVar = {
        "n_nodes": "nodes", "agreement": "agreement", "gap_kept": "gap kept", "faithfulness": "faithfulness, means",
        "completeness_normalised": "completeness, normalised",
    }  # fmt: skip
    model_headline: ClassVar = ("agreement",)

    def label(self, run: Run) -> str:
        options = self.of(run)
        nodes = "" if options.nodes == "features" else f"-{options.nodes}"
        of_prompts = run.behavior.words.said(options.name_of_prompts)
        return f"circuit-{run.group(options.category)}{of_prompts}{nodes}-{options.method}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options = run.experiment, self.of(run)
        return {
            **circuit_inputs(run),
            "sites": None if NODES[options.nodes].needs_saes else experiment.activations.sites,
            "category": run.group(options.category),
            "discovery": discovery_identity(experiment),
            "evaluation": EvaluationOptions.of(experiment).model_dump(),
        }

    def needs(self, run: Run) -> list[Need]:
        return [*needs_of_circuits(run), *([Need(NULLS, run)] if has_nulls(run) else [])]

    def is_current(self, run: Run, artifact: Artifact) -> bool:
        """Whether the circuit is there, and its features are explained if that is asked for."""
        options = LabelOptions.of(run.experiment)
        asked = unexplained(artifact.folder, options) or unfetched(artifact.folder, options)
        return artifact.is_complete() and not asked

    def build(self, session: Session, artifact: Artifact, rebuild: bool) -> None:
        """Make the circuit where it is missing. Explanations come last: no failure of theirs costs the circuit."""
        if told(lambda: rebuild or not artifact.is_complete()):
            super().build(session, artifact, rebuild)
        if is_leader():
            self._explain(session, artifact)
        wait_for_all()

    def _explain(self, session: Session, artifact: Artifact) -> None:
        if unexplained(artifact.folder, LabelOptions.of(session.run.experiment)):
            from sfc.studies.discover.measure import explain_circuit

            with amended(artifact.folder, CARDS_FILE, self.files["page"]):
                explain_circuit(session, artifact.folder)
                self._draw(artifact.folder)
        options = LabelOptions.of(session.run.experiment)
        if unfetched(artifact.folder, options):
            with amended(artifact.folder, CARDS_FILE, self.files["page"]):
                if fetch_explanations(session.run.root, artifact.folder, options):
                    self._draw(artifact.folder)

    def _draw(self, folder: Path) -> None:
        write_text(folder / self.files["page"], page_html(self.page(Finished(folder))))

    work = imported_when_called(f"{__name__}.work:work")

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.discover.measure import discover

        return discover(session, folder, self.artifact(session.run).fingerprint)

    def page(self, finished: Finished) -> Page:
        folder = finished.folder
        graph = load_circuit(folder / self.files["circuit"])
        curve, scores, replies = (finished.table(self.files[name]) for name in ("curve", "scores", "replies"))
        return circuit_page(graph, curve, finished.result, shown_cards(folder), scores=scores, replies=replies)

    def model_row(self, finished: Finished) -> dict[str, Any]:
        return {name: finished.result.get(name) for name in self.model_columns}


DISCOVER = Discover()
STUDIES.register(DISCOVER)


def circuit_of(run: Run, category: str | None, session: Session | None = None) -> Finished:
    """The finished circuit of a category, found where it is missing.

    Raises:
        UserError: as `sfc discover`.
    """
    return ensure(DISCOVER, run.having(DiscoveryOptions, category=category), session=session)


def ensure_cards(run: Run, category: str | None) -> tuple[Path, nx.DiGraph, dict[str, Any]]:
    """The folder, the graph and the cards of a category's circuit; whatever is missing is made.

    Raises:
        UserError: as discovery.
    """
    session = Session(run)
    folder = circuit_of(run, category, session).folder
    graph = load_circuit(folder / DISCOVER.files["circuit"])
    if (folder / CARDS_FILE).is_file():
        return folder, graph, read_cards(folder)
    for study in (TRAIN, COLLECT):
        ensure(study, run, session=session)
    from sfc.studies.discover.measure import write_cards

    with amended(folder, CARDS_FILE):
        return folder, graph, write_cards(session, graph, session.dictionaries, folder)


def draw_circuit(run: Run, category: str | None) -> dict[str, str]:
    """Draw the page of a category's circuit again, with the labels of `labels.json`; missing cards are made.

    Returns:
        The files by name.

    Raises:
        UserError: as discovery, or `labels.json` is not valid.
    """
    folder, *_ = ensure_cards(run, category)
    page, finished = folder / DISCOVER.files["page"], circuit_of(run, category)
    with amended(folder, page.name):
        write_text(page, page_html(DISCOVER.page(finished)))
    return {"page": str(page), "features": str(folder / CARDS_FILE)}
