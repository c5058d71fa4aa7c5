"""Experiments as users write them: a preset by its name, or a YAML file, and overrides from the command line.

All of it is validated before anything runs, so that a misspelt key costs a second and not an hour.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from sfc.core.config import Experiment
from sfc.core.errors import UserError, suggestion
from sfc.core.options import SECTIONS
from sfc.core.reading import parse_yaml, read_yaml
from sfc.core.registry import load_plugins

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the presets inside the package, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_experiment(preset: str, overrides: Iterable[str] = ()) -> Experiment:
    """Read a preset by name, or any YAML file by path, and apply `section.key=value` overrides.

    Raises:
        UserError: the preset does not exist, is not YAML, or a key or value is not valid.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.exists():
        raise UserError(f"no preset {preset!r}: {suggestion(preset, preset_names())} (or give a .yaml file)")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold the sections of an experiment, for example 'model:' and 'activations:'")
    values.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(values, override)
    try:
        return experiment_of(values)
    except ValidationError as error:
        raise UserError(f"{path.name}: {_first_problem(error)}") from None


def experiment_of(values: Mapping[str, Any]) -> Experiment:
    """An experiment from its sections as a preset has them.

    Raises:
        ValidationError: a key or a value is not valid.
    """
    return _experiment_class().model_validate(values)


@cache
def _experiment_class() -> type[Experiment]:
    """An `Experiment` with every section that is registered."""
    load_plugins()
    sections: dict[str, Any] = {name: (kind, Field(default_factory=kind)) for name, kind in sorted(SECTIONS.items())}
    return create_model("Experiment", __base__=_Checked, **sections)


class _Checked(Experiment):
    @model_validator(mode="after")
    def _sections_go_together(self) -> "_Checked":
        for kind in SECTIONS.values():
            kind.of(self).check(self)
        return self


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: write section.key=value, for example --set saes.k=64")
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section")
    values[last] = parse_yaml(text, f"--set {override[:100]!r}: {text[:100]!r}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "experiment"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {suggestion(str(problem['loc'][-1]), _known_keys(problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"key {where!r} is missing"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"[:400]


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = _experiment_class()
    for part in location:
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    return list(section.model_fields)
