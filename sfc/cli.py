"""The command `sfc`: one sub-command per stage, and the doors that the scripts open.

Errors that a user can mend end with one line and exit status 2. Paths of what was made are printed last; with `--json`
the last line on standard output is one JSON object and everything else goes to standard error.
"""

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from sfc.cli_options import Shared, command_of, finish, with_shared_options
from sfc.core.config import ActivationsConfig
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment, preset_names
from sfc.core.progress import say
from sfc.pages.blocks import Table
from sfc.pages.terminal import show
from sfc.studies.study import STUDIES

app = typer.Typer(
    help="Find the sparse feature circuits behind a language model's refusals, and prove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@with_shared_options
def batch(
    shared: Shared,
    models: Annotated[str | None, typer.Option(help="Presets or .yaml files: a,b,c. [default: --preset]")] = None,
    file: Annotated[Path | None, typer.Option(help="Instead: a YAML file with a list `models:`.")] = None,
    stages: Annotated[str, typer.Option(help="Any studies by their commands, such as steer,discover.")] = (
        "behaviour,probe,attribute-logits,patch"
    ),
    category: Annotated[
        str | None, typer.Option(help="OR-Bench category, or all, where a study takes one. [default: each study's own]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many prompts, where a study has no limit of its own.")
    ] = 40,
) -> None:
    """Study several models alike and compare them; what is finished is kept, and what fails is listed with its reason.

    Example: sfc batch --models smollm2,smollm2-base --set patching.limit=40
    """
    from sfc.data.schema import category_or_all
    from sfc.studies.batch.batch import make_batch, stages_of

    chosen, wanted = stages_of(stages), category_or_all(category) if category else None
    runs = shared.runs(models or (None if file else shared.preset), file)
    made = make_batch(runs, chosen, wanted, limit)
    show(made.page.summary)
    finish(made.report, shared.json)


_Category = Annotated[
    str | None, typer.Option(help="OR-Bench category, such as violence or self-harm. [default: violence]")
]


@app.command()
@with_shared_options
def draw(shared: Shared, category: _Category = None) -> None:
    """Draw a circuit's page again, with the labels of labels.json in its folder; discovers it first where needed.

    Example: sfc draw --category privacy
    """
    from sfc.studies.discover.draw import draw_circuit

    run = shared.run()
    finish({"category": run.group(category), "files": draw_circuit(run, category)}, shared.json)


@app.command()
@with_shared_options
def export(
    shared: Shared,
    category: _Category = None,
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
    from sfc.features.labels import labels_of
    from sfc.studies.discover.study import circuit_of

    run = shared.run()
    circuit = circuit_of(run, category)
    graph = load_circuit(circuit.files["circuit"])
    formats = [name.strip() for name in format.split(",")]
    files = export_circuit(graph, labels_of(circuit.folder), formats, output or circuit.folder)
    finish({"category": run.group(category), "files": {name: str(path) for name, path in files.items()}}, shared.json)


@app.command()
@with_shared_options
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

    described, page = describe_data(shared.run())
    show(page.summary)
    finish(described, shared.json)


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
    rows = [(e.name, e.model.source, _sites_text(e.activations), e.description) for e in experiments]
    titles = ("preset", "model", "sites", "what it is")
    show([Table("Presets", titles, rows, texts=titles)])
    finish({"presets": {e.name: e.model_dump() for e in experiments}, "files": {}}, shared.json)


def _sites_text(activations: ActivationsConfig) -> str:
    return f"{activations.kind} {activations.layers[0]}–{activations.layers[-1]}"


@app.command()
@with_shared_options
def doctor(shared: Shared) -> None:
    """Check the machine, the data and the artifacts; exit status 2 where something is wrong.

    Example: sfc doctor --preset llama2-7b-chat --device cuda
    """
    from sfc.studies.doctor import examine

    checks = examine(shared.run())
    show([Table("sfc doctor", ("what", "ok", "finding"), [(c.what, "ok" if c.ok else "no", c.finding) for c in checks],
                texts=("ok", "finding"))])  # fmt: skip
    finish({"checks": [check._asdict() for check in checks], "files": {}}, shared.json)
    if not all(check.ok for check in checks):
        raise UserError("sfc doctor found problems: see the lines marked 'no'")


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
