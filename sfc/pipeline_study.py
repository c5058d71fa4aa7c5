"""Bridge to `sfc repair`."""

from sfc.core.artifacts import Artifact
from sfc.pipeline import ensure_saes, ensure_store, needs_making
from sfc.run import Run
from sfc.studies.repair.options import RepairOptions

REPAIR_SCHEMA = 1


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
