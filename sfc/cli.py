"""The command `sfc`: one sub-command per stage, and the doors that the scripts open.

Errors that a user can mend end with one line and exit status 2. Paths of what was made are printed last; with `--json`
the last line on standard output is one JSON object and everything else goes to standard error.
"""

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from sfc.cli_explore import draw, explore, export
from sfc.cli_options import Shared, command_of, finish, finish_artifact, with_shared_options
from sfc.cli_study import attribute_logits, batch, formats, patch, repair, replicate, report, steer
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment, preset_names
from sfc.studies.study import STUDIES
from sfc.tables import (
    show_behaviour,
    show_checks,
    show_comparison,
    show_presets,
)

app = typer.Typer(
    help="Find the sparse feature circuits behind a language model's refusals, and prove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@with_shared_options
def behaviour(
    shared: Shared,
    prompts: Annotated[
        Path | None, typer.Option(help="CSV with a column prompt, optional category, label; XSTest's columns work.")
    ] = None,
    split: Annotated[str, typer.Option(help="Without --prompts: discovery, reference, test or all.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many prompts, chosen by hash.")] = None,
) -> None:
    """Generate a short reply to each prompt, judge it, and compare the refusal score with what the model did.

    Example: sfc behaviour --prompts data/xstest/xstest_prompts.csv
    """
    from sfc.pipeline_study import ensure_behaviour

    artifact = ensure_behaviour(shared.run(), prompts, split, limit, shared.rebuild)
    result = artifact.manifest()["result"]
    show_behaviour(result)
    finish_artifact(artifact, shared.json)


@app.command()
@with_shared_options
def compare(
    shared: Shared,
    categories: Annotated[str, typer.Option(help="Among the ten, separated by commas, or all.")] = "all",
    method: Annotated[
        str | None,
        typer.Option(help="learned-mask, attribution, integrated-gradients or exact. [default: the preset's]"),
    ] = None,
    contrast: Annotated[
        str | None, typer.Option(help="toxic-safe, or toxic-hard: against hard prompts only. [default: the preset's]")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Nodes of each circuit. [default: 200]")] = None,
) -> None:
    """Are the categories one mechanism or many? Overlap and transfer of their circuits, and their shared core.

    Example: sfc compare --categories violence,privacy,illegal
    """
    from sfc.data.schema import ALL, CATEGORIES, canonical_category
    from sfc.pipeline import ensure_comparison

    wanted = CATEGORIES if categories == ALL else [canonical_category(name) for name in categories.split(",")]
    values = {"discovery.method": method, "discovery.contrast": contrast, "comparison.size": size}
    overrides = [f"{key}={value}" for key, value in values.items() if value is not None]
    artifact = ensure_comparison(shared.run(overrides), wanted, shared.rebuild)
    result = artifact.manifest()["result"]
    show_comparison(result)
    finish_artifact(artifact, shared.json)


@app.command()
@with_shared_options
def adapter(
    shared: Shared,
    output: Annotated[Path | None, typer.Option(help="Folder to write to. [default: ROOT/adapters/refusal]")] = None,
) -> None:
    """Train the refusal adapter of the embedded model anew, from data/mini/adapter.csv (minutes).

    Example: sfc adapter --seed 1 --output my-adapter, then --set model.adapter=my-adapter
    """
    from tools.refusal_adapter import train_refusal_adapter

    run = shared.run()
    folder = output or shared.root / "adapters" / "refusal"
    checks = train_refusal_adapter(run.data_folder / "adapter.csv", folder, run.experiment.seed)
    finish({"checks": [check._asdict() for check in checks], "files": {"adapter": str(folder)}}, shared.json)


@app.command("data")
@with_shared_options
def describe(shared: Shared) -> None:
    """Show what is in the data: counts, imbalance, lengths, duplicates; as a table, a CSV and a plot.

    Example: sfc data --data or-bench
    """
    from sfc.studies.data import describe_data

    finish(describe_data(shared.run()), shared.json)


@app.command()
@with_shared_options
def download(shared: Shared) -> None:
    """Fetch OR-Bench and XSTest from the Hugging Face hub into ROOT/data (needs a network).

    Example: sfc download && sfc discover --data or-bench
    """
    from sfc.data.download import download as fetch

    files = {item.path.name: str(item.path) for item in fetch(shared.root / "data")}
    finish({"files": files}, shared.json)


@app.command()
@with_shared_options
def presets(shared: Shared) -> None:
    """List the presets.

    Example: sfc presets --json
    """
    experiments = [load_experiment(name) for name in preset_names()]
    show_presets(experiments)
    finish({"presets": {e.name: e.model_dump() for e in experiments}, "files": {}}, shared.json)


@app.command()
@with_shared_options
def doctor(shared: Shared) -> None:
    """Check the machine, the data and the artifacts; exit status 2 where something is wrong.

    Example: sfc doctor --preset llama2-7b-chat --device cuda
    """
    from sfc.studies.doctor import examine

    checks = examine(shared.run())
    show_checks(checks)
    finish({"checks": [check._asdict() for check in checks], "files": {}}, shared.json)
    if not all(check.ok for check in checks):
        raise UserError("sfc doctor found problems: see the lines marked 'no'")


for command in (
    attribute_logits,
    formats,
    patch,
    batch,
    steer,
    repair,
    replicate,
    report,
    draw,
    export,
    explore,
):
    app.command()(with_shared_options(command))
for study in STUDIES:
    app.command(study.name)(command_of(study))


_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "no permission to write",
    errno.EDQUOT: "the disk quota is used up",
}


def main() -> None:
    """Run the command line; a mistake that a user can mend ends with one line and exit status 2."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        reason = _DISK_ERRORS.get(error.errno or 0)
        if reason is None:
            raise
        _fail(f"{reason}: {error.filename or Path.cwd()}; free some space or choose another --root")


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def run_script(command: str) -> None:
    """What a script in `scripts/` does: `sfc COMMAND` with the script's arguments."""
    sys.argv = [sys.argv[0], command, *sys.argv[1:]]
    main()


if __name__ == "__main__":
    main()
