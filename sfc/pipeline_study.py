"""The other studies' stages, as `sfc.pipeline` is for the main line.

Nothing here imports torch: asking whether anything has to be done takes no time.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from sfc.core.artifacts import Artifact, hash_of_file
from sfc.core.errors import UserError, suggestion
from sfc.data.prepare import prompts_fingerprint
from sfc.data.schema import ALL
from sfc.models.identity import model_identity
from sfc.models.positions import check_positions as check_steered
from sfc.pipeline import circuit_artifact, ensure_circuit, ensure_saes, ensure_store, needs_making
from sfc.run import Run
from sfc.studies.repair.options import RepairOptions
from sfc.studies.steer.options import ContrastKind, SteeringOptions

# Raised by hand when the meaning of an artifact changes.
BEHAVIOUR_SCHEMA = 2
STEERING_SCHEMA, REPAIR_SCHEMA, REPORT_SCHEMA, BATCH_SCHEMA = 1, 1, 1, 1

BEST = "best"  # the condition that tells toxic from safe prompts best
_FEATURE = r"resid_(?:pre|mid|post)\.\d+/F\d+"


def ensure_behaviour(run: Run, prompts: Path | None, split: str, limit: int | None, rebuild: bool = False) -> Artifact:
    """Generate and judge replies, to a file of prompts or to a split of the data, unless that is done.

    Raises:
        UserError: the file or the split does not exist.
    """
    if prompts is not None and not prompts.is_file():
        raise UserError(f"no file {prompts}: --prompts takes a CSV with a column 'prompt'")
    if split not in (known := ("discovery", "reference", "test", "all")):
        raise UserError(f"no split {split!r}: {suggestion(split, known)}")
    inputs = {
        "schema": BEHAVIOUR_SCHEMA,
        "model": model_identity(run.experiment.model),
        "prompts": hash_of_file(prompts) if prompts else [prompts_fingerprint(run.prompts.frame), split],
        "config": run.experiment.prompts.model_dump(exclude={"hard_share"}),
        "limit": limit,
        "seed": run.experiment.seed,
    }
    name = f"behaviour-{prompts.stem if prompts else split}"
    artifact = Artifact.of(run.root / "circuits" / run.experiment.name, name, inputs)
    if needs_making(artifact, rebuild):
        from sfc.studies.behaviour import make_behaviour

        make_behaviour(run, artifact, prompts, split, limit, rebuild)
    return artifact


def ensure_steering(run: Run, rebuild: bool = False) -> Artifact:
    """Find a direction, choose it by what it does, and steer test prompts along it, unless that is done.

    Raises:
        UserError: the direction or the positions are none, or the alphas are not to be used so.
    """
    experiment, config = run.experiment, SteeringOptions.of(run.experiment)
    check_steered(config.positions)
    if config.when:
        check_condition(config.when, config.when_above)
    if config.everywhere and config.when:
        raise UserError("--when is read before the steered site, and --everywhere leaves nothing before it")
    if config.everywhere and config.edit != "project-out":
        raise UserError("--everywhere goes with --edit project-out only")
    if config.edit != "clamp" and not any(alpha > 0 or (config.edit == "add" and alpha < 0) for alpha in config.dial):
        raise UserError(f"--alphas with --edit {config.edit} needs one that changes something: 0 leaves all as it is")
    inputs = {
        "schema": STEERING_SCHEMA,
        "seed": experiment.seed,
        "model": model_identity(experiment.model),
        "prompts": [prompts_fingerprint(run.prompts.frame), experiment.prompts.model_dump()],
        "steering": config.model_dump(exclude={"xstest"}),
    }
    if config.xstest is not None:
        if not Path(config.xstest).is_file():
            raise UserError(f"no file {config.xstest}: --xstest takes XSTest's CSV (`sfc download` fetches it)")
        inputs["xstest"] = hash_of_file(Path(config.xstest))
    from_dictionaries = direction_source(config.direction) is None or config.features or config.when is not None
    if from_dictionaries:
        inputs["saes"] = run.saes.inputs
    if config.direction == "circuit":
        if config.category == ALL:
            raise UserError("--direction circuit needs the --category whose circuit it is")
        inputs["circuit"] = circuit_artifact(run, config.category).inputs
    name = f"steering-{re.sub(r'[^a-z0-9]+', '-', config.direction.lower())}-{config.edit}"
    artifact = Artifact.of(run.root / "circuits" / experiment.name, name, inputs)
    if needs_making(artifact, rebuild):
        if config.direction == "circuit":
            ensure_circuit(run, config.category)
        if from_dictionaries:
            ensure_saes(run)
        from sfc.studies.steer.steer import make_steering

        make_steering(run, artifact, rebuild)
    return artifact


def direction_source(name: str) -> str | None:
    """The contrast that `steering.direction` learns from; None where it comes from dictionaries.

    Raises:
        UserError: it is no direction.
    """
    if name in get_args(ContrastKind):
        return name
    if name == "probe":
        return "toxic-safe"
    if name == "circuit" or re.fullmatch(_FEATURE, name):
        return None
    known = [*get_args(ContrastKind), "probe", "circuit"]
    raise UserError(f"no direction {name!r}: {suggestion(name, known)}, or a feature such as resid_post.21/F12")


def check_condition(name: str, above: float) -> None:
    """Check `steering.when` and `steering.when_above`.

    Raises:
        UserError: the condition is no feature, or has two thresholds.
    """
    if name != BEST and not re.fullmatch(_FEATURE, name):
        raise UserError(f"no condition {name!r}: --when takes a feature such as resid_post.21/F12, or {BEST}")
    if name == BEST and above:
        raise UserError(f"--when {BEST} brings its own threshold: leave steering.when_above at 0, or name a feature")


def ensure_repair(run: Run, category: str, rebuild: bool = False) -> Artifact:
    """Find the edit that lowers the over-refusal of one category, or of `ALL`, and measure it, unless that is done."""
    experiment = run.experiment
    inputs = {
        "schema": REPAIR_SCHEMA,
        "seed": experiment.seed,
        "prompts": run.store.inputs,
        "saes": run.saes.inputs,
        "category": category,
        "hard_share": experiment.prompts.hard_share,
        "repair": RepairOptions.of(experiment).model_dump(),
    }
    artifact = Artifact.of(run.root / "circuits" / experiment.name, f"repair-{category}", inputs)
    if needs_making(artifact, rebuild):
        ensure_saes(run)
        ensure_store(run)
        from sfc.studies.repair.repair import make_repair

        make_repair(run, artifact, category, rebuild)
    return artifact


def ensure_report(run: Run, rebuild: bool = False) -> Artifact:
    """Report every finished artifact of the experiment's model, unless that is done and none of their files changed.

    Raises:
        UserError: there is none.
    """
    from sfc.studies.report.found import find_artifacts, found_in, hashes

    folder = run.root / "circuits" / run.experiment.name
    found, left_out = find_artifacts(folder, model_identity(run.experiment.model))
    if not found:
        raise UserError(
            f"nothing to report: {folder} holds no finished artifact of this model; run `sfc discover`, `sfc patch` or"
            " another command first"
        )
    if run.saes.is_complete():
        found.append(found_in(run.saes.folder, "saes"))
    inputs = {
        "schema": REPORT_SCHEMA,
        "description": run.experiment.description,
        "artifacts": {each.place: hashes(each) for each in found},
        "left_out": [each.place for each in left_out],
    }
    artifact = Artifact.of(folder, "report", inputs)
    if needs_making(artifact, rebuild):
        from sfc.studies.report.report import make_report

        make_report(run, artifact, found, left_out, rebuild)
    return artifact


def batch_artifact(runs: Sequence[Run], stages: Sequence[str], category: str, limit: int | None) -> Artifact:
    """Where the comparison of these runs lies. It is put together anew each time; the runs' stages are what costs."""
    inputs = {
        "schema": BATCH_SCHEMA,
        "experiments": [run.experiment.model_dump(mode="json") for run in runs],
        "data": runs[0].data,
        "stages": list(stages),
        "category": category,
        "limit": limit,
    }
    return Artifact.of(runs[0].root / "circuits" / "batch", category, inputs)
