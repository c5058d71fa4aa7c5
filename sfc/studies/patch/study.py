"""`sfc patch`: which layers, heads and positions carry a behavior?"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from sfc.circuits.options import EvaluationOptions
from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.data.prepare import prompts_fingerprint
from sfc.models.identity import model_identity
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.patch.alignment import check_positions
from sfc.studies.patch.pairs import WRAPPERS
from sfc.studies.study import STUDIES, Finished, Made, Study

CRITICAL_Q = 0.05
"""components with a q-value of at most this are critical"""
ComponentKind = Literal["resid", "attn", "mlp", "head"]


class PatchingOptions(Options):
    """What is patched, between which pairs of prompts."""

    section = "patching"

    pairs: str = option(
        "toxic-safe", description="pairs of prompts: toxic-safe, wrapped, or a CSV or .jsonl file with toxic and safe"
    )
    wrappers: str | None = option(
        None, description="for wrapped pairs: a CSV or .jsonl file with name, template ({prompt}) and prefill"
    )
    components: list[ComponentKind] = option(
        ["resid", "attn", "mlp", "head"], flag="--component", min_length=1, description="what is patched"
    )
    positions: list[str] = option(
        [],
        description="tokens to patch at, among last,last-K,suffix,content,prefix,all,each,suffix[-2]; by default"
        " suffix, for wrapped pairs last",
    )
    directions: list[Literal["denoise", "noise"]] = option(
        ["denoise", "noise"], flag="--direction", min_length=1, description="which run is patched into the other"
    )
    layers: list[int] = option([], description="layers to patch, such as 10-20,25; by default all")
    cumulative: bool = option(False, description="also patch all layers from the first to each at once")
    limit: int = option(24, ge=1, description="at most this many pairs are tried, chosen by hash")
    category: str | None = option(None, description="only pairs of this category")
    require: Literal["behaviour", "score"] = option(
        "behaviour",
        description="what must differ in a pair: behaviour (judged replies) or only the score (for base models)",
    )
    reply_tokens: int = Field(40, ge=1, description="length of the replies that are judged")
    draws: int = Field(2000, ge=100, description="draws of the bootstrap")
    flips: int = Field(10_000, ge=100, description="sign flips of the permutation test")

    @property
    def position_sets(self) -> list[str]:
        """The position sets to patch at. A prefilled reply has only its last token in common with a plain prompt."""
        return self.positions or (["last"] if self.pairs == "wrapped" else ["suffix"])


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


def pairs_file(run: Run) -> Path | None:
    """The file that `patching.pairs` means; None where the pairs are prompts of the data set in wrappers.

    Raises:
        UserError: there is no such file, or the behavior has no pairs in the data set.
    """
    name = PatchingOptions.of(run.experiment).pairs
    if name == "wrapped":
        return None
    if name == "toxic-safe" and not run.behavior.reads_data_set:
        raise UserError(f"behavior {run.behavior.name!r} has no pairs of prompts: give --pairs a file, or wrapped")
    path = run.data_folder / "pairs.csv" if name == "toxic-safe" else Path(name)
    if not path.is_file():
        raise UserError(
            f"no pairs {str(path)!r}: --pairs takes toxic-safe (the data set's pairs.csv), wrapped, or a CSV or .jsonl"
            " file with toxic and safe"
        )
    return path


STUDIES.register(Patching())
