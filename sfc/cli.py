"""The command `sfc`: one sub-command per study, a few others, and the door that the scripts open.

Mistakes that a user can correct end with one line and exit status 2, faults of the program with one line and 1. Paths
of what was made are printed last; with `--json` the last line on standard output is one JSON object and everything else
goes to standard error.
"""

import inspect
import io
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from sfc.cli_options import Shared, command_of, finish, further_settings, with_shared_options
from sfc.core.errors import INTERRUPTED, INTERRUPTED_LINE, UserError
from sfc.core.experiments import load_experiment, preset_names
from sfc.core.faults import fault_message, user_message
from sfc.core.files import below
from sfc.core.machine import bytes_of
from sfc.core.progress import printable, say
from sfc.core.ranks import by_leader, give_up, is_lost
from sfc.pages.blocks import Table
from sfc.pages.plain import show
from sfc.studies.study import STUDIES


def batch(
    shared: Shared,
    models: Annotated[str | None, typer.Option(help="Presets or .yaml files: a,b,c.", show_default="--preset")] = None,
    file: Annotated[Path | None, typer.Option(help="Instead: a YAML file with a list `models:`.")] = None,
    stages: Annotated[str, typer.Option(help="Any studies by their commands, such as steer,discover.")] = (
        "behaviour,probe,attribute-logits,patch"
    ),
    category: Annotated[
        str | None, typer.Option(help="Group of prompts, where a study takes one.", show_default="each study's own")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many prompts, where a study has no limit of its own.")
    ] = 40,
) -> None:
    """Study several models alike and compare them; what is finished is kept, and what fails is listed with its reason.

    Example: sfc batch --models smollm2,smollm2-base --set patching.limit=40
    """
    from sfc.studies.batch import make_batch, stages_of

    chosen, runs = stages_of(stages), shared.runs(models or (None if file else shared.preset), file)
    made = make_batch(runs, chosen, runs[0].group(category) if category else None, limit)
    show(made.page.summary)
    finish(made.report, shared.json)


_Category = Annotated[
    str | None, typer.Option(help="OR-Bench category, such as violence or self-harm.", show_default="violence")
]


def draw(shared: Shared, category: _Category = None) -> None:
    """Draw a circuit's page again, with the labels of labels.json in its folder; discovers it first where needed.

    Example: sfc draw --category privacy
    """
    from sfc.studies.discover import draw_circuit

    run = shared.run()
    finish({"category": run.group(category), "files": draw_circuit(run, category)}, shared.json)


def export(
    shared: Shared,
    category: _Category = None,
    format: Annotated[
        str, typer.Option(help="Among graphml,gexf,csv,circuit-tracer.")
    ] = "graphml,gexf,csv,circuit-tracer",
    output: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="the circuit's")] = None,
    spreadsheets: Annotated[
        bool, typer.Option("--spreadsheets", help="Also copy every table so that no cell is taken for a formula.")
    ] = False,
) -> None:
    """Write a circuit for other programs: Gephi and Cytoscape, tables, circuit-tracer and Neuronpedia.

    Example: sfc export --category violence --format graphml,circuit-tracer --output violence
    """
    from sfc.circuits.files import export_circuit, for_spreadsheets, load_circuit
    from sfc.features.labels import labels_of
    from sfc.studies.discover import circuit_of

    run = shared.run()
    circuit = circuit_of(run, category)
    graph = load_circuit(circuit.files["circuit"])
    formats = [name.strip() for name in format.split(",")]
    files = export_circuit(graph, labels_of(circuit.folder), formats, output or circuit.folder)
    if spreadsheets:
        tables = {path.name: path for path in [*circuit.folder.glob("*.csv"), *files.values()] if path.suffix == ".csv"}
        copies = for_spreadsheets(tables.values(), (output or circuit.folder) / "spreadsheets")
        files |= {f"spreadsheet {name}": path for name, path in copies.items()}
    finish({"category": run.group(category), "files": {name: str(path) for name, path in files.items()}}, shared.json)


def explore(
    shared: Shared,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 8050,
) -> None:
    """Explore finished circuits in a browser on this machine: side by side, and with prompts of your own.

    Example: sfc explore --root . --port 8051
    """
    try:
        from sfc.explorer.app import explorer
        from sfc.models.loading import choose_device
    except ModuleNotFoundError as error:
        raise UserError(f"the explorer needs the package {error.name}: pip install 'sfc[explorer]'") from None
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None
    choose_device(shared.device)
    app = explorer(shared.root, shared.device)
    say(f"http://127.0.0.1:{port} (ends with Ctrl+C)")
    app.run(host="127.0.0.1", port=port, debug=False)


