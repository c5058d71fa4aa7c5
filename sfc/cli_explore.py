"""Commands for circuits that are there: draw them anew, write them in other programs' formats, explore them."""

from pathlib import Path
from typing import Annotated

import typer

from sfc.cli_options import Shared, finish
from sfc.core.errors import UserError
from sfc.core.progress import say

Category = Annotated[str, typer.Option(help="OR-Bench category, such as violence or self-harm.")]


def draw(shared: Shared, category: Category = "violence") -> None:
    """Draw a circuit's page anew, with the labels of labels.json in its folder; discovers it first where needed.

    Example: sfc draw --category privacy
    """
    from sfc.data.schema import canonical_category
    from sfc.studies.discover.draw import draw_circuit

    category = canonical_category(category)
    finish({"category": category, "files": draw_circuit(shared.run(), category)}, shared.json)


def export(
    shared: Shared,
    category: Category = "violence",
    format: Annotated[
        str, typer.Option(help="Among graphml,gexf,csv,circuit-tracer.")
    ] = "graphml,gexf,csv,circuit-tracer",
    output: Annotated[Path | None, typer.Option(help="Folder to write to. [default: the circuit's]")] = None,
) -> None:
    """Write a circuit for other programs: Gephi and Cytoscape, tables, circuit-tracer and Neuronpedia.

    Example: sfc export --category violence --format graphml,circuit-tracer --output violence
    """
    from sfc.circuits.exports import export_circuit
    from sfc.circuits.files import load_circuit
    from sfc.data.schema import canonical_category
    from sfc.features.labels import labels_of
    from sfc.pipeline import ensure_circuit

    category = canonical_category(category)
    folder = ensure_circuit(shared.run(), category).folder
    graph = load_circuit(folder / "circuit.json")
    formats = [name.strip() for name in format.split(",")]
    files = export_circuit(graph, labels_of(folder), formats, output or folder)
    finish({"category": category, "files": {name: str(path) for name, path in files.items()}}, shared.json)


def explore(
    shared: Shared,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 8050,
) -> None:
    """Explore finished circuits in a browser on this machine: side by side, and with prompts of your own.

    Example: sfc explore --root . --port 8051
    """
    try:
        from sfc.explorer.app import explorer
    except ModuleNotFoundError as error:
        raise UserError(f"the explorer needs the package {error.name}: pip install 'sfc[explorer]'") from None
    app = explorer(shared.root, shared.device)
    say(f"http://127.0.0.1:{port} (ends with Ctrl+C)")
    app.run(host="127.0.0.1", port=port, debug=False)
