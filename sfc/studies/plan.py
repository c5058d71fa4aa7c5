"""`sfc plan` and `--dry-run`: what a command would make on this machine, what that takes, and what makes it fit.

Every study says what it takes, in counts (`Study.work`); how long one of each takes is measured here, in a second or
two. Nothing is made, no weights are loaded, and what is up to date costs no look at a model at all.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.core.experiments import experiment_of
from sfc.core.machine import available_memory, resident_memory, size
from sfc.core.work import Amounts, Work
from sfc.pages.blocks import Block, Paragraph, Table
from sfc.run import Run
from sfc.studies.study import Need, Study

if TYPE_CHECKING:
    from sfc.studies.sketch import Sketch


@dataclass(frozen=True)
class Stage:
    """A study whose artifact has to be made, or is up to date."""

    study: str
    folder: Path
    steps: Sequence[Work] | None
    """one after the other; none where it is up to date, None where the study does not say what it takes"""
    is_current: bool
    speed: Amounts | None = None
    """seconds of one of everything; None where nothing is measured"""

    def seconds(self, step: Work) -> float | None:
        """Of one of its steps."""
        return None if self.speed is None else step.amounts.at(self.speed)

    @property
    def total(self) -> float | None:
        """Seconds of all its steps."""
        if self.steps is None or (self.speed is None and self.steps):
            return None
        return sum(self.seconds(step) or 0.0 for step in self.steps)


@dataclass(frozen=True)
class Plan:
    """What a command would do."""

    command: str
    run: Run
    device: str
    """the kind of device that the model is on"""
    stages: Sequence[Stage]
    """in the order in which they are made"""
    base: int
    """bytes of main memory that a process of this program takes before it loads anything"""
    notes: Sequence[str] = ()
    """what is not known, and what stands in for it"""

    def host(self, step: Work) -> int:
        """Bytes of main memory during a step."""
        return self.base + step.host + (step.device if self.device == "cpu" else 0)

    def where_the_model_is(self, step: Work) -> int:
        """Bytes there: of the GPU, or else of main memory."""
        return self.host(step) if self.device == "cpu" else step.device

    @property
    def steps(self) -> list[tuple[Stage, Work]]:
        """Every step of every stage."""
        return [(stage, step) for stage in self.stages for step in stage.steps or ()]

    @property
    def peak(self) -> tuple[int, str]:
        """The most bytes where the model is, and during which step; 0 where nothing is to be done."""
        found = [(self.where_the_model_is(step), f"{stage.study}: {step.step}") for stage, step in self.steps]
        return max(found, default=(0, ""))

    @property
    def most_host(self) -> int:
        """The most bytes of main memory during any step."""
        return max((self.host(step) for _, step in self.steps), default=0)

    @property
    def most_device(self) -> int | None:
        """The most bytes of the GPU; None where none is used."""
        return None if self.device == "cpu" else max((step.device for _, step in self.steps), default=0)

    @property
    def seconds(self) -> float | None:
        """Of all stages; None where those of one are not known."""
        totals = [stage.total for stage in self.stages]
        return None if None in totals else sum(total for total in totals if total is not None)

    @property
    def kept(self) -> int:
        """Bytes that stay on the disk."""
        return sum(step.kept for _, step in self.steps)

    @property
    def disk(self) -> int:
        """Bytes that the disk must have free: those that stay, and checkpoints as long as they are needed."""
        return self.kept + max((step.scratch for _, step in self.steps), default=0)


def plan(
    study: Study[Any], run: Run, rebuild: bool = False, is_timed: bool = True, like: "Sketch | None" = None
) -> Plan:
    """What making a study's artifact would take, with whatever it needs.

    Args:
        is_timed: whether the machine's speed is measured.
        like: a sketch of another run, whose models are known.

    Raises:
        UserError: as the study's `check`, or something that the artifact would be made from cannot be read.
    """
    study.check(run)
    needed = list(_needed(Need(study, run), rebuild))
    if all(is_current for _, is_current in needed):
        stages = [Stage(need.study.name, need.study.artifact(need.run).folder, (), True) for need, _ in needed]
        return Plan(study.name, run, "cpu", stages, 0)
    from sfc.studies.sketch import LOADING

    base, sketch, is_here = resident_memory(), *_sketch(run, like)
    base, stages, notes = max(base, resident_memory()), [], {} if is_here else dict.fromkeys([_NO_DEVICE])
    speeds: dict[str, Amounts] = {}
    for need, is_current in needed:
        folder, of_need = need.study.artifact(need.run).folder, sketch.for_run(need.run)
        steps = () if is_current else need.study.work(of_need)
        if any(stage.steps for stage in stages):  # a command loads a model once
            steps = steps and [step for step in steps if step.step != LOADING]
        speed = _speed(of_need, steps or (), speeds) if is_timed and is_here else None
        stages.append(Stage(need.study.name, folder, steps, is_current, speed))
        notes |= dict.fromkeys(_notes(of_need, need.study, steps))
    return Plan(study.name, run, sketch.device.type, stages, base, list(notes))


_NO_DEVICE = "there is no such device here: times are left out, memory is that of such a device"


def _needed(need: Need, rebuild: bool, seen: set[Path] | None = None) -> Iterator[tuple[Need, bool]]:
    """What would be made, each once and before what needs it, and whether it is up to date."""
    seen, (study, run) = set() if seen is None else seen, need
    artifact = study.artifact(run)
    if artifact.folder in seen:
        return
    seen.add(artifact.folder)
    is_current = not rebuild and study.is_current(run, artifact)
    if not is_current:
        for before in (*study.needs(run), *study.makes(run)):
            yield from _needed(before, False, seen)
    yield need, is_current


def _sketch(run: Run, like: "Sketch | None") -> "tuple[Sketch, bool]":
    """The sketch of a run, and whether its device is there: a card may be planned for that is not."""
    import torch

    from sfc.models.loading import choose_device
    from sfc.studies.sketch import Sketch

    if like is not None:
        return like.for_run(run), True
    try:
        return Sketch(run, choose_device(run.device)), True
    except UserError:
        if not run.device.startswith("cuda"):
            raise
        return Sketch(run, torch.device("cuda")), False


def _speed(sketch: "Sketch", steps: Sequence[Work], known: dict[str, Amounts]) -> Amounts:
    """Seconds of one of everything that a run has; measured once for runs that have the same model."""
    if not steps:
        return Amounts()
    experiment, is_trained = sketch.run.experiment, any(step.amounts.trained for step in steps)
    key = f"{experiment.model.model_dump_json()} {experiment.saes.model_dump_json()} {is_trained}"
    if key not in known:
        known[key] = sketch.speed(is_trained) + Amounts(written=_seconds_per_byte(sketch.run.root), seconds=1.0)
    return known[key]


_WRITTEN = 1 << 25


def _seconds_per_byte(root: Path) -> float:
    """How long a byte takes to be on the disk, measured on a file that is gone afterwards."""
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            began = time.perf_counter()
            file.write(bytes(_WRITTEN))
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - began) / _WRITTEN
    except OSError as error:
        raise UserError(f"--root {root} cannot be written to ({error.strerror}): nothing can be made there") from None


def _notes(sketch: "Sketch", study: Study[Any], steps: Sequence[Work] | None) -> Iterator[str]:
    if steps is None:
        yield f"sfc {study.name} does not say what it takes: it is not counted"
    for step in steps or ():
        if step.note:
            yield step.note
    if steps and (guessed := [site for site, width in sketch.widths.items() if not width.is_known]):
        width = sketch.widths[guessed[0]]
        yield (
            f"dictionaries that are not here yet are taken to have {width.d_sae:,} features, by their names, and"
            f" {width.k} of them active"
        )


def report(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: seconds, and bytes."""
    on_gpu = plan.device != "cpu"

    def of_step(stage: Stage, step: Work) -> dict[str, Any]:
        return {
            "step": step.step,
            "seconds": _rounded(stage.seconds(step)),
            "host_bytes": plan.host(step),
            "device_bytes": step.device if on_gpu else None,
            "disk_bytes": step.kept,
            "amounts": {name: count for name, count in asdict(step.amounts).items() if count},
        }

    stages = [
        {
            "study": stage.study,
            "folder": str(stage.folder),
            "up_to_date": stage.is_current,
            "seconds": _rounded(stage.total),
            "steps": [of_step(stage, step) for step in stage.steps or ()],
        }
        for stage in plan.stages
    ]
    speed = next((stage.speed for stage in plan.stages if stage.steps and stage.speed), None)
    return {
        "preset": plan.run.experiment.name,
        "command": plan.command,
        "device": plan.device,
        "stages": stages,
        "seconds": _rounded(plan.seconds),
        "host_bytes": plan.most_host,
        "device_bytes": plan.most_device,
        "disk_bytes": plan.kept,
        "disk_needed": plan.disk,
        "disk_free": shutil.disk_usage(plan.run.root).free,
        "seconds_of_one": speed and asdict(speed),
        "notes": list(plan.notes),
        "files": {},
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)


