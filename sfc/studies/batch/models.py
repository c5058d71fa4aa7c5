"""A study of several models: which presets, each with its own overrides, from a list of names or a YAML file."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sfc.core.config import Experiment
from sfc.core.errors import UserError, first_problem
from sfc.core.experiments import load_experiment, read_yaml


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = Field(min_length=1)
    set: list[str] = []


class _Study(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[_Entry] = Field(min_length=1)

    @field_validator("models", mode="before")
    @classmethod
    def _names_are_presets(cls, entries: Any) -> Any:
        if not isinstance(entries, list):
            return entries
        return [{"preset": entry} if isinstance(entry, str) else entry for entry in entries]


def load_study(models: str | None, file: Path | None, overrides: Sequence[str]) -> list[Experiment]:
    """The experiments that `--models a,b` or a file means; overrides apply to all, after those of the file.

    A file holds `models:`, a list of preset names or of mappings with `preset` and `set` (a list of overrides).

    Raises:
        UserError: both are given, the file is malformed, a preset does not exist, or two models have one name.
    """
    if (models is None) == (file is None):
        raise UserError("name the models with --models a,b or with --file study.yaml, not with both or neither")
    entries = _read(file) if file else [_Entry(preset=name.strip()) for name in (models or "").split(",")]
    experiments = [load_experiment(entry.preset, [*entry.set, *overrides]) for entry in entries]
    twice = [name for name, count in Counter(experiment.name for experiment in experiments).items() if count > 1]
    if twice:
        raise UserError(f"two models are named {twice[0]!r}: give one another name with set: [name=…]")
    return experiments


def _read(file: Path) -> list[_Entry]:
    try:
        return _Study.model_validate(read_yaml(file)).models
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}; expected `models:`, a list of presets") from None
