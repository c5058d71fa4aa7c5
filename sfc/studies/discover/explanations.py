"""Explanations of a finished circuit's features by an endpoint (see `sfc.features.explainer`)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from sfc.circuits.files import load_circuit
from sfc.core.artifacts import read_json, write_json
from sfc.core.progress import progress_bar, say
from sfc.features.activity import AFTER, BEFORE
from sfc.features.cards import feature_cards
from sfc.features.explainer import Endpoint, LabelOptions, explain, unexplained
from sfc.features.labels import CARDS_FILE
from sfc.saes.store import Store, read_prompts
from sfc.session import Session

_LONGEST_TEXT = 600


def explain_circuit(session: Session, folder: Path) -> None:
    """Ask for the explanations that the features of a circuit lack, and write them into its `features.json`.

    What was explained before an error is kept.

    Raises:
        UserError: the endpoint cannot be asked.
    """
    run, tokenizer = session.run, session.model.tokenizer
    options = LabelOptions.of(run.experiment)
    endpoint, names = Endpoint(options), unexplained(folder, options)
    prompts, cards = read_prompts(run.store.folder), read_json(folder / CARDS_FILE)
    say(f"asking {endpoint.address} about {len(names)} features: contexts of their prompts are sent to it")

    def token_text(token: int) -> str:
        return tokenizer.decode([token])

    graph = load_circuit(folder / "circuit.json")
    _, evidence = feature_cards(
        session.store, session.dictionaries, graph, names, prompts, token_text, run.behavior.words
    )
    text_of = _texts(session.store, prompts, token_text)
    try:
        with progress_bar("explaining", len(names), "features") as progress:
            for name in names:
                cards["features"][name]["explanation"] = explain(endpoint, evidence[name], text_of)
                progress(1)
    finally:
        write_json(folder / CARDS_FILE, cards)


def _texts(store: Store, prompts: pd.DataFrame, token_text: Callable[[int], str]) -> Callable[[int, bool], str]:
    """What is shown of a context: the prompt, or the tokens around the one in question, which is marked."""

    def text_of(row: int, whole: bool) -> str:
        prompt = store.tokens.prompt[row]
        if whole:
            return " ".join(str(prompts["prompt"].iloc[prompt]).split())[:_LONGEST_TEXT]
        rows = np.arange(max(0, row - BEFORE), min(store.n_tokens, row + AFTER + 1))
        rows = rows[store.tokens.prompt[rows] == prompt]
        texts = [token_text(int(store.tokens.token[other])) for other in rows]
        marked = [f"«{text}»" if other == row else text for text, other in zip(texts, rows, strict=True)]
        return " ".join("".join(marked).split())[:_LONGEST_TEXT]

    return text_of
