"""A circuit's page drawn again from the files beside it, and its feature cards where they are missing."""

from pathlib import Path
from typing import Any

import networkx as nx

from sfc.circuits.files import load_circuit
from sfc.core.artifacts import read_json, write_text
from sfc.features.labels import CARDS_FILE
from sfc.pages.html import page_html
from sfc.run import Run
from sfc.session import Session
from sfc.studies.collect.study import COLLECT
from sfc.studies.discover.study import DISCOVER, circuit_of
from sfc.studies.study import ensure
from sfc.studies.train.study import TRAIN


def ensure_cards(run: Run, category: str | None) -> tuple[Path, nx.DiGraph, dict[str, Any]]:
    """The folder, the graph and the cards of a category's circuit; whatever is missing is made.

    Raises:
        UserError: as discovery.
    """
    session = Session(run)
    folder = circuit_of(run, category, session).folder
    graph = load_circuit(folder / DISCOVER.files["circuit"])
    if (folder / CARDS_FILE).is_file():
        return folder, graph, read_json(folder / CARDS_FILE)
    for study in (TRAIN, COLLECT):
        ensure(study, run, session=session)
    from sfc.studies.discover.measure import write_cards

    return folder, graph, write_cards(session, graph, session.dictionaries, folder)


def draw_circuit(run: Run, category: str | None) -> dict[str, str]:
    """Draw the page of a category's circuit again, with the labels of `labels.json`; missing cards are made.

    Returns:
        The files by name.

    Raises:
        UserError: as discovery, or `labels.json` is not valid.
    """
    folder, *_ = ensure_cards(run, category)
    page = folder / DISCOVER.files["page"]
    write_text(page, page_html(DISCOVER.page(circuit_of(run, category))))
    return {"page": str(page), "features": str(folder / CARDS_FILE)}
