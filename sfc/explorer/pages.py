"""The pages of circuits as the explorer serves them: those of `sfc draw`, with the nodes ringed that both have."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from sfc.artifacts import read_json
from sfc.circuits.circuit import load_circuit
from sfc.features.labels import CARDS_FILE, with_own_labels
from sfc.viewer.page import NO_CARDS, page_html


def circuit_page(folder: Path, marked: Collection[str]) -> str:
    """The page of the circuit in this folder.

    Raises:
        UserError: its files are damaged.
    """
    has_cards = (folder / CARDS_FILE).is_file()
    cards = with_own_labels(read_json(folder / CARDS_FILE), folder) if has_cards else NO_CARDS
    graph, curve = load_circuit(folder / "circuit.json"), pd.read_csv(folder / "curve.csv")
    return page_html(graph, curve, read_json(folder / "result.json"), cards, marked)
