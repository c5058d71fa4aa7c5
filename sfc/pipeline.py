"""Bridges to studies for what is not one yet."""

from collections.abc import Sequence

from sfc.circuits.options import DiscoveryOptions
from sfc.core.artifacts import Artifact
from sfc.core.progress import say
from sfc.run import Run
from sfc.studies.collect.study import COLLECT
from sfc.studies.discover.study import DISCOVER
from sfc.studies.study import ensure
from sfc.studies.train.study import TRAIN


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


def needs_making(artifact: Artifact, rebuild: bool, sites: Sequence[str] = ()) -> bool:
    """Whether an artifact is to be made (anew), or lacks one of these sites; says so where it is not."""
    if not rebuild and artifact.is_complete() and set(sites) <= set(artifact.manifest().get("sites", [])):
        say(f"up to date: {artifact.folder}")
        return False
    return True
