"""Bridges to studies for what is not one yet."""

from collections.abc import Sequence

from sfc.circuits.options import DiscoveryOptions, EvaluationOptions, discovery_identity
from sfc.core.artifacts import Artifact
from sfc.core.errors import UserError
from sfc.core.progress import say
from sfc.run import Run
from sfc.studies.collect.study import COLLECT
from sfc.studies.compare.options import ComparisonOptions
from sfc.studies.discover.study import DISCOVER
from sfc.studies.study import ensure
from sfc.studies.train.study import TRAIN

COMPARISON_SCHEMA = 2


def ensure_store(run: Run, extra_sites: Sequence[str] = (), rebuild: bool = False) -> Artifact:
    ensure(COLLECT, run, rebuild)
    return run.store


def ensure_saes(run: Run, rebuild: bool = False) -> Artifact:
    ensure(TRAIN, run, rebuild)
    return run.saes


def ensure_circuit(run: Run, category: str, rebuild: bool = False) -> Artifact:
    run = run.having(DiscoveryOptions, category=category)
    ensure(DISCOVER, run, rebuild)
    return DISCOVER.artifact(run)


def circuit_artifact(run: Run, category: str) -> Artifact:
    return DISCOVER.artifact(run.having(DiscoveryOptions, category=category))


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
        "circuit": DISCOVER.schema,
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


def needs_making(artifact: Artifact, rebuild: bool, sites: Sequence[str] = ()) -> bool:
    """Whether an artifact is to be made (anew), or lacks one of these sites; says so where it is not."""
    if not rebuild and artifact.is_complete() and set(sites) <= set(artifact.manifest().get("sites", [])):
        say(f"up to date: {artifact.folder}")
        return False
    return True
