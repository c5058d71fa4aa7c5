"""Commands that study heads, layers, formats and directions, one model or many, and the report of it all."""

from typing import Annotated

import typer

from sfc.cli_options import Shared, finish_artifact, numbers_of, overrides_of


def repair(
    shared: Shared,
    category: Annotated[str, typer.Option(help="OR-Bench category, or all.")] = "all",
    sizes: Annotated[str | None, typer.Option(help="Features ablated, such as 5,20,80. [default: 5,10,20,50]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Test prompts of each kind. [default: 30]")] = None,
) -> None:
    """Find features that refuse hard prompts and not toxic ones, ablate them, and measure what that repairs and breaks.

    Example: sfc repair --category violence --sizes 5,20 --limit 20
    """
    from sfc.data.schema import category_or_all
    from sfc.pipeline_study import ensure_repair

    values = {"sizes": sizes and numbers_of(sizes), "test_prompts": limit}
    overrides = overrides_of("repair", values)
    wanted = category_or_all(category)
    artifact = ensure_repair(shared.run(overrides), wanted, shared.rebuild)
    finish_artifact(artifact, shared.json)
