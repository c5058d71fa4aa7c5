"""Commands that study heads, layers, formats and directions, one model or many, and the report of it all."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from sfc.cli_options import Shared, finish
from sfc.core.artifacts import Artifact
from sfc.core.options import numbers_of


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
    overrides = _overrides_of("repair", values)
    wanted = category_or_all(category)
    artifact = ensure_repair(shared.run(overrides), wanted, shared.rebuild)
    _finish_artifact(artifact, shared.json)


def _finish_artifact(artifact: Artifact, as_json: bool) -> None:
    manifest = artifact.manifest()
    files = manifest["files"] if "files" in manifest else manifest["result"]["files"]
    paths = {name: str(artifact.folder / file) for name, file in files.items()}
    finish({**manifest["result"], "files": paths}, as_json)


def _overrides_of(section: str, values: Mapping[str, Any]) -> list[str]:
    return [f"{section}.{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
