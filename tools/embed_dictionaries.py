"""Put trained dictionaries into the package, in half precision, as those in `sfc/saes/embedded` were.

    sfc train --preset smollm2 --set saes.source=null …
    python tools/embed_dictionaries.py --preset smollm2 --set saes.source=null … --output sfc/saes/embedded

What the features restore is measured with both: where half precision changes it by more than 0.01, nothing is written.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import typer

from sfc.cli import run
from sfc.cli_options import finish
from sfc.core.artifacts import write_json
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.run import Run
from sfc.saes.dictionary import Dictionary, TopKDictionary
from sfc.saes.format import save_dictionary
from sfc.session import Session
from sfc.studies.study import Finished
from sfc.studies.train.rows import training_rows
from sfc.studies.train.train import prompts_not_trained_on, restored

FIGURES_FILE = "training.json"
LARGEST_CHANGE = 0.01
_SHARES = ("restored_toxic", "restored_safe", "agreement")


def embed(session: Session, folder: Path) -> dict[str, Any]:
    """Write the run's dictionaries in half precision into `folder`, and how they were trained and measured.

    Returns:
        What is in `FIGURES_FILE`: `saes` and `corpus` (the settings), `quality`, and `half_precision`, which has by
        site and in series what the features restore as they are stored.

    Raises:
        UserError: the run has no finished dictionaries, they are not top-k dictionaries, or half precision changes what
            they restore.
    """
    experiment, artifact = session.run.experiment, session.run.saes
    if not artifact.is_complete():
        raise UserError(f"{artifact.folder} is not finished: run `sfc train` with the same settings")
    unseen = prompts_not_trained_on(session.run, training_rows(session))
    halves = {site: _half(dictionary) for site, dictionary in session.dictionaries.items()}
    as_trained = restored(session, session.dictionaries, unseen)
    as_stored = restored(session, {site: deepcopy(half).float() for site, half in halves.items()}, unseen)
    if (change := _largest_change(as_trained, as_stored)) > LARGEST_CHANGE:
        raise UserError(f"half precision changes what features restore by {change:.3f}: nothing is written")
    for site, half in halves.items():
        save_dictionary(half, folder / site, {"preset": experiment.name, "model": experiment.model.source})
    figures = {
        "saes": experiment.saes.identity(),
        "corpus": experiment.corpus.identity(),
        "quality": Finished(artifact.folder).result["quality"],
        "half_precision": as_stored,
    }
    write_json(folder / FIGURES_FILE, figures)
    return figures


def _half(dictionary: Dictionary) -> TopKDictionary:
    if not isinstance(dictionary, TopKDictionary):
        raise UserError(f"the dictionary at {dictionary.site} is no top-k dictionary: only those can be embedded")
    return deepcopy(dictionary).half()


def _largest_change(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> float:
    pairs = [(before[group][name], after[group][name]) for group in before for name in _SHARES]
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def main(
    output: Annotated[Path, typer.Option(help="Folder to write the dictionaries to.")],
    preset: Annotated[str, typer.Option(help="As for `sfc train`.")] = "smollm2",
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for `sfc train`.")] = None,
    root: Annotated[Path, typer.Option(help="Where saes/ lies.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Put trained dictionaries into a folder in half precision."""
    figures = embed(Session(Run.of(load_experiment(preset, settings or ()), root)), output)
    finish({**figures, "files": {"dictionaries": str(output)}}, as_json)


def _program() -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command()(main)
    return app


if __name__ == "__main__":
    run(_program, "embed_dictionaries.py")
