"""The other studies' stages, as `sfc.pipeline` is for the main line.

Nothing here imports torch: asking whether anything has to be done takes no time.
"""

import re
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
STEERING_SCHEMA, REPAIR_SCHEMA = 1, 1

BEST = "best"  # the condition that tells toxic from safe prompts best
_FEATURE = r"resid_(?:pre|mid|post)\.\d+/F\d+"


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
