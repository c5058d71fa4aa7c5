"""What lies below a root folder, as the explorer offers it: circuits, and the pages of every finished artifact.

Circuits are chosen by preset, category and method, the first one and the second beside it. Their pages are those of
`sfc draw`, with the nodes ringed that both have.
"""

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from dash import Dash, Input, Output, dcc, html, set_props

from sfc.circuits.files import load_circuit
from sfc.core.artifacts import MANIFEST, read_json
from sfc.features.labels import CARDS_FILE, with_own_labels
from sfc.pages.circuit import NO_CARDS, circuit_page
from sfc.pages.html import page_html
from sfc.studies.study import RESULT


class Shelved(NamedTuple):
    """A finished circuit."""

    key: str
    """its folder below `circuits/`"""
    preset: str
    category: str
    method: str
    """with the fingerprint, which tells apart what has other settings"""
    folder: Path


def shelf(root: Path) -> dict[str, Shelved]:
    """The finished circuits below `root/circuits`, by key, in the order of their names."""
    found = {}
    for manifest in sorted((root / "circuits").glob(f"*/circuit-*/{MANIFEST}")):
        folder = manifest.parent
        if (folder / "circuit.json").is_file() and (folder / RESULT).is_file():
            key, result = folder.relative_to(root / "circuits").as_posix(), read_json(folder / RESULT)
            method = f"{result['method']} · {folder.name.rpartition('-')[2]}"
            found[key] = Shelved(key, str(result["preset"]), str(result["category"]), method, folder)
    return found


def finished_pages(root: Path) -> dict[str, Path]:
    """The pages of all finished artifacts below the root, of whatever study, by the folders that they lie in."""
    found = {}
    for manifest in sorted([*(root / "circuits").glob(f"*/*/{MANIFEST}"), *(root / "saes").glob(f"*/{MANIFEST}")]):
        page = manifest.parent / Path(str(read_json(manifest).get("files", {}).get("page", ""))).name
        if page.is_file():
            found[manifest.parent.relative_to(root).as_posix()] = page
    return found


def shared_core(first: Path, second: Path) -> set[str] | None:
    """The nodes that two circuits have in common; None where their dictionaries differ."""
    inputs = [read_json(folder / MANIFEST).get("inputs", {}).get("saes") for folder in (first, second)]
    if inputs[0] is None or inputs[0] != inputs[1]:
        return None
    return set(_graph(first)) & set(_graph(second))


@lru_cache(maxsize=8)
def _graph(folder: Path) -> Any:
    return load_circuit(folder / "circuit.json")


def ringed_page(folder: Path, marked: Collection[str]) -> str:
    """The page of the circuit in this folder, with some nodes ringed.

    Raises:
        UserError: its files are damaged.
    """
    has_cards = (folder / CARDS_FILE).is_file()
    cards = with_own_labels(read_json(folder / CARDS_FILE), folder) if has_cards else NO_CARDS
    curve = pd.read_csv(folder / "curve.csv")
    return page_html(circuit_page(_graph(folder), curve, read_json(folder / RESULT), cards, marked))


SIDES, CHOICE = ("first", "second"), ("preset", "category", "method")


def chooser(root: Path, side: str, circuit: Shelved | None) -> html.Div:
    """The three dropdowns of a side, set to a circuit."""
    properties = _properties(root, circuit)
    return html.Div(
        [html.Label([f"{side}: {n}", dcc.Dropdown(id=f"{side}-{n}", **of)]) for n, of in properties.items()],
        className="chooser",
    )


def offer_circuits(app: Dash, root: Path) -> None:
    """Let each dropdown offer what goes with the ones before it."""
    for side in SIDES:

        @app.callback(
            *(Output(f"{side}-{name}", "options") for name in CHOICE),
            Input(f"{side}-preset", "value"),
            Input(f"{side}-category", "value"),
            prevent_initial_call=True,
        )
        def options(preset: str | None, category: str | None) -> tuple[list[str], ...]:
            return _options(root, preset, category)


def choose_circuit(root: Path, side: str, circuit: Shelved | None) -> None:
    """Set a side's dropdowns, inside a callback; None empties them."""
    for name, properties in _properties(root, circuit).items():
        set_props(f"{side}-{name}", properties)


def chosen_circuit(root: Path, choice: tuple[str | None, ...]) -> Shelved | None:
    """The circuit that a side's dropdowns name, in the order of `CHOICE`; None where they name none."""
    return next((c for c in shelf(root).values() if (c.preset, c.category, c.method) == choice), None)


def _properties(root: Path, circuit: Shelved | None) -> dict[str, dict[str, Any]]:
    """Of each dropdown. With the options goes the value: a dropdown lets go of one that it does not offer."""
    options = _options(root, *((circuit.preset, circuit.category) if circuit else (None, None)))
    values = [getattr(circuit, name) if circuit else None for name in CHOICE]
    return {n: {"options": o, "value": v} for n, o, v in zip(CHOICE, options, values, strict=True)}


def _options(root: Path, preset: str | None, category: str | None) -> tuple[list[str], ...]:
    circuits = shelf(root).values()
    of_preset = [c for c in circuits if c.preset == preset]
    of_category = [c for c in of_preset if c.category == category]
    groups = ([c.preset for c in circuits], [c.category for c in of_preset], [c.method for c in of_category])
    return tuple(list(dict.fromkeys(group)) for group in groups)
