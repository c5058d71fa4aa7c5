"""How the edit that lowers over-refusal is chosen: a section of an experiment. No torch here."""

from typing import Annotated

from pydantic import Field

from sfc.behaviors.behavior import HARD, NEGATIVE, POSITIVE
from sfc.core.options import Options, option

KINDS = {"hard": HARD, "toxic": POSITIVE, "safe": NEGATIVE}
"""groups of prompts, by the `dataset_type` they are of"""
HOOK, WEIGHTS = "hook", "weights"
"""kinds of edits"""


class RepairOptions(Options):
    """How the edit that lowers over-refusal is chosen and measured."""

    section = "repair"

    category: str = option("all", description="OR-Bench category, or all")
    sizes: list[Annotated[int, Field(ge=1)]] = option(
        [5, 10, 20, 50], min_length=1, description="numbers of features ablated, such as 5,20,80"
    )
    toxic_share: float = Field(
        0.5, description="of its effect on hard prompts that a feature may have on toxic ones, and still qualify"
    )
    refused_above: float = Field(0.0, description="score above which a discovery prompt counts as refused")
    most_lost: float = Field(0.05, ge=0, description="share of toxic discovery prompts whose refusal may be lost")
    prompts: int = Field(100, ge=2, description="discovery prompts of each kind: half to score features, half to try")
    test_prompts: int = option(30, flag="--limit", ge=1, description="test prompts of each kind: hard, toxic, safe")
    random_draws: int = Field(3, ge=1, description="random edits of each size, matched by site and firing rate")
    reply_tokens: int = Field(16, ge=1, description="length of the replies that are judged")
    ordinary_prompts: int = Field(20, ge=1, description="safe test prompts whose replies by the base model are read")
    ordinary_tokens: int = Field(48, ge=1, description="length of those replies")
