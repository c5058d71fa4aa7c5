"""The command `sfc`: one sub-command per study, a few others, and the door that the scripts open.

Mistakes that a user can correct end with one line and exit status 2, faults of the program with one line and 1. Paths
of what was made are printed last; with `--json` the last line on standard output is one JSON object and everything else
goes to standard error.
"""

import errno
import inspect
import io
import os
import shlex
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.markup import escape

from sfc.cli_options import Shared, command_of, finish, further_settings, with_shared_options
from sfc.core.artifacts import package_versions
from sfc.core.config import ActivationsConfig
from sfc.core.errors import INTERRUPTED, INTERRUPTED_LINE, UserError, first_problem
from sfc.core.experiments import load_experiment, preset_names
from sfc.core.progress import printable, say
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
) -> None:
    """Write a circuit for other programs: Gephi and Cytoscape, tables, circuit-tracer and Neuronpedia.

    Example: sfc export --category violence --format graphml,circuit-tracer --output violence
    """
    from sfc.circuits.files import export_circuit, load_circuit
    from sfc.features.labels import labels_of
    from sfc.studies.discover import circuit_of

    run = shared.run()
    circuit = circuit_of(run, category)
    graph = load_circuit(circuit.files["circuit"])
    formats = [name.strip() for name in format.split(",")]
    files = export_circuit(graph, labels_of(circuit.folder), formats, output or circuit.folder)
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
    except ModuleNotFoundError as error:
        raise UserError(f"the explorer needs the package {error.name}: pip install 'sfc[explorer]'") from None
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None
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

    files = {item.path.name: str(item.path) for item in fetch(shared.root / "data")}
    finish({"files": files}, shared.json)


def presets(shared: Shared) -> None:
    """List the presets.

    Example: sfc presets --json
    """
    experiments = [load_experiment(name) for name in preset_names()]
    rows = [(e.name, e.model.source, _sites_text(e.activations), e.description) for e in experiments]
    titles = ("preset", "model", "sites", "what it is")
    show([Table("Presets", titles, rows, texts=titles)])
    finish({"presets": {e.name: e.model_dump(mode="json") for e in experiments}, "files": {}}, shared.json)


def _sites_text(activations: ActivationsConfig) -> str:
    return f"{activations.kind} {activations.layers[0]}–{activations.layers[-1]}"


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


_COMMANDS = (batch, draw, export, explore, data, download, presets, doctor)

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another --root",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another --root",
    errno.EFBIG: "a file would be larger than this process may write: raise the limit (ulimit -f)",
    errno.EROFS: "the disk is read-only: choose another --root",
    errno.EACCES: "no permission to read or write: change that, or choose another --root",
    errno.EPERM: "no permission to read or write: change that, or choose another --root",
    errno.ENAMETOOLONG: "a name is too long: give a shorter one",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENOMEM: "there is not enough memory: make it less, or use a larger machine",
}
"""what a user can do about an error of the operating system"""
_KINDS = {
    "MemoryError": "there is not enough memory",
    "OutOfMemoryError": "the device has not enough memory (--device cpu is slower, and may have more)",
    "SafetensorError": "a file of weights is damaged",
    "UnicodeError": "a text is not valid UTF-8",
    "TemplateError": "a chat template cannot be rendered (see --set model.template)",
    "ImportError": "a package is missing or does not fit the others: pip install it",
}
"""what an error says to a user who can correct it, by the name of its class or of one that it is derived from"""
_ALLOCATION = "allocate memory"
"""what torch's error of no particular class says when main memory does not suffice"""


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
        app.command(command.__name__, help=text, rich_help_panel="Other commands")(with_shared_options(command))
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
    except UserError as error:
        _end(f"error: {error}", 2)
    except Exception as error:
        message = _user_message(error)
        _end(f"error: {message or _fault_message(error)}", 2 if message else 1)
    if status == INTERRUPTED:
        _end(INTERRUPTED_LINE, INTERRUPTED)
    sys.exit(status or 0)


def _end_silently() -> NoReturn:
    """Whoever read the output has gone, as `head` does; what is left of it goes nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    sys.exit(128 + signal.SIGPIPE)


def _user_message(error: Exception) -> str | None:
    """What to tell a user of an error that he can correct; None for a fault of the program."""
    if of_usage := getattr(error, "format_message", None):  # typer's copy of click has private classes
        return f"{of_usage()} (see --help)"
    told = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ValidationError):
        return f"a file or a setting does not have the form that it should: {first_problem(error)}"
    if isinstance(error, OSError):
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        places = ", ".join(map(os.fsdecode, names))
        if remedy := _REMEDIES.get(error.errno or 0):
            return f"{remedy} ({places or Path.cwd()})"
        what = f"cannot read or write {places or 'a file'}: {error.strerror or told}; check what is there"
        return what if error.errno else told  # libraries raise it with a sentence of their own
    if isinstance(error, RuntimeError) and _ALLOCATION in told:
        return f"there is not enough memory: {told}"
    kinds = [_KINDS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _KINDS]
    return f"{kinds[0]}: {told}" if kinds else None


def _fault_message(error: Exception) -> str:
    """What to tell a user of an error that is the program's; the traceback goes to a file."""
    what = f"unexpected {type(error).__name__}: {error}"[:300]
    told = [shlex.join(["sfc", *sys.argv[1:]]), str(package_versions()), traceback.format_exc()]
    try:
        descriptor, path = tempfile.mkstemp(prefix="sfc-fault-", suffix=".txt")
        os.close(descriptor)
        Path(path).write_text("\n".join(told), encoding="utf-8", errors="backslashreplace")
    except OSError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{what} (line {last.lineno} of {last.filename}; its traceback could not be written)"
    return f"{what}; its traceback is in {path}"


def _end(message: str, status: int) -> NoReturn:
    with suppress(OSError):
        print(printable(" ".join(message.split())), file=sys.stderr, flush=True)
    sys.exit(status)
