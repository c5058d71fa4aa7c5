"""The options that every command shares, written once."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.core.options import Flag, flags_of, overrides_of
from sfc.core.progress import say
from sfc.core.ranks import is_leader
from sfc.pages.terminal import show
from sfc.run import Run
from sfc.studies.batch.models import load_study
from sfc.studies.study import Study, ensure


@dataclass(frozen=True)
class Shared:
    """What the shared options say."""

    preset: Annotated[str, typer.Option(help="Name of a preset (see `sfc presets`), or a .yaml file.")] = "smollm2"
    data: Annotated[str, typer.Option(help="Data set below ROOT/data, or a folder with the three OR-Bench files.")] = (
        "mini"
    )
    device: Annotated[str, typer.Option(help="auto picks CUDA where there is one; else cpu, cuda, cuda:1 …")] = "auto"
    seed: Annotated[int | None, typer.Option(help="Seed of splits, SAEs and draws. [default: the preset's]")] = None
    root: Annotated[Path, typer.Option(help="Folder in which data/ activations/ saes/ circuits/ lie.")] = Path()
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make this command's artifact again.")] = False
    set: Annotated[list[str] | None, typer.Option(help="Change a value: section.key=value. May be repeated.")] = None
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False

    def run(self, overrides: list[str] | None = None) -> Run:
        """The run these options describe, with further overrides.

        Raises:
            UserError: the preset, an override or the root folder is wrong.
        """
        return self._run(load_experiment(self.preset, self._overrides(overrides or [])))

    def runs(self, models: str | None, file: Path | None) -> list[Run]:
        """The runs of several models that share everything else; arguments as `load_study`.

        Raises:
            UserError: as `run`, or the list is wrong.
        """
        return [self._run(experiment) for experiment in load_study(models, file, self._overrides([]))]

    def _overrides(self, further: list[str]) -> list[str]:
        return [*(self.set or []), *further, *([] if self.seed is None else [f"seed={self.seed}"])]

    def _run(self, experiment: Experiment) -> Run:
        if not self.root.is_dir():
            raise UserError(f"--root {self.root} is not a folder")
        return Run.of(experiment, self.root, self.data, self.device)


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Turn `command(shared, own…)` into a function whose signature has its own options and all shared ones."""
    hints = get_type_hints(Shared, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in fields(Shared)]
    own = [p.replace(kind=keyword) for name, p in inspect.signature(command).parameters.items() if name != "shared"]

    def with_options(**options: Any) -> None:
        common = Shared(**{parameter.name: options.pop(parameter.name) for parameter in shared})
        command(common, **options)

    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
    with_options.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    return with_options


def command_of(study: Study[Any]) -> Callable[..., None]:
    """The command `sfc NAME` of a study: its options, those of other sections that it offers, and the shared ones."""
    offered = [(study.options, flag) for flag in flags_of(study.options)]
    for section, field in study.also:
        offered += [(section, flag) for flag in flags_of(section) if flag.field == field]

    def command(shared: Shared, **values: Any) -> None:
        overrides = []
        for section in dict.fromkeys(section for section, _ in offered):
            of_section = {flag.field: values[flag.field] for kind, flag in offered if kind is section}
            overrides += overrides_of(section, of_section)
        finished = ensure(study, shared.run(overrides), shared.rebuild)
        show(study.page(finished).summary)
        finish(finished.report(), shared.json)

    command.__name__, command.__doc__ = study.name, study.__doc__
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(flag.field, keyword, default=_default(flag), annotation=_annotation(flag))
        for _, flag in offered
    ]
    first = inspect.Parameter("shared", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Shared)
    command.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    return with_shared_options(command)


def _default(flag: Flag) -> Any:
    return False if flag.kind is bool else None


def _annotation(flag: Flag) -> Any:
    """What typer reads: None stands for what the preset says."""
    if flag.positional:
        return Annotated[list[Path] | None, typer.Argument(help=flag.help, show_default=False)]
    if flag.kind is bool:
        return Annotated[bool, typer.Option(flag.name, help=flag.help)]
    kind = list[str] if flag.is_list else flag.kind
    return Annotated[kind | None, typer.Option(flag.name, help=flag.help, show_default=flag.default or False)]


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The paths of what was made; with `--json` they go to standard error and the object to standard output."""
    if not is_leader():
        return
    for path in result["files"].values():
        if as_json:
            say(path)
        else:
            print(path)
    if as_json:
        print(json.dumps(result, allow_nan=False))
