"""Stage: a circuit's page, made from the files beside it."""

from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd

from sfc.circuits.files import load_circuit
from sfc.core.artifacts import read_json
from sfc.features.labels import CARDS_FILE, with_own_labels
from sfc.models.loading import load_outline
from sfc.pages.circuit import write_page
from sfc.pipeline import ensure_circuit, ensure_saes, ensure_store
from sfc.run import Run
from sfc.studies.discover.discover import write_cards
from sfc.studies.train.train import load_dictionaries


def ensure_cards(run: Run, category: str) -> tuple[Path, nx.DiGraph, dict[str, Any]]:
    """The folder, the graph and the cards of a category's circuit; what is not there is made.

    Raises:
        UserError: as discovery.
    """
    folder = ensure_circuit(run, category).folder
    graph = load_circuit(folder / "circuit.json")
    if (folder / CARDS_FILE).is_file():
        return folder, graph, read_json(folder / CARDS_FILE)
    ensure_saes(run)
    ensure_store(run)
    dictionaries = load_dictionaries(run.saes.folder, run.experiment.activations.sites)
    return folder, graph, write_cards(run, graph, dictionaries, load_outline(run.experiment.model).tokenizer, folder)


def draw_circuit(run: Run, category: str) -> dict[str, str]:
    """Draw the circuit of a category anew, with the labels of `labels.json`; cards are made where there are none.

    Returns:
        The files by name.

    Raises:
        UserError: as discovery, or `labels.json` is not valid.
    """
    folder, graph, cards = ensure_cards(run, category)
    page, curve = folder / "circuit.html", pd.read_csv(folder / "curve.csv")
    write_page(page, graph, curve, read_json(folder / "result.json"), with_own_labels(cards, folder))
    return {"page": str(page), "features": str(folder / CARDS_FILE)}