def blocks(plan: Plan) -> list[Block]:
    """What the terminal shows."""
    if not plan.steps and all(stage.is_current for stage in plan.stages):
        return [Paragraph(f"sfc {plan.command} is up to date: {plan.stages[-1].folder}")]
    rows = []
    for stage in plan.stages:
        state = "up to date" if stage.is_current else _duration(stage.total)
        rows.append(
            [stage.study, state, "", "", "" if stage.is_current else _disk(sum(s.kept for s in stage.steps or ()))]
        )
        for step in stage.steps or ():
            device = size(step.device) if plan.device != "cpu" else ""
            disk = _disk(step.kept) if step.kept else ""
            rows.append([f"  {step.step}", _duration(stage.seconds(step)), size(plan.host(step)), device, disk])
    peak, step = plan.peak
    on_device = "" if plan.most_device is None else size(plan.most_device)
    rows.append(["all", _duration(plan.seconds), size(plan.most_host), on_device, _disk(plan.kept)])
    where = "main memory" if plan.device == "cpu" else "the device's memory"
    free = shutil.disk_usage(plan.run.root).free
    told = [f"The peak of {where} is {size(peak)}, in {step}. The disk has {_disk(free)} free."]
    if plan.disk > free:
        told.append(f"**With checkpoints {_disk(plan.disk)} are needed.**")
    if plan.most_host > (available := available_memory() + plan.base):
        told.append(f"**That is more main memory than is available now ({size(available)}).**")
    columns = ("stage", "time", "host memory", "device memory", "disk")
    table = Table(f"What sfc {plan.command} would do", columns, rows)
    return [table, Paragraph(" ".join(told)), *(Paragraph(f"Not known: {note}.") for note in plan.notes)]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _disk(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.2f} GB"


