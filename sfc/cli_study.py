"""Commands that study heads, layers, formats and directions, one model or many, and the report of it all."""

from pathlib import Path
from typing import Annotated

import typer

from sfc.cli_options import Shared, finish_artifact, float_of, numbers_of, overrides_of
from sfc.tables import (
    show_batch,
    show_formats,
    show_heads,
    show_patching,
    show_repair,
    show_replication,
    show_steering,
)


def attribute_logits(
    shared: Shared,
    category: Annotated[str, typer.Option(help="OR-Bench category, or all.")] = "violence",
) -> None:
    """Split the refusal logit difference into what each head, MLP, embedding and bias writes; classify the heads.

    Example: sfc attribute-logits --category all
    """
    from sfc.data.schema import category_or_all
    from sfc.pipeline_study import ensure_logit_attribution

    wanted = category_or_all(category)
    artifact = ensure_logit_attribution(shared.run(), wanted, shared.rebuild)
    result = artifact.manifest()["result"]
    show_heads(result)
    finish_artifact(artifact, shared.json)


def formats(
    shared: Shared,
    prompts: Annotated[
        Path | None, typer.Option(help="CSV of harmful instructions, column prompt or goal. [default: the test split]")
    ] = None,
    category: Annotated[str, typer.Option(help="Without --prompts: OR-Bench category, or all.")] = "all",
    limit: Annotated[int | None, typer.Option(min=2, help="At most this many of each side, chosen by hash.")] = None,
    definitions: Annotated[
        Path | None, typer.Option(help="YAML file with other formats or answers. [default: the package's three]")
    ] = None,
) -> None:
    """Ask harmful instructions as a question, a blank to fill and a choice; does the format change the refusal?

    Example: sfc formats --prompts harmful_behaviors.csv --limit 100
    """
    from sfc.data.schema import category_or_all
    from sfc.pipeline_study import ensure_formats
    from sfc.studies.formats.formats import FORMATS, load_formats

    wanted = category_or_all(category)
    asked = load_formats(definitions or FORMATS)
    artifact = ensure_formats(shared.run(), asked, prompts, wanted, limit, shared.rebuild)
    result = artifact.manifest()["result"]
    show_formats(result)
    finish_artifact(artifact, shared.json)


def patch(
    shared: Shared,
    pairs: Annotated[
        str | None, typer.Option(help="toxic-safe, wrapped, or a CSV or .jsonl file with toxic and safe.")
    ] = None,
    wrappers: Annotated[
        str | None, typer.Option(help="For wrapped pairs: CSV or .jsonl with name, template ({prompt}), prefill.")
    ] = None,
    component: Annotated[str | None, typer.Option(help="Among resid,attn,mlp,head. [default: all four]")] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Among last,last-K,suffix,content,prefix,all,each,suffix[-2]. [default: suffix; wrapped: last]"
        ),
    ] = None,
    direction: Annotated[str | None, typer.Option(help="denoise, noise or both. [default: both]")] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 10-20,25. [default: all]")] = None,
    cumulative: Annotated[bool, typer.Option("--cumulative", help="Also all layers up to each at once.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Try at most this many pairs. [default: 24]")] = None,
    category: Annotated[str | None, typer.Option(help="Only pairs of this category.")] = None,
    require: Annotated[
        str | None, typer.Option(help="behaviour: judged replies differ; score: the score does. [default: behaviour]")
    ] = None,
) -> None:
    """Patch activations between refused and complied runs: which layers, heads and positions carry the refusal?

    Example: sfc patch --component head --positions last,suffix --limit 40
    """
    from sfc.pipeline_study import ensure_patching

    values = {
        "pairs": pairs, "wrappers": wrappers, "limit": limit, "category": category, "require": require,
        "components": component and component.split(","), "positions": positions and positions.split(","),
        "directions": direction and (["denoise", "noise"] if direction == "both" else [direction]),
        "layers": layers and numbers_of(layers), "cumulative": cumulative or None,
    }  # fmt: skip
    overrides = overrides_of("patching", values)
    artifact = ensure_patching(shared.run(overrides), shared.rebuild)
    result = artifact.manifest()["result"]
    show_patching(result)
    finish_artifact(artifact, shared.json)


def batch(
    shared: Shared,
    models: Annotated[str | None, typer.Option(help="Presets or .yaml files: a,b,c. [default: --preset]")] = None,
    file: Annotated[Path | None, typer.Option(help="Instead: a YAML file with a list `models:`.")] = None,
    category: Annotated[str, typer.Option(help="OR-Bench category, or all, where a stage takes one.")] = "violence",
    stages: Annotated[str, typer.Option(help="Among behaviour,probe,logits,patching,circuit.")] = (
        "behaviour,probe,logits,patching"
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Behaviour: at most this many prompts per label.")] = 40,
) -> None:
    """Study several models alike and compare them; what is finished is kept, and what fails is listed with its reason.

    Example: sfc batch --models smollm2,smollm2-base --set patching.limit=40
    """
    from sfc.data.schema import category_or_all
    from sfc.studies.batch.batch import check_stages, make_batch

    wanted, chosen = category_or_all(category), [stage.strip() for stage in stages.split(",")]
    check_stages(chosen)
    runs = shared.runs(models or (None if file else shared.preset), file)
    artifact = make_batch(runs, chosen, wanted, limit, shared.rebuild)
    result = artifact.manifest()["result"]
    show_batch(result)
    finish_artifact(artifact, shared.json)


def report(shared: Shared) -> None:
    """Put all that is finished of a preset into one report, in Markdown and as one HTML page.

    Example: sfc report --preset smollm2
    """
    from sfc.pipeline_study import ensure_report

    finish_artifact(ensure_report(shared.run(), shared.rebuild), shared.json)


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
    overrides = overrides_of("steering", values)
    artifact = ensure_steering(shared.run(overrides), shared.rebuild)
    result = artifact.manifest()["result"]
    show_steering(result)
    finish_artifact(artifact, shared.json)


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
    result = artifact.manifest()["result"]
    show_repair(result)
    finish_artifact(artifact, shared.json)


def replicate(
    shared: Shared,
    category: Annotated[str, typer.Option(help="OR-Bench category, or all.")] = "violence",
    sae_seed: Annotated[int, typer.Option(min=0, help="Seed that the other SAEs are trained from.")] = 1,
    method: Annotated[str | None, typer.Option(help="As of discover. [default: the preset's]")] = None,
) -> None:
    """Does the circuit come back when the SAEs are trained anew from another seed? Trains and discovers where needed.

    Example: sfc replicate --category violence --sae-seed 2
    """
    from sfc.data.schema import category_or_all
    from sfc.pipeline_study import ensure_replication

    wanted = category_or_all(category)
    run = shared.run([f"discovery.method={method}"] if method else [])
    artifact = ensure_replication(run, wanted, sae_seed, shared.rebuild)
    result = artifact.manifest()["result"]
    show_replication(result)
    finish_artifact(artifact, shared.json)
