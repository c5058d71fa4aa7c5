"""Registries: studies, behaviors, methods, node spaces and dictionary formats, found by name.

What comes with the package registers itself in the same way as what others write: a module that is imported calls
`register`. Built-in modules are named here; an installed package names its own in the entry point group `sfc.plugins`,
and a file that is not installed is named in the environment variable `SFC_PLUGINS` (paths of .py files, separated by
the system's path separator). Nothing here imports torch, and a module that registers something should not either.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from sfc.core.errors import UserError, suggestion

BUILT_IN = (
    "sfc.saes.architectures",
    "sfc.saes.transcoders",
    "sfc.circuits.options",
    "sfc.behaviors.refusal",
    "sfc.behaviors.pairs",
    "sfc.studies.sample",
    "sfc.studies.collect",
    "sfc.studies.train",
    "sfc.studies.nulls",
    "sfc.studies.discover",
    "sfc.studies.evaluate",
    "sfc.studies.behaviour",
    "sfc.studies.probe",
    "sfc.studies.compare",
    "sfc.studies.replicate",
    "sfc.studies.logits",
    "sfc.studies.patch",
    "sfc.studies.formats",
    "sfc.studies.steer",
    "sfc.studies.repair",
    "sfc.studies.report",
)
_PLACES = {module: place for place, module in enumerate(BUILT_IN)}
ENTRY_POINTS, VARIABLE = "sfc.plugins", "SFC_PLUGINS"


Item = TypeVar("Item")


class Registry(Generic[Item]):
    """Things of one kind by their attribute `name`.

    Those of modules in `BUILT_IN` come first, in its order, whichever was imported first; the others in the order in
    which they were registered.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, Item] = {}

    def register(self, item: Item) -> Item:
        """Add an item.

        Raises:
            UserError: another item has its name.
        """
        name: str = item.name  # pyright: ignore[reportAttributeAccessIssue]
        if self._items.get(name, item) is not item:
            raise UserError(f"two things are registered as {self.kind} {name!r}: rename one of them")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> Item:
        """The item of that name.

        Raises:
            UserError: there is none.
        """
        load_plugins()
        if name not in self._items:
            raise UserError(f"no {self.kind} {name!r}: {suggestion(name, self._items)}")
        return self._items[name]

    def __iter__(self) -> Iterator[Item]:
        return iter([self._items[name] for name in self.names()])

    def __contains__(self, name: object) -> bool:
        load_plugins()
        return name in self._items

    def names(self) -> list[str]:
        """All names, in order."""
        load_plugins()
        return sorted(self._items, key=lambda name: _PLACES.get(type(self._items[name]).__module__, len(BUILT_IN)))


class KnownTo:
    """For fields of options that name an item of a registry: any other name is an error of the field.

    As in `method: Annotated[str, KnownTo(METHODS)]`.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        try:
            return self.registry[name].name
        except UserError as error:
            raise ValueError(str(error)) from None


def imported_when_called(function: str) -> Callable[..., Any]:
    """The function `module:name`, whose module is imported no earlier than it is called.

    With it, what needs torch can be registered without importing it.
    """
    module, _, name = function.partition(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


@cache
def load_plugins() -> None:
    """Import whatever registers something, once.

    Raises:
        UserError: a plugin cannot be imported.
    """
    for module in BUILT_IN:
        importlib.import_module(module)
    for entry_point in entry_points(group=ENTRY_POINTS):
        try:
            entry_point.load()
        except Exception as error:
            raise UserError(f"the plugin {entry_point.value!r} cannot be loaded: {error}") from error
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        _import_file(Path(path))


def _import_file(path: Path) -> None:
    name = f"sfc_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{VARIABLE} names {path}, which is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the plugin {path} cannot be loaded: {type(error).__name__}: {error}") from error
