"""Sections of an experiment, and how their fields become options of commands.

A field that is made by `option` can be set on the command line as well as in a preset or by `--set section.field=…`:
its flag, its help, its default and its type are those of the field, so that nothing is said twice.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from sfc.core.errors import UserError, is_count
from sfc.core.registry import KnownTo

_LARGEST, _MOST_NUMBERS = 2**53, 100_000
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of an experiment: immutable, and strict about names so that a misspelt key is an error.

    Numbers are finite and no larger than what a double holds exactly: they go into JSON and into arrays.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _numbers_have_a_size(self) -> Self:
        for name, value in self:
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and abs(number) > _LARGEST:
                    raise ValueError(f"{name} is larger than {_LARGEST:,}")
        return self


class Options(Section):
    """A section of an experiment that is registered by whatever it configures: a study, a behavior, a method."""

    section: ClassVar[str]
    """the section's name in presets and in `--set section.field=…`"""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "section" in cls.__dict__:
            SECTIONS[cls.section] = cls

    @classmethod
    def of(cls, experiment: BaseModel) -> Self:
        """The section of an experiment."""
        return getattr(experiment, cls.section)

    def check(self, experiment: Any) -> None:
        """Check what the section needs of the other sections of its experiment.

        Raises:
            ValueError: they do not go together.
        """


SECTIONS: dict[str, type[Options]] = {}
"""the registered sections by their names"""


def option(
    default: Any = ..., *, flag: str | None = None, positional: bool = False, implies: str | None = None, **field: Any
) -> Any:
    """A field that commands offer as an option.

    Args:
        flag: the option's name where it is not the field's own with dashes, such as `--component`.
        implies: an override `section.key=value` that giving the option brings along.
        positional: the command takes the values without a flag.
        field: what pydantic's `Field` takes: `description` is the option's help, and constraints are checked.
    """
    return Field(default, json_schema_extra={"flag": flag, "positional": positional, "implies": implies}, **field)


class Flag(NamedTuple):
    """An option of a command, made from a field."""

    field: str
    name: str
    kind: type
    """what the command line gives: bool, int, float, str or Path"""
    is_list: bool
    positional: bool
    implies: str
    help: str
    default: str
    """as the help shows it; empty where there is none"""
    info: FieldInfo

    def parse(self, value: Any) -> Any:
        """The field's value, as JSON has it, that the command line means by `value`.

        Raises:
            UserError: a list of numbers holds something else.
        """
        if self.positional:
            return [str(path) for path in value]
        if not self.is_list:
            return str(value) if isinstance(value, Path) else value
        text, item = ",".join(value), _item_type(self.info.annotation)
        if item is int:
            return numbers_of(text)
        if item is float:
            return [float_of(part) for part in text.split(",")]
        return [part.strip() for part in text.split(",")]


def flags_of(section: type[Options]) -> list[Flag]:
    """The options that a section offers to commands, in the order of its fields."""
    return [
        _flag(name, info)
        for name, info in section.model_fields.items()
        if isinstance(info.json_schema_extra, dict) and "flag" in info.json_schema_extra
    ]


def overrides_of(section: type[Options], values: Mapping[str, Any]) -> list[str]:
    """Options as overrides `section.field=value`; those that were not given (None, or False) are left out."""
    flags = {flag.field: flag for flag in flags_of(section)}
    given = {name: value for name, value in values.items() if value is not None and value is not False and value != []}
    overrides = [f"{section.section}.{name}={json.dumps(flags[name].parse(value))}" for name, value in given.items()]
    return [*overrides, *(flags[name].implies for name in given if flags[name].implies)]


def numbers_of(text: str) -> list[int]:
    """The numbers that `10-12,25` means.

    Raises:
        UserError: it is not a list of numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not is_count(first) or (dash and not is_count(last)) or int(last or first) < int(first):
            raise UserError(f"{text!r} is not a list of numbers: write for example 10-12,25")
        if int(last or first) - int(first) > _MOST_NUMBERS:
            raise UserError(f"{part!r} are more numbers than anything here has")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def float_of(text: str) -> float:
    """The number that a text means.

    Raises:
        UserError: it is not a finite number.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{text!r} is not a number: write for example -0.3,0,0.3")
    return number


def _flag(name: str, info: FieldInfo) -> Flag:
    extra = info.json_schema_extra
    assert isinstance(extra, dict)
    kind = _plain(info.annotation)
    is_list = get_origin(kind) is list
    scalar = str if is_list or kind not in (bool, int, float, Path) else kind
    flag = extra["flag"] or f"--{name.replace('_', '-')}"
    return Flag(
        name,
        str(flag),
        scalar,
        is_list,
        bool(extra["positional"]),
        str(extra["implies"] or ""),
        _help(info),
        _default(info),
        info,
    )


def _help(info: FieldInfo) -> str:
    """The description, and the choices where it does not name them all."""
    text, choices = (info.description or "").strip().rstrip("."), _choices(info)
    if choices and not all(choice in text for choice in choices):
        text = f"{text}{': ' if text else ''}{', '.join(choices)}"
    if not text.startswith(tuple(choices) or "\0"):
        text = f"{text[:1].upper()}{text[1:]}"
    return f"{text}." if text else ""


def _default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True)
    if default is ... or default is None or default is False or default in ([], ""):
        return ""
    return ",".join(map(str, default)) if isinstance(default, list) else str(default)


def _choices(info: FieldInfo) -> list[str]:
    """The values that a field, or an item of its list, can have; empty if they are not listed."""
    for condition in info.metadata:
        if isinstance(condition, KnownTo):
            return condition.registry.names()
    kind = _plain(info.annotation)
    kind = _item_type(kind) if get_origin(kind) is list else kind
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def _item_type(annotation: Any) -> Any:
    return _plain(get_args(_plain(annotation))[0])


def _plain(annotation: Any) -> Any:
    """The type without `| None` and without `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain(next(kind for kind in get_args(annotation) if kind is not NoneType))
    return annotation
