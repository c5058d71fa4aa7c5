"""Where the figures of a training go: a JSON-lines file per SAE always, wandb and TensorBoard only if asked for."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from sfc.core.artifacts import write_text
from sfc.core.contents import read_bytes
from sfc.core.errors import UserError, first_problem, suggestion
from sfc.core.files import open_journal
from sfc.saes.train import Progress

LOG_FILE = "training.jsonl"
Log = Callable[[Progress], None]


def json_lines(folder: Path, sites: Sequence[str], first_step: int) -> Log:
    """Append each report to `SITE/training.jsonl`; lines of steps after `first_step`, to be done again, are dropped.

    Raises:
        UserError: a log that is there already is damaged.
    """
    for site in sites:
        path = folder / site / LOG_FILE
        text = read_bytes(path).decode(errors="replace") if os.path.lexists(path) else ""
        whole = text.split("\n")[:-1]  # a kill may have cut short what follows the last of them
        write_text(path, "".join(f"{line}\n" for line in whole if _step(line, path) <= first_step))

    def log(progress: Progress) -> None:
        for stats in progress.sites:
            line = {"step": progress.step, "tokens_per_second": round(progress.tokens_per_second, 1)}
            with open_journal(folder / stats.site / LOG_FILE) as file:
                file.write(f"{json.dumps(line | stats._asdict())}\n".encode())

    return log


class _Line(BaseModel):
    """What decides whether a line is kept."""

    step: int = Field(ge=1)


def _step(line: str, path: Path) -> int:
    try:
        return _Line.model_validate_json(line).step
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); delete it and run the same command") from None


def loggers(names: Sequence[str], folder: Path, experiment: dict[str, Any]) -> list[Log]:
    """The loggers with these names: `wandb` (project sfc) or `tensorboard` (files in `folder/tensorboard`).

    Raises:
        UserError: the name is unknown, or the package is not installed.
    """
    known = {"wandb": _wandb, "tensorboard": _tensorboard}
    for name in names:
        if name not in known:
            raise UserError(f"no logger {name!r}: {suggestion(name, known)}")
    return [known[name](folder, experiment) for name in names]


def _wandb(folder: Path, experiment: dict[str, Any]) -> Log:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise _not_installed("wandb") from None
    run = wandb.init(project="sfc", name=folder.name, dir=folder, config=experiment)
    return lambda progress: run.log(_scalars(progress), step=progress.step)


def _tensorboard(folder: Path, experiment: dict[str, Any]) -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _not_installed("tensorboard") from None
    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("experiment", f"```json\n{json.dumps(experiment, indent=1)}\n```")

    def log(progress: Progress) -> None:
        for name, value in _scalars(progress).items():
            writer.add_scalar(name, value, progress.step)
        writer.flush()

    return log


def _scalars(progress: Progress) -> dict[str, float]:
    scalars = {"tokens_per_second": progress.tokens_per_second}
    for stats in progress.sites:
        scalars |= {f"{stats.site}/{name}": value for name, value in stats._asdict().items() if name != "site"}
    return scalars


def _not_installed(package: str) -> UserError:
    return UserError(f"--log {package} needs the package {package}: pip install 'sfc[logging]'")
