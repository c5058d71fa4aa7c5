"""What lies below a root folder, as the explorer offers it: circuits, comparisons, pages of every finished artifact.

Circuits are chosen by preset, category and method, the first one and the second beside it. Their pages are those of
`sfc draw`, with the nodes ringed that both have. The cells of a comparison's heat map open pairs of circuits.
"""

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from dash import Dash, Input, Output, State, dcc, html, no_update, set_props
from jaxtyping import Float
from pydantic import BaseModel, ValidationError

from sfc.circuits.files import load_circuit
from sfc.core.artifacts import MANIFEST, read_csv, read_json, read_model
from sfc.core.errors import UserError
from sfc.core.faults import user_message
from sfc.features.labels import shown_cards
from sfc.pages.circuit import circuit_page
from sfc.pages.html import page_html
from sfc.studies.compare import overlap_figure
from sfc.studies.compare.overlap import between_halves
from sfc.studies.study import RESULT, Finished


class Shelved(NamedTuple):
    """A finished circuit."""

    key: str
    """its folder below `circuits/`"""
    preset: str
    category: str
    method: str
    """with the fingerprint, which tells apart what has other settings"""
    folder: Path


class Below(NamedTuple):
    """What was found below a root; artifacts that cannot be read are left out, with a note."""

    found: dict[str, Any]
    notes: list[str]


def _read(paths: Iterable[Path], read: Callable[[Path], tuple[str, Any] | None]) -> Below:
    """What each manifest's artifact is read as: a key and a value, or None where there is nothing to show."""
    below = Below({}, [])
    for path in sorted(paths):
        try:
            if item := read(path.parent):
                below.found[item[0]] = item[1]
        except (UserError, ValidationError, KeyError, TypeError, OSError) as error:
            why = user_message(error) or f"its files lack {error}"
            below.notes.append(f"left out: {path.parent}: {why}")
    return below


class CircuitResult(BaseModel):
    """What is read of a circuit's `result.json`."""

    preset: str
    category: str
    method: str


def shelf(root: Path) -> dict[str, Shelved]:
    """The finished circuits below `root/circuits`, by key, in the order of their names."""
    return _circuits(root).found


def _circuits(root: Path) -> Below:
    def read(folder: Path) -> tuple[str, Shelved] | None:
        if not (folder / "circuit.json").exists() or not (folder / RESULT).exists():
            return None
        if damage := _damage(folder / "circuit.json", (folder / "circuit.json").stat().st_mtime_ns):
            raise UserError(damage)
        key, result = folder.relative_to(root / "circuits").as_posix(), read_model(folder / RESULT, CircuitResult)
        method = f"{result.method} · {folder.name.rpartition('-')[2]}"
        return key, Shelved(key, result.preset, result.category, method, folder)

    return _read((root / "circuits").glob(f"*/circuit-*/{MANIFEST}"), read)


@lru_cache(maxsize=1024)
def _damage(path: Path, changed: int) -> str | None:
    """Why a file that was changed then is no circuit; None where it is one."""
    try:
        _ = [(data["kind"], data["effect"]) for _, data in load_circuit(path).nodes(data=True)]
    except UserError as error:
        return str(error)
    except KeyError as error:
        return f"its nodes lack {error}"
    return None


class PageManifest(BaseModel):
    """What is read of an artifact's `manifest.json`."""

    files: dict[str, str] = {}


def finished_pages(root: Path) -> dict[str, Path]:
    """The pages of all finished artifacts below the root, of whatever study, by the folders that they lie in."""
    return _pages(root).found


def _pages(root: Path) -> Below:
    def read(folder: Path) -> tuple[str, Path] | None:
        page = folder / Path(read_model(folder / MANIFEST, PageManifest).files.get("page", "")).name
        return (folder.relative_to(root).as_posix(), page) if page.is_file() else None

    return _read([*(root / "circuits").glob(f"*/*/{MANIFEST}"), *(root / "saes").glob(f"*/{MANIFEST}")], read)


def notes(root: Path) -> list[str]:
    """What is left out because it is damaged, each with the reason."""
    return list(dict.fromkeys(note for of in (_circuits, _pages, _comparisons) for note in of(root).notes))


def shared_core(first: Path, second: Path) -> set[str] | None:
    """The nodes that two circuits have in common; None where their dictionaries differ."""
    inputs = [read_json(folder / MANIFEST).get("inputs", {}).get("saes") for folder in (first, second)]
    if inputs[0] is None or inputs[0] != inputs[1]:
        return None
    return set(graph_of(first)) & set(graph_of(second))


@lru_cache(maxsize=8)
def graph_of(folder: Path) -> nx.DiGraph:
    """The graph of the circuit in this folder."""
    return load_circuit(folder / "circuit.json")


def ringed_page(folder: Path, marked: Collection[str]) -> str:
    """The page of the circuit in this folder, with some nodes ringed.

    Raises:
        UserError: its files are damaged.
    """
    with undamaged(folder):
        curve = read_csv(folder / "curve.csv")
        result = Finished(folder).result
        return page_html(circuit_page(graph_of(folder), curve, result, shown_cards(folder), marked))


@contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """Where the files of an artifact are read that may hold anything.

    Raises:
        UserError: the block fails because of what they hold.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{folder} is damaged ({what}); make it again with --rebuild") from error


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
    return _comparisons(root).found


def _comparisons(root: Path) -> Below:
    def read(folder: Path) -> tuple[str, Compared]:
        finished = Finished(folder)
        result, command = finished.result, str(finished.manifest["command"])
        compared = Compared(folder.name, str(result["preset"]), result, command, folder)
        _ = compared.categories, result["verdict"], result["size"]
        return folder.name, compared

    return _read((root / "circuits").glob(f"*/comparison-*/{MANIFEST}"), read)


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