def fitted(plan_as_is: Plan, study: Study[Any], memory: int) -> list[str] | None:
    """Settings under which the peak is within so many bytes where the model is; none where it is as it is.

    Settings are tried in the order of `_lighter`, and kept where they lower the peak; those that were halved too often
    are doubled again at the end. None where all do not suffice.

    Raises:
        UserError: as `plan`.
    """
    current, chosen = plan_as_is, dict[str, Any]()
    sketch = _sketch(plan_as_is.run, None)[0]

    def changed(key: str, value: Any) -> Plan:
        lighter = plan(study, _changed(current.run, key, value), is_timed=False, like=sketch)
        return replace(lighter, base=plan_as_is.base)  # this process grows as it plans

    while current.peak[0] > memory:
        for key, value in _lighter(current.run.experiment):
            if (lighter := changed(key, value)).peak[0] < current.peak[0]:
                current, chosen[key] = lighter, value
                break
        else:
            return None
    halved = [key for key, value in chosen.items() if isinstance(value, int) and value > 1]
    for key in halved:
        while (larger := changed(key, 2 * chosen[key])).peak[0] <= memory:
            current, chosen[key] = larger, 2 * chosen[key]
    changed_ones = {k: value for k, value in chosen.items() if value != _setting(plan_as_is.run.experiment, k)}
    return [f"{key}={json.dumps(value).replace(' ', '')}" for key, value in changed_ones.items()]


def _lighter(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    """Settings that may take less memory, those that change results least first."""
    saes, activations = experiment.saes, experiment.activations
    if saes.source is None and saes.layers_at_once > 1:
        yield "saes.layers_at_once", saes.layers_at_once // 2
    for key, value, least in (
        ("saes.buffer_rows", saes.buffer_rows, 4 * saes.batch_size),
        ("activations.batch_tokens", activations.batch_tokens, experiment.prompts.max_tokens),
        ("saes.start_rows", saes.start_rows, 4096),
    ):
        if value // 2 >= least:
            yield key, value // 2
    for key, dtype in (("saes.dtype", saes.dtype), ("model.dtype", experiment.model.dtype)):
        if dtype == "float32":
            yield key, "bfloat16"
    for key, least in (
        ("evaluation.null_draws", 0), ("learned_mask.pooled", 0), ("discovery.pairs_per_prompt", 1),
    ):  # fmt: skip
        if _setting(experiment, key) > least:
            yield key, least
    if len(activations.layers) > 1:
        yield "activations.layers", activations.layers[::2]


def _setting(experiment: Experiment, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(experiment, section), name)


def _changed(run: Run, key: str, value: Any) -> Run:
    """The run with one setting changed; its prompts stay what they are."""
    section, _, name = key.partition(".")
    values = run.experiment.model_dump(mode="json")
    changed = Run.of(
        experiment_of({**values, section: {**values[section], name: value}}), run.root, run.data, run.device
    )
    changed.__dict__["prompts"] = run.prompts
    return changed


def memory_blocks(plan_as_is: Plan, memory: int, settings: Sequence[str] | None) -> list[Block]:
    """Whether it fits, and what makes it fit."""
    peak, step = plan_as_is.peak
    if settings is None:
        return [
            Paragraph(f"**No setting brings {step} under {size(memory)}**: take a smaller model, or fewer features.")
        ]
    if not settings:
        return [Paragraph(f"It fits into {size(memory)}: the peak is {size(peak)}.")]
    flags = " ".join(f"--set {setting}" for setting in settings)
    return [Paragraph(f"**It does not fit into {size(memory)}** ({step} takes {size(peak)}). It does with `{flags}`.")]
