"""The section that compares categories: the heat map of a finished comparison, whose cells open pairs of circuits."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from dash import Dash, Input, Output, State, dcc, html, no_update
from jaxtyping import Float

from sfc.core.artifacts import MANIFEST, read_json
from sfc.explorer.shelf import Shelved, choose_circuit, shelf
from sfc.studies.compare.overlap import between_halves
from sfc.studies.compare.page import overlap_figure
from sfc.studies.study import Finished


class Compared(NamedTuple):
    """A finished `sfc compare`."""

    name: str
    """of its folder"""
    preset: str
    result: dict[str, Any]
    """what `compare --json` prints"""
    command: str
    """that made it"""
    folder: Path

    @property
    def categories(self) -> list[str]:
        """In the order of the clustering."""
        return [self.result["categories"][number] for number in self.result["order"]]


def comparisons(root: Path) -> dict[str, Compared]:
    """The finished comparisons below `root/circuits`, by the names of their folders."""
    found = {}
    for path in sorted((root / "circuits").glob(f"*/comparison-*/{MANIFEST}")):
        finished = Finished(path.parent)
        name, result, command = path.parent.name, finished.result, finished.manifest["command"]
        found[name] = Compared(name, result["preset"], result, command, path.parent)
    return found


def overlaps_of(compared: Compared) -> Float[np.ndarray, "categories categories"]:
    """The overlaps of halves by Jaccard's index, in the order of `result["categories"]`."""
    return between_halves(Finished(compared.folder).table("overlap.csv"), compared.result["categories"])


def circuit_like(root: Path, compared: Compared, category: str) -> Shelved | None:
    """A finished circuit of a category over the comparison's dictionaries, by its method and of its population."""
    wanted = _made_from(compared.folder)
    of_category = (c for c in shelf(root).values() if (c.preset, c.category) == (compared.preset, category))
    return next((circuit for circuit in of_category if _made_from(circuit.folder) == wanted), None)


def command_for(compared: Compared, category: str) -> str:
    """The command that makes what `circuit_like` looks for; `--set` of the comparison's own has to be added."""
    _, method, population = _made_from(compared.folder)
    options = ["--preset", compared.preset, "--category", category, "--method", method, "--population", population]
    return shlex.join(["sfc", "discover", *options])


def _made_from(folder: Path) -> tuple[Any, str, str]:
    inputs = read_json(folder / MANIFEST)["inputs"]
    return inputs["saes"], inputs["discovery"]["method"], inputs["discovery"]["population"]


def categories_section() -> html.Details:
    """The heat map of one finished comparison; hidden where the first circuit's preset has none."""
    return html.Details(
        [
            html.Summary("Overlap of categories: a cell opens the circuits of its row and its column"),
            html.Div(html.Label(["comparison", dcc.Dropdown(id="comparison", clearable=False)]), className="chooser"),
            html.P(id="verdict"),
            html.P(id="opened", role="status"),
            dcc.Graph(id="overlap", config={"displaylogo": False}),
        ],
        id="categories",
        open=True,
        hidden=True,
    )


def compare_categories(app: Dash, root: Path) -> None:
    """Offer the comparisons of the first circuit's preset, draw the chosen one, and open what is clicked."""

    @app.callback(
        Output("comparison", "options"),
        Output("comparison", "value"),
        Output("categories", "hidden"),
        Input("first-preset", "value"),
        State("comparison", "value"),
    )
    def offer(preset: str | None, chosen: str | None) -> tuple[list[str], str | None, bool]:
        names = [name for name, compared in comparisons(root).items() if compared.preset == preset]
        return names, chosen if chosen in names else next(iter(names), None), not names

    @app.callback(
        Output("overlap", "figure"),
        Output("verdict", "children"),
        Input("comparison", "value"),
        prevent_initial_call=True,
    )
    def draw(name: str | None) -> tuple[Any, Any]:
        if name is None:
            return no_update, ""
        compared = comparisons(root)[name]
        words = f"{compared.result['verdict']} Circuits of {compared.result['size']} nodes, made by "
        return overlap_figure(compared.result, overlaps_of(compared)), [words, html.Code(compared.command)]

    @app.callback(
        Output("opened", "children"),
        Output("overlap", "clickData"),  # emptied, or a second click on a cell would not be noticed
        Input("overlap", "clickData"),
        State("comparison", "value"),
        prevent_initial_call=True,
    )
    def open_cell(clicked: dict[str, Any] | None, name: str | None) -> tuple[Any, Any]:
        if clicked is None or name is None:
            return no_update, no_update
        compared, point = comparisons(root)[name], clicked["points"][0]
        return _open_pair(root, compared, str(point["y"]), compared.categories[int(point["x"])]), None


def _open_pair(root: Path, compared: Compared, row: str, column: str) -> Any:
    """Set both sides' dropdowns, and say so; a cell of the diagonal opens its circuit alone."""
    circuits = {category: circuit_like(root, compared, category) for category in dict.fromkeys((row, column))}
    missing = [category for category, circuit in circuits.items() if circuit is None]
    if missing:
        words = "Circuits that are not there yet; with the other options of this comparison they come from"
        return [words, *(html.Code(command_for(compared, category)) for category in missing)]
    choose_circuit(root, "first", circuits[row])
    choose_circuit(root, "second", circuits[column] if column != row else None)
    return " beside ".join(circuits)
