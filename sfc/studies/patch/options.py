"""What is patched, and between which pairs of prompts. No torch here."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.run import Run

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
