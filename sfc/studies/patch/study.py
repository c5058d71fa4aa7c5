"""`sfc patch`: which layers, heads and positions carry a behavior?"""

from pathlib import Path
from typing import Any, ClassVar

from sfc.circuits.options import EvaluationOptions
from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError
from sfc.data.prepare import prompts_fingerprint
from sfc.models.sources import model_identity
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.patch.alignment import check_positions
from sfc.studies.patch.options import CRITICAL_Q, PatchingOptions, pairs_file
from sfc.studies.patch.pairs import WRAPPERS
from sfc.studies.study import STUDIES, Finished, Made, Study


class Patching(Study[PatchingOptions]):
    """Patch activations between runs with and without the behavior: which layers, heads and positions carry it?

    Example: sfc patch --component head --positions last,suffix --limit 40
    """

    name = "patch"
    options = PatchingOptions
    schema = 3
    files: ClassVar = {
        "page": "patching.html",
        "effects": "effects.csv",
        "pairs": "pairs.csv",
        "scores": "scores.csv",
    }
    model_columns: ClassVar = {
        "n_layers": "layers",
        "n_pairs": "pairs",
        "n_components": "components",
        "n_critical": "critical",
        "critical_layers": "critical layers",
        "strongest_denoise": "strongest head, denoising",
        "strongest_noise": "strongest head, noising",
    }
    model_headline: ClassVar = ("critical_layers",)

    def check(self, run: Run) -> None:
        options = self.of(run)
        for name in options.position_sets:
            check_positions(name)
        if options.wrappers and options.pairs != "wrapped":
            raise UserError("--wrappers goes with --pairs wrapped only")
        if options.wrappers and not Path(options.wrappers).is_file():
            raise UserError(f"no file {options.wrappers}: --wrappers takes a CSV or .jsonl file with name and template")
        if options.require == "behaviour" and run.behavior.judge() is None:
            raise UserError(f"no judge tells whether replies show {run.behavior.name!r}: give --require score")
        pairs_file(run)

    def label(self, run: Run) -> str:
        path = pairs_file(run)
        name = self.of(run).pairs if path is None or self.of(run).pairs == "toxic-safe" else path.stem
        return f"patching-{name}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, path = run.experiment, pairs_file(run)
        return {
            "model": model_identity(experiment.model),
            "behavior": [run.behavior.name, run.behavior.inputs(experiment)],
            "pairs": hash_of_file(path) if path else self._wrapped(run),
            "patching": self.of(run).model_dump(exclude={"pairs", "wrappers"}),
            "max_tokens": experiment.prompts.max_tokens,
            "min_denominator": EvaluationOptions.of(experiment).min_denominator,
        }

    def _wrapped(self, run: Run) -> dict[str, Any]:
        """What wrapped pairs are made from: the prompts, their splits, and the wrappers."""
        wrappers = self.of(run).wrappers
        return {
            "data": prompts_fingerprint(run.prompts.frame),
            **run.experiment.prompts.model_dump(exclude={"hard_share"}),
            "wrappers": hash_of_file(Path(wrappers)) if wrappers else WRAPPERS,
        }

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.patch.measure import measure

        return measure(session, folder)

    def page(self, finished: Finished) -> Page:
        from sfc.studies.patch.page import page

        return page(finished)

    def model_row(self, finished: Finished) -> dict[str, Any]:
        result, effects = finished.result, finished.table("effects.csv")
        critical = effects.loc[~effects["is_range"] & (effects["q_value"] <= CRITICAL_Q), "layer"]
        best = [row for row in result["critical"] if row["kind"] == "head" and row["rank"] == 1]
        return {
            **{name: result[name] for name in ("n_layers", "n_pairs", "n_components", "n_critical")},
            "critical_layers": ", ".join(map(str, sorted(critical.unique()))) or "none",
            **{f"strongest_{row['direction']}": row["component"] for row in best},
        }


STUDIES.register(Patching())
