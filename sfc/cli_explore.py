"""Commands for circuits that are there: draw them anew, write them in other programs' formats, explore them."""

from typing import Annotated

import typer

from sfc.cli_options import Shared, finish

Category = Annotated[str, typer.Option(help="OR-Bench category, such as violence or self-harm.")]


def draw(shared: Shared, category: Category = "violence") -> None:
    """Draw a circuit's page anew, with the labels of labels.json in its folder; discovers it first where needed.

    Example: sfc draw --category privacy
    """
    from sfc.prompts.schema import canonical_category
    from sfc.stages.draw import draw_circuit

    category = canonical_category(category)
    finish({"category": category, "files": draw_circuit(shared.run(), category)}, shared.json)