def data(shared: Shared) -> None:
    """Show what is in the data: counts, imbalance, lengths, duplicates; as a table, a CSV and a plot.

    Example: sfc data --data or-bench
    """
    from sfc.studies.data import describe_data

    described, page = describe_data(shared.run())
    show(page.summary)
    finish(described, shared.json)


def download(shared: Shared) -> None:
    """Fetch OR-Bench and XSTest from the Hugging Face hub into ROOT/data (needs a network).

    Example: sfc download && sfc discover --data or-bench
    """
    from sfc.data.download import download as fetch

    files = {item.path.name: str(item.path) for item in fetch(below(shared.root, "data"))}
    finish({"files": files}, shared.json)


def presets(shared: Shared) -> None:
    """List the presets.

    Example: sfc presets --json
    """
    experiments = [load_experiment(name) for name in preset_names()]
    sites = [f"{a.kind} {a.layers[0]}–{a.layers[-1]}" for a in (e.activations for e in experiments)]
    rows = [(e.name, e.model.source, at, e.description) for e, at in zip(experiments, sites, strict=True)]
    titles = ("preset", "model", "sites", "what it is")
    show([Table("Presets", titles, rows, texts=titles)])
    finish({"presets": {e.name: e.model_dump(mode="json") for e in experiments}, "files": {}}, shared.json)


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


def plan(
    shared: Shared,
    command: Annotated[str, typer.Option(help="Of which command, such as train or compare.")] = "discover",
    memory: Annotated[
        str | None,
        typer.Option(help="Say whether it fits into so much memory where the model is (24GB), and what makes it fit."),
    ] = None,
) -> None:
    """Say what a command would make on this machine, step by step: time, memory, disk. Nothing is made or loaded.

    The same as --dry-run of that command, which takes the command's own options. With --device cuda also where there is
    no such device: then without times.

    Example: sfc plan --preset gemma2-2b-it --device cuda --memory 24GB
    """
    from sfc.studies.plan import blocks, fitted, memory_blocks, report
    from sfc.studies.plan import plan as plan_of

    wanted, study = memory and bytes_of(memory), STUDIES[command]
    planned = plan_of(study, shared.run(), shared.rebuild)
    result = report(planned)
    show(blocks(planned))
    if wanted and planned.steps:
        settings = fitted(planned, study, wanted)
        show(memory_blocks(planned, wanted, settings))
        result["memory"] = {"wanted_bytes": wanted, "fits": settings == [], "settings": settings}
    finish(result, shared.json)


_LONGEST_LINE = 1000
"""characters of a message"""
_COMMANDS = (plan, batch, draw, export, explore, data, download, presets, doctor)


def command_line() -> typer.Typer:
    """All commands: those of the registered studies, and the others.

    Raises:
        UserError: a plugin cannot be loaded.
    """
    app = typer.Typer(
        help="Find the sparse feature circuits behind a language model's behavior, such as refusing, and test them.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for study in STUDIES:
        text = escape(inspect.cleandoc(study.__doc__ or ""))
        app.command(study.name, help=text, epilog=further_settings(study), rich_help_panel="Studies")(command_of(study))
    for command in _COMMANDS:
        text = escape(inspect.cleandoc(command.__doc__ or ""))
        app.command(command.__name__, help=text, rich_help_panel="Other commands")(
            with_shared_options(command if command is batch else by_leader(command))
        )
    return app


def main() -> None:
    """Run the command line; `sfc.__main__` does so for a process of its own."""
    run(command_line, "sfc")


def run(program: Callable[[], typer.Typer], name: str) -> NoReturn:
    """Run a program with the process's arguments; whatever goes wrong ends with one line and an exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be valid in any encoding
    try:
        status = program()(sys.argv[1:] or ["--help"], prog_name=name, standalone_mode=False)
        print(end="", flush=True)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        _end_silently()
    except SystemExit as end:
        if end.code == 1:  # typer's answer to a broken pipe
            _end_silently()
        raise
    except Exception as error:
        message = user_message(error)
        _end(f"error: {message or fault_message(error)}", 2 if message else 1)
    if status == INTERRUPTED:
        if is_lost():
            sys.exit(2)
        give_up("interrupted")
        _end(INTERRUPTED_LINE, INTERRUPTED)
    sys.exit(status or 0)


def _end_silently() -> NoReturn:
    """Whoever read the output has gone, as `head` does; what is left of it goes nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    sys.exit(128 + signal.SIGPIPE)


def _end(message: str, status: int) -> NoReturn:
    line = printable(" ".join(message.split()))
    if len(line) > _LONGEST_LINE:  # what was given is part of it
        line = f"{line[: _LONGEST_LINE * 3 // 4]} … {line[-_LONGEST_LINE // 4 :]}"
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    give_up(line.removeprefix("error: "))
    sys.exit(status)
