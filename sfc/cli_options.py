"""Options of commands: those that all of them share, and those of a study, made from the fields of its options."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.core.options import Flag, Options, flags_of, overrides_of
from sfc.core.progress import printable, say
from sfc.core.ranks import is_leader
from sfc.pages.plain import show
from sfc.run import Run
from sfc.studies.batch import load_study
from sfc.studies.plan import blocks, plan, report
from sfc.studies.study import Study, ensure

_SHARED = "Options of every command"


def _shared(*flag: str, help: str, **further: Any) -> Any:
    return typer.Option(*flag, help=escape(help), rich_help_panel=_SHARED, **further)


@dataclass(frozen=True)
class Shared:
    """What the shared options say."""

    preset: Annotated[str, _shared(help="Name of a preset (see `sfc presets`), or a .yaml file.")] = "smollm2"
    data: Annotated[str, _shared(help="Data set below ROOT/data, or a folder with the three OR-Bench files.")] = "mini"
    behavior: Annotated[
        str | None,
        _shared(help="What is explained: refusal, pairs, or what a plugin adds.", show_default="the preset's"),
    ] = None
    device: Annotated[str, _shared(help="auto picks CUDA where there is one; else cpu, cuda, cuda:1 …")] = "auto"
    seed: Annotated[int | None, _shared(help="Seed of splits, SAEs and draws.", show_default="the preset's")] = None
    root: Annotated[Path, _shared(help="Folder in which data/ activations/ corpora/ saes/ circuits/ lie.")] = Path()
    rebuild: Annotated[bool, _shared("--rebuild", help="Make this command's artifact again, even if up to date.")] = (
        False
    )
    set: Annotated[list[str] | None, _shared(help="Change a setting: section.key=value. May be repeated.")] = None
    json: Annotated[bool, _shared("--json", help="End with one JSON object on standard output.")] = False

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
        own = {"behavior": self.behavior, "seed": self.seed}
        return [
            *(self.set or []),
            *further,
            *(f"{key}={json.dumps(value)}" for key, value in own.items() if value is not None),
        ]

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
    offered = _offered(study)

    def command(shared: Shared, dry_run: bool = False, **values: Any) -> None:
        overrides = []
        for section in dict.fromkeys(section for section, _ in offered):
            of_section = {flag.field: values[flag.field] for kind, flag in offered if kind is section}
            overrides += overrides_of(section, of_section)
        run = shared.run(overrides)
        if dry_run:
            planned = plan(study, run, shared.rebuild)
            show(blocks(planned))
            finish(report(planned), shared.json)
            return
        finished = ensure(study, run, shared.rebuild)
        if is_leader():
            show(study.page(finished).summary)
            finish(finished.report(), shared.json)

    command.__name__, command.__doc__ = study.name, study.__doc__
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("shared", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Shared)]
    if type(study).work is not Study.work:
        help_text = "Only say what it would make, and what that takes: as `sfc plan`."
        annotation = Annotated[bool, typer.Option("--dry-run", help=help_text)]
        parameters.append(inspect.Parameter("dry_run", keyword, default=False, annotation=annotation))
    for section, flag in offered:
        panel = None if section is study.options else f"Settings of {section.section}"
        default = False if flag.kind is bool else None
        parameters.append(inspect.Parameter(flag.field, keyword, default=default, annotation=_annotation(flag, panel)))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_shared_options(command)


def further_settings(study: Study[Any]) -> str:
    """A line on the settings of a study that its command does not offer as options; empty if there are none."""
    offered = {flag.field for flag in flags_of(study.options)}
    further = [name for name in study.options.model_fields if name not in offered]
    return escape(f"Also by --set {study.options.section}.NAME=VALUE: {', '.join(further)}.") if further else ""


def _offered(study: Study[Any]) -> list[tuple[type[Options], Flag]]:
    offered = [(study.options, flag) for flag in flags_of(study.options)]
    for section, field in study.also:
        offered += [(section, flag) for flag in flags_of(section) if flag.field == field]
    return offered


def _annotation(flag: Flag, panel: str | None) -> Any:
    """What typer reads: None stands for what the preset says."""
    default = f" [dim]{escape(f'[default: {flag.default}]')}[/dim]" if flag.default else ""
    text = f"{escape(flag.help)}{default}"
    if flag.positional:
        return Annotated[list[Path] | None, typer.Argument(help=text, show_default=False)]
    if flag.kind is bool:
        return Annotated[bool, typer.Option(flag.name, help=text, rich_help_panel=panel)]
    kind = list[str] if flag.is_list else flag.kind
    return Annotated[kind | None, typer.Option(flag.name, help=text, rich_help_panel=panel, show_default=False)]


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The paths of what was made; with `--json` they go to standard error and the object to standard output."""
    if not is_leader():
        return
    for path in result["files"].values():
        if as_json:
            say(path)
        else:
            print(printable(path))
    if as_json:
        print(json.dumps(result, allow_nan=False))
