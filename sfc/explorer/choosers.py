"""Which circuits are looked at: preset, category and method of the first, and of the second beside it."""

from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, dcc, html, set_props

from sfc.explorer.shelf import Shelved, shelf

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
