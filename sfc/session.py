"""A session: one run with everything that is loaded for it, each thing once."""

import gc
import time
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sfc.core.config import Experiment, ModelConfig
from sfc.core.machine import check_memory, size
from sfc.core.progress import say
from sfc.run import Run

if TYPE_CHECKING:
    from sfc.models.loading import Model
    from sfc.models.score import Score
    from sfc.saes.dictionary import Dictionary
    from sfc.saes.store import Store


class Session:
    """A run, its model, its dictionaries and its store. They are loaded when they are first asked for.

    Sessions of runs that share a model share the loaded one (see `for_run`), so that a command loads a model once.
    """

    def __init__(self, run: Run, models: "dict[str, Model] | None" = None) -> None:
        self.run = run
        self.clock = Clock()
        self.prepared: dict[str, Any] = {}
        """what `sfc.studies.discover.problem.prepared_once` keeps, by group of prompts"""
        self._models = {} if models is None else models

    def for_run(self, run: Run) -> "Session":
        """The session of another run, with the models that are loaded already."""
        return self if run is self.run else Session(run, self._models)

    def close(self) -> None:
        """Let go of every loaded model, also of those that sessions of other runs share."""
        for name in ("model", "metric", "dictionaries", "store"):
            self.__dict__.pop(name, None)
        self.prepared.clear()
        if self._models:
            import torch

            self._models.clear()
            gc.collect()
            torch.cuda.empty_cache()

    @cached_property
    def model(self) -> "Model":
        """The run's model.

        Raises:
            UserError: it cannot be loaded.
        """
        return self.load(self.run.experiment.model)

    @cached_property
    def metric(self) -> "Score":
        """The score of the run's behavior.

        Raises:
            UserError: the model cannot have it.
        """
        return self.run.behavior.metric(self.model, self.run.experiment)

    @property
    def without_adapter(self) -> "Model":
        """The model that the adapter was merged into; the model itself where it has none.

        Raises:
            UserError: it cannot be loaded.
        """
        return self.load(self.run.experiment.model.model_copy(update={"adapter": None}))

    def load(self, config: ModelConfig) -> "Model":
        """Any model, on the run's device, loaded once.

        Raises:
            UserError: it cannot be loaded, or has no room for the longest prompt and the longest reply.
        """
        from sfc.models.loading import choose_device, load_model

        key = config.model_dump_json()
        if key not in self._models:
            self._models[key] = load_model(config, choose_device(self.run.device))
        self._models[key].check_room(_longest(self.run.experiment))
        return self._models[key]

    @cached_property
    def dictionaries(self) -> "Mapping[str, Dictionary]":
        """The run's dictionaries by site, on the run's device, each read when it is first asked for.

        Raises:
            UserError: one is missing or damaged, or all together have no room in memory.
        """
        from sfc.models.loading import choose_device, free_memory
        from sfc.saes.format import Dictionaries

        device, experiment = choose_device(self.run.device), self.run.experiment
        dictionaries = Dictionaries(self.run.saes.folder, experiment.activations.sites, device, experiment.saes.dtype)
        what = f"{len(dictionaries)} dictionaries in {experiment.saes.dtype}"
        if dictionaries.memory > 2**30:
            say(f"{what} take {size(dictionaries.memory)} of memory")
        remedy = "--set saes.dtype=bfloat16, or fewer activations.layers"
        check_memory(dictionaries.memory, what, remedy, free_memory(device))
        return dictionaries

    @cached_property
    def store(self) -> "Store":
        """The activations of the run's discovery and reference prompts.

        Raises:
            UserError: the store is missing or damaged.
        """
        from sfc.saes.store import Store

        return Store(self.run.store.folder)


def _longest(experiment: Experiment) -> int:
    """Tokens of the longest prompt with the longest reply that any section asks for."""
    sections = [section for section in experiment.model_dump().values() if isinstance(section, dict)]
    return experiment.prompts.max_tokens + max(section.get("reply_tokens", 0) for section in sections)


class Clock:
    """Seconds per step."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin at zero."""
        self.laps: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the step `name`; steps of one name add up."""
        now = time.perf_counter()
        self.laps[name] = round(self.laps.get(name, 0) + now - self._last, 2)
        self._last = now

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of every step, and of all."""
        return {**self.laps, "total": round(time.perf_counter() - self._start, 2)}
