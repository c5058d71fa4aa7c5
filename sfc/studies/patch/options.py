"""What is patched, between which pairs of prompts: a section of an experiment. No torch here."""

from typing import Literal

from pydantic import Field

from sfc.core.options import Options

ComponentKind = Literal["resid", "attn", "mlp", "head"]


class PatchingOptions(Options):
    """What is patched, between which pairs of prompts."""

    section = "patching"

    pairs: str = Field("toxic-safe", description="toxic-safe, wrapped, or a CSV or .jsonl file with toxic and safe")
    wrappers: str | None = Field(None, description="wrapped: a CSV or .jsonl file with name, template and prefill")
    category: str | None = Field(None, description="only pairs of this category")
    limit: int = Field(24, ge=1, description="at most this many pairs are tried, chosen by hash")
    require: Literal["behaviour", "score"] = Field(
        "behaviour", description="behaviour: judged replies must differ; score: only the refusal score, for base models"
    )
    components: list[ComponentKind] = Field(["resid", "attn", "mlp", "head"], min_length=1)
    positions: list[str] = Field([], description="position sets; empty: suffix, but last where pairs are wrapped")
    layers: list[int] = Field([], description="empty: all")
    directions: list[Literal["denoise", "noise"]] = Field(["denoise", "noise"], min_length=1)
    cumulative: bool = Field(False, description="also patch all layers from the first to each at once")
    reply_tokens: int = Field(40, ge=1, description="length of the replies that are judged")
    draws: int = Field(2000, ge=100, description="draws of the bootstrap")
    flips: int = Field(10_000, ge=100, description="sign flips of the permutation test")

    @property
    def position_sets(self) -> list[str]:
        """The position sets to patch at. A prefilled reply has only its last token in common with a plain prompt."""
        return self.positions or (["last"] if self.pairs == "wrapped" else ["suffix"])
