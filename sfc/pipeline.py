"""The main line's stages in order. Each makes what it needs first, and keeps an artifact that is up to date.

Nothing here imports torch: asking whether anything has to be done takes no time.
"""

from collections.abc import Sequence
from pathlib import Path

from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions, discovery_identity
from sfc.core.artifacts import Artifact, hash_of_file
from sfc.core.errors import UserError
from sfc.core.progress import say
from sfc.core.sites import in_order
from sfc.data.pairs import pairs_fingerprint
from sfc.run import CIRCUIT_SCHEMA, Run
from sfc.studies.compare.options import ComparisonOptions

# Raised by hand when the meaning of an artifact changes.
COMPARISON_SCHEMA, EVALUATION_SCHEMA = 2, 1


def ensure_store(run: Run, extra_sites: Sequence[str] = (), rebuild: bool = False) -> Artifact:
    """Collect the activations at the experiment's sites and at `extra_sites`, as far as they are not there."""
    sites = in_order([*run.experiment.activations.sites, *extra_sites])
    if needs_making(run.store, rebuild, sites):
        from sfc.studies.collect import make_store

        make_store(run, sites, rebuild)
    return run.store


def ensure_saes(run: Run, rebuild: bool = False, loggers: Sequence[str] = ()) -> Artifact:
    """Train the SAEs unless they are there; collects their corpus first where needed.

    Args:
        loggers: `wandb` or `tensorboard`: where to send training's figures as well.
    """
    run = run.learned_by or run
    if needs_making(run.saes, rebuild):
        from sfc.studies.train.train import make_saes

        make_saes(run, rebuild, loggers)
    return run.saes


def ensure_circuit(run: Run, category: str, rebuild: bool = False) -> Artifact:
    """Discover and evaluate one category's circuit unless it is there; train first where needed."""
    artifact = run.circuit(category)
    if needs_making(artifact, rebuild):
        if NODES[DiscoveryOptions.of(run.experiment).nodes].needs_saes:
            ensure_saes(run)
        ensure_store(run)
        from sfc.studies.discover.discover import make_circuit

        make_circuit(run, category, rebuild)
    return artifact


def ensure_comparison(run: Run, categories: Sequence[str], rebuild: bool = False) -> Artifact:
    """Compare the circuits of several categories unless that is done; train first where needed.

    Raises:
        UserError: fewer than two categories, or a reference that prompts of two categories cannot share.
    """
    if len(set(categories)) < 2:
        raise UserError("compare needs at least two categories, for example --categories violence,privacy")
    experiment = run.experiment
    if (reference := DiscoveryOptions.of(experiment).reference_choice) in ("paired", "base", "complied-mean"):
        raise UserError(f"compare pools prompts of categories, whose reference {reference!r} is not the same")
    inputs = {
        "schema": COMPARISON_SCHEMA,
        "circuit": CIRCUIT_SCHEMA,
        "seed": experiment.seed,
        "prompts": run.store.inputs,
        "saes": run.saes.inputs,
        "categories": sorted(set(categories)),
        "hard_share": experiment.prompts.hard_share,
        "discovery": discovery_identity(experiment),
        "evaluation": EvaluationOptions.of(experiment).model_dump(include={"error_mode", "min_denominator"}),
        "comparison": ComparisonOptions.of(experiment).model_dump(),
    }
    name = f"comparison{DiscoveryOptions.of(experiment).name_of_prompts}-{DiscoveryOptions.of(experiment).method}"
    artifact = Artifact.of(run.root / "circuits" / experiment.name, name, inputs)
    if needs_making(artifact, rebuild):
        ensure_saes(run)
        ensure_store(run)
        from sfc.studies.compare.compare import make_comparison

        make_comparison(run, artifact, sorted(set(categories)), rebuild)
    return artifact


def ensure_evaluation(run: Run, category: str, paths: Sequence[Path], rebuild: bool = False) -> Artifact:
    """Judge the circuits in these files on a category's test prompts unless that is done.

    Raises:
        UserError: a file does not exist.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"no file {path}: `sfc evaluate` takes circuits, node lists in JSON or CSV, or graph files")
    experiment = run.experiment
    population, reference = DiscoveryOptions.of(experiment).population, DiscoveryOptions.of(experiment).reference_choice
    inputs = {
        "schema": EVALUATION_SCHEMA,
        "seed": experiment.seed,
        "prompts": run.store.inputs,
        "saes": run.saes.inputs,
        "category": category,
        "hard_share": experiment.prompts.hard_share,
        "population": population,
        "reference": reference,
        "pairs": pairs_fingerprint(run.data_folder) if reference == "paired" else None,
        "evaluation": EvaluationOptions.of(experiment).model_dump(),
        "circuits": [[path.resolve().parent.name, path.name, hash_of_file(path)] for path in paths],
    }
    if DiscoveryOptions.of(experiment).contrast != "toxic-safe":
        inputs["contrast"] = DiscoveryOptions.of(experiment).contrast
    inputs |= run.base_inputs
    name = f"evaluation-{category}{DiscoveryOptions.of(experiment).name_of_prompts}"
    artifact = Artifact.of(run.root / "circuits" / experiment.name, name, inputs)
    if needs_making(artifact, rebuild):
        ensure_saes(run)
        ensure_store(run)
        from sfc.studies.evaluate import make_evaluation

        make_evaluation(run, artifact, category, paths, rebuild)
    return artifact


def needs_making(artifact: Artifact, rebuild: bool, sites: Sequence[str] = ()) -> bool:
    """Whether an artifact is to be made (anew), or lacks one of these sites; says so where it is not."""
    if not rebuild and artifact.is_complete() and set(sites) <= set(artifact.manifest().get("sites", [])):
        say(f"up to date: {artifact.folder}")
        return False
    return True
