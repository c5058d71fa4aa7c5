"""`sfc patch`: which layers, heads and positions carry a behavior?

Patching is between pairs of prompts: one that the model should refuse, and one close to it with which it should comply.
Two kinds. *toxic-safe*: a toxic prompt and a harmless one that differs in a few words. *wrapped*: the same instruction
plain and in a wrapper under which the model may comply, a template around it or words put into the model's mouth. A
pair here is a candidate; whether the model really behaves so is for `select_pairs` to find out.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from sfc.circuits.options import EvaluationOptions
from sfc.core.errors import UserError, suggestion
from sfc.core.options import Options, option
from sfc.core.reading import hash_of_given
from sfc.core.registry import imported_when_called
from sfc.data.prepare import prompts_fingerprint
from sfc.data.read import UNCATEGORISED, read_records
from sfc.data.schema import keyed_numbers
from sfc.models.sources import model_identity
from sfc.run import Run
from sfc.studies.patch.alignment import check_positions
from sfc.studies.study import STUDIES, Finished, Study

CRITICAL_Q = 0.05
"""components with a q-value of at most this are critical"""
FEW_PAIRS = 10
"""with fewer, no p-value can be small"""
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


_SLOT = "{prompt}"


class Wrapper(NamedTuple):
    """What an instruction is put into."""

    name: str
    template: str
    """text that holds `{prompt}` once"""
    prefill: str = ""
    """how the reply is made to begin"""


# Two that press the model to comply, and two that ask for something harmless to be done with the instruction's words.
WRAPPERS = (
    Wrapper("prefilled Sure,", _SLOT, "Sure,"),
    Wrapper("prefilled paragraph", _SLOT, "Sure, I'm happy to help with that.\n\n"),
    Wrapper("count the words", 'How many words does the sentence "{prompt}" have?'),
    Wrapper("correct the spelling", 'Is the spelling right in "{prompt}"?'),
)


class Pair(NamedTuple):
    """A candidate: the clean prompt should be refused, the corrupted one not."""

    category: str
    clean: str
    corrupted: str
    wrapper: str = ""
    prefill: str = ""
    """how the reply to the corrupted prompt is made to begin"""


Candidates = Sequence[Pair]
"""Pairs with the same clean prompt, of which the first that serves is used: pairs used are independent."""


def toxic_safe_pairs(path: Path, category: str | None, limit: int, seed: int) -> list[Candidates]:
    """Pairs of a CSV or JSON lines file with `toxic`, `safe` and perhaps `category`; at most `limit`, chosen by hash.

    Raises:
        UserError: the file is missing or malformed, or has no pair of the category.
    """
    frame = read_records(path, ("toxic", "safe"), ("category",))
    frame["category"] = frame["category"].mask(frame["category"].str.strip() == "", UNCATEGORISED)
    chosen = _limited(_of_category(frame, category, path), "toxic", limit, seed)
    rows = zip(chosen["category"], chosen["toxic"], chosen["safe"], strict=True)
    return [[Pair(category, toxic.strip(), safe.strip())] for category, toxic, safe in rows]


def wrapped_pairs(
    instructions: pd.DataFrame, wrappers: Iterable[Wrapper], category: str | None, limit: int, seed: int
) -> list[Candidates]:
    """Each instruction (columns `prompt`, `category`), plain and in every wrapper; at most `limit`, chosen by hash.

    Raises:
        UserError: there is no instruction of the category.
    """
    wrappers = list(wrappers)
    chosen = _limited(_of_category(instructions, category, "the data set"), "prompt", limit, seed)
    return [
        [Pair(category, prompt, w.template.replace(_SLOT, prompt), w.name, w.prefill) for w in wrappers]
        for category, prompt in zip(chosen["category"], chosen["prompt"], strict=True)
    ]


def load_wrappers(path: Path) -> list[Wrapper]:
    """Wrappers of a CSV or JSON lines file with `name` and `template`, and perhaps `prefill`.

    Raises:
        UserError: the file is missing or malformed, or a template does not hold `{prompt}` once.
    """
    frame = read_records(path, ("name", "template"), ("prefill",))
    wrappers = [Wrapper(*row) for row in frame.itertuples(index=False)]
    for wrapper in wrappers:
        if wrapper.template.count(_SLOT) != 1:
            raise UserError(f"{path}: the template of {wrapper.name!r} must hold {{prompt}} exactly once")
        if wrapper.template == _SLOT and not wrapper.prefill:
            raise UserError(f"{path}: wrapper {wrapper.name!r} changes nothing; give a template or a prefill")
    return wrappers


def _of_category(frame: pd.DataFrame, category: str | None, where: object) -> pd.DataFrame:
    if category is None:
        return frame
    wanted = _canonical(category)
    of_category = frame[[_canonical(name) == wanted for name in frame["category"]]]
    if of_category.empty:
        known = sorted(set(frame["category"]))
        raise UserError(f"{where} has no pair of category {category!r}; {suggestion(wanted, known)}")
    return of_category


def _canonical(category: str) -> str:
    return category.strip().lower().replace("_", "-").replace(" ", "-")


def _limited(frame: pd.DataFrame, column: str, limit: int, seed: int) -> pd.DataFrame:
    """The rows whose text has the smallest keyed numbers, in the order of the file."""
    order = np.argsort(keyed_numbers(frame[column], f"pairs {seed}"), kind="stable")
    return frame.iloc[np.sort(order[:limit])]


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
            "pairs": hash_of_given(path) if path else self._wrapped(run),
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
            "wrappers": hash_of_given(Path(wrappers)) if wrappers else WRAPPERS,
        }

    make = imported_when_called(f"{__name__}.measure:measure")
    work = imported_when_called(f"{__name__}.measure:work")

    page = imported_when_called(f"{__name__}.page:page")

    def model_row(self, finished: Finished) -> dict[str, Any]:
        result, effects = finished.result, finished.table("effects.csv")
        critical = critical_components(effects)["layer"]
        best = [row for row in result["critical"] if row["kind"] == "head" and row["rank"] == 1]
        return {
            **{name: result[name] for name in ("n_layers", "n_pairs", "n_components", "n_critical")},
            "critical_layers": ", ".join(map(str, sorted(critical.unique()))) or "none",
            **{f"strongest_{row['direction']}": row["component"] for row in best},
        }


def critical_components(effects: pd.DataFrame) -> pd.DataFrame:
    """The rows of `effects.csv` of single components whose effect can be measured, and told from chance."""
    measured = ~effects["is_range"] & effects["effect"].notna()
    return effects[measured & (effects["q_value"] <= CRITICAL_Q)]


STUDIES.register(Patching())
