"""Stage part: what the features of a circuit mean, computed once and kept in the circuit's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd

from sfc.activations.store import Store
from sfc.artifacts import write_json
from sfc.features.cards import feature_cards
from sfc.features.labels import CARDS_FILE
from sfc.features.neuronpedia import neuronpedia_page
from sfc.progress import say
from sfc.run import Run
from sfc.saes.dictionary import Dictionary
from sfc.saes.saelens_config import read_config
from sfc.stages.collect import PROMPTS_FILE
from sfc.viewer.graph import strongest_nodes

SHOWN_NODES = 300
"""nodes that are drawn, and so have cards: those of largest |effect|"""


def write_cards(
    run: Run, graph: nx.DiGraph, dictionaries: Mapping[str, Dictionary], tokenizer: Any, folder: Path
) -> dict[str, Any]:
    """Make the cards (see `sfc.features.cards`) of the circuit's strongest features, and write `features.json`."""
    store = Store(run.store.folder)
    prompts = pd.read_csv(run.store.folder / PROMPTS_FILE, keep_default_na=False)
    names = strongest_nodes(graph, SHOWN_NODES)
    say(f"reading what {len(names)} nodes fire on")
    cards = feature_cards(store, dictionaries, graph, names, prompts, lambda token: tokenizer.decode([token]))
    configs = {site: read_config(run.saes.folder / site) for site in dictionaries if dictionaries[site].d_sae}
    for name, card in cards["features"].items():
        page = neuronpedia_page(configs[graph.nodes[name]["site"]], int(name.rpartition("/F")[2]))
        card |= {"neuronpedia": page} if page else {}
    write_json(folder / CARDS_FILE, cards)
    return cards
