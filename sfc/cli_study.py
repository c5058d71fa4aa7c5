"""Commands that study heads, layers, formats and directions, one model or many, and the report of it all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sfc.cli_options import Shared, finish
from sfc.core.artifacts import Artifact
from sfc.core.options import float_of, numbers_of


def steer(
    shared: Shared,
    direction: Annotated[
        str | None,
        typer.Option(
            help="toxic-safe, refused-complied, hard-score, probe, circuit, or a feature such as resid_post.21/F12."
            " [default: toxic-safe]"
        ),
    ] = None,
    edit: Annotated[str | None, typer.Option(help="add, project-out or clamp. [default: add]")] = None,
    everywhere: Annotated[bool, typer.Option("--everywhere", help="project-out: at every residual site.")] = False,
    alphas: Annotated[
        str | None, typer.Option(help="Such as --alphas=-0.3,0,0.3. [default: nine from -0.32 to 0.32]")
    ] = None,
    units: Annotated[
        str | None, typer.Option(help="Of alpha: norm (the mean residual norm) or raw (the direction's length).")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Tokens that are steered: last, last-K, suffix or prompt. [default: suffix]")
    ] = None,
    during_reply: Annotated[bool, typer.Option("--during-reply", help="Also steer every generated token.")] = False,
    when: Annotated[
        str | None,
        typer.Option(help="Also steer only prompts on which this feature fires: resid_post.21/F12, or best."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Of candidates, such as 10-20,25. [default: ten]")] = None,
    category: Annotated[str | None, typer.Option(help="OR-Bench category, or all. [default: all]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Test prompts per side. [default: 30]")] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Also the direction's cosine with every SAE feature; trains SAEs first.")
    ] = False,
    xstest: Annotated[
        Path | None, typer.Option(help="Also steer these prompts: XSTest's CSV, or one with prompt, label, category.")
    ] = None,
) -> None:
    """Turn refusal up and down along a direction: learn it, choose it by what it does, sweep it, and control it.

    Example: sfc steer --direction probe --alphas=-0.3,-0.15,0.15,0.3 --limit 10
    """
    from sfc.data.schema import category_or_all
    from sfc.pipeline_study import ensure_steering

    values = {
        "direction": direction, "edit": edit, "units": units, "positions": positions, "test_prompts": limit,
        "everywhere": everywhere or None, "during_reply": during_reply or None, "layers": layers and numbers_of(layers),
        "alphas": alphas and [float_of(part) for part in alphas.split(",")],
        "xstest": xstest and str(xstest), "features": features or None, "when": when,
        "category": category and category_or_all(category),
    }  # fmt: skip
    overrides = _overrides_of("steering", values)
    artifact = ensure_steering(shared.run(overrides), shared.rebuild)
    _finish_artifact(artifact, shared.json)


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
