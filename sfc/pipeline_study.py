"""The other studies' stages, as `sfc.pipeline` is for the main line.

Nothing here imports torch: asking whether anything has to be done takes no time.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.core.artifacts import Artifact, hash_of_file
from sfc.core.errors import UserError, suggestion
from sfc.data.prepare import prompts_fingerprint
from sfc.data.schema import ALL
from sfc.models.identity import model_identity
from sfc.models.positions import check_positions as check_steered
from sfc.pipeline import circuit_artifact, ensure_circuit, ensure_saes, ensure_store, needs_making
from sfc.run import Run
from sfc.studies.formats.formats import Formats
from sfc.studies.patch.alignment import check_positions
from sfc.studies.patch.options import PatchingOptions
from sfc.studies.patch.pairs import WRAPPERS
from sfc.studies.repair.options import RepairOptions
from sfc.studies.steer.options import ContrastKind, SteeringOptions

# Raised by hand when the meaning of an artifact changes.
BEHAVIOUR_SCHEMA, LOGITS_SCHEMA, FORMATS_SCHEMA = 2, 1, 1
PATCHING_SCHEMA, STEERING_SCHEMA, REPAIR_SCHEMA, REPORT_SCHEMA, BATCH_SCHEMA = 2, 1, 1, 1, 1
REPLICATION_SCHEMA = 1

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


def ensure_logit_attribution(run: Run, category: str, rebuild: bool = False) -> Artifact:
    """Attribute the refusal logit difference on the test prompts of one category, or of `ALL`, unless that is done."""
    inputs = {
        "schema": LOGITS_SCHEMA,
        "model": model_identity(run.experiment.model),
        "prompts": [prompts_fingerprint(run.prompts.frame), run.experiment.prompts.model_dump()],
        "category": category,
        "seed": run.experiment.seed,
    }
    artifact = Artifact.of(run.root / "circuits" / run.experiment.name, f"logits-{category}", inputs)
    if needs_making(artifact, rebuild):
        from sfc.studies.logits.logits import make_logit_attribution

        make_logit_attribution(run, artifact, category, rebuild)
    return artifact


def ensure_formats(
    run: Run, formats: Formats, prompts: Path | None, category: str, limit: int | None, rebuild: bool = False
) -> Artifact:
    """Ask harmful instructions, those of a file or of the test split, in several formats, unless that is done.

    Raises:
        UserError: the file does not exist.
    """
    if prompts is not None and not prompts.is_file():
        raise UserError(f"no file {prompts}: --prompts takes a CSV with a column 'prompt' or 'goal'")
    inputs = {
        "schema": FORMATS_SCHEMA,
        "model": model_identity(run.experiment.model),
        "formats": {name: [version.model_dump() for version in versions] for name, versions in formats.items()},
        "prompts": [prompts_fingerprint(run.prompts.frame), run.experiment.prompts.model_dump()],
        "file": hash_of_file(prompts) if prompts else None,
        "category": category,
        "limit": limit,
        "seed": run.experiment.seed,
    }
    name = f"formats-{prompts.stem if prompts else category}"
    artifact = Artifact.of(run.root / "circuits" / run.experiment.name, name, inputs)
    if needs_making(artifact, rebuild):
        from sfc.studies.formats.measure import make_formats

        make_formats(run, artifact, formats, prompts, rebuild)
    return artifact


def ensure_patching(run: Run, rebuild: bool = False) -> Artifact:
    """Patch between pairs of prompts unless that is done.

    Raises:
        UserError: the pairs or wrappers do not exist, or a position set is none.
    """
    experiment, config = run.experiment, PatchingOptions.of(run.experiment)
    for name in config.position_sets:
        check_positions(name)
    if config.wrappers and config.pairs != "wrapped":
        raise UserError("--wrappers goes with --pairs wrapped only")
    if config.wrappers and not Path(config.wrappers).is_file():
        raise UserError(f"no file {config.wrappers}: --wrappers takes a CSV or .jsonl file with name and template")
    path = pairs_file(run)
    inputs = {
        "schema": PATCHING_SCHEMA,
        "seed": experiment.seed,
        "model": model_identity(experiment.model),
        "pairs": hash_of_file(path) if path else _instructions(run),
        "patching": config.model_dump(exclude={"pairs", "wrappers"}),
        "max_tokens": experiment.prompts.max_tokens,
        "min_denominator": EvaluationOptions.of(experiment).min_denominator,
    }
    name = "wrapped" if path is None else "toxic-safe" if config.pairs == "toxic-safe" else path.stem
    artifact = Artifact.of(run.root / "circuits" / experiment.name, f"patching-{name}", inputs)
    if needs_making(artifact, rebuild):
        from sfc.studies.patch.patch import make_patching

        make_patching(run, artifact, rebuild)
    return artifact


def pairs_file(run: Run) -> Path | None:
    """The file that `patching.pairs` means; None where the pairs are prompts of the data set in wrappers.

    Raises:
        UserError: there is no such file.
    """
    name = PatchingOptions.of(run.experiment).pairs
    if name == "wrapped":
        return None
    path = run.data_folder / "pairs.csv" if name == "toxic-safe" else Path(name)
    if not path.is_file():
        raise UserError(
            f"no pairs {str(path)!r}: --pairs takes toxic-safe (the data set's pairs.csv), wrapped, or a CSV or .jsonl"
            " file with toxic and safe"
        )
    return path


def _instructions(run: Run) -> dict[str, Any]:
    """What wrapped pairs are made from: the prompts, their splits, and the wrappers."""
    wrappers = PatchingOptions.of(run.experiment).wrappers
    return {
        "data": prompts_fingerprint(run.prompts.frame),
        **run.experiment.prompts.model_dump(exclude={"hard_share"}),
        "wrappers": hash_of_file(Path(wrappers)) if wrappers else WRAPPERS,
    }


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


def ensure_replication(run: Run, category: str, sae_seed: int, rebuild: bool = False) -> Artifact:
    """Hold the circuit of one category, or of `ALL`, against that of SAEs trained from another seed, unless it is done.

    Raises:
        UserError: the SAEs are not trained here, or from this very seed, or circuits are made of other nodes.
    """
    experiment = run.experiment
    discovery = DiscoveryOptions.of(experiment)
    if not NODES[discovery.nodes].needs_saes:
        raise UserError(f"replicate needs circuits of SAE features: nodes {discovery.nodes!r} have no SAEs")
    if experiment.saes.source is not None:
        raise UserError("replicate trains SAEs anew, and those of saes.source are trained elsewhere: leave it out")
    if sae_seed == experiment.sae_seed:
        raise UserError(f"--sae-seed {sae_seed} is the seed of the experiment's own SAEs: give another one")
    # The experiment's seed is not written down as one of the SAEs' own: they would have a second name.
    saes = experiment.saes.model_copy(update={"seed": None if sae_seed == experiment.seed else sae_seed})
    other = replace(run, experiment=experiment.model_copy(update={"saes": saes}))
    inputs = {
        "schema": REPLICATION_SCHEMA,
        "seed": experiment.seed,
        "prompts": run.store.inputs,
        "original": circuit_artifact(run, category).inputs,
        "replication": circuit_artifact(other, category).inputs,
    }
    name = f"replication-{category}{discovery.name_of_prompts}-{discovery.method}"
    artifact = Artifact.of(run.root / "circuits" / experiment.name, name, inputs)
    if needs_making(artifact, rebuild):
        for each in (run, other):
            ensure_circuit(each, category)
            ensure_saes(each)  # a circuit that is there may have outlived its SAEs
        from sfc.studies.replicate.replicate import make_replication

        make_replication(run, other, artifact, category, rebuild)
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
