"""How directions are found, chosen and steered along: a section of an experiment. No torch here."""

from typing import Literal

from pydantic import Field

from sfc.core.options import Options, Share
from sfc.models.positions import EditKind

ContrastKind = Literal["toxic-safe", "refused-complied", "hard-score"]
SteeringKind = Literal["resid_pre", "resid_mid", "resid_post"]


class SteeringOptions(Options):
    """How directions are found and chosen, and how prompts are steered along them."""

    section = "steering"

    category: str = Field("all", description="prompts of one category, or of all")
    direction: str = Field(
        "toxic-safe", description="what is steered along: a contrast, probe, circuit, or a feature resid_post.21/F12"
    )
    contrasts: list[ContrastKind] = Field(
        ["toxic-safe", "refused-complied", "hard-score"], description="whose directions are held against each other"
    )
    kinds: list[SteeringKind] = Field(["resid_post"], min_length=1, description="sites of candidates")
    layers: list[int] = Field([], description="layers of candidates; empty: ten, evenly spread")
    prompts: int = Field(128, ge=4, description="discovery prompts per side that directions are learned from")
    folds: int = Field(2, ge=2, description="parts of them: each candidate is learned on all but one, and tried on it")
    tried_prompts: int = Field(24, ge=2, description="prompts per side, of all folds, that candidates are tried on")
    tried_alpha: float = Field(0.2, gt=0, description="amount at which candidates must induce refusal")
    min_induced: float = Field(0.0, description="a candidate must bring the mean score of safe prompts above this")
    max_kl: float = Field(1.0, ge=0, description="nats by which turning down may change safe prompts' next token")
    latest: Share = Field(0.8, description="candidates in layers after this share of the model are rejected")
    edit: EditKind = "add"
    everywhere: bool = Field(False, description="project-out: at every site of the residual stream")
    units: Literal["norm", "raw"] = Field(
        "norm", description="of alpha: the mean residual norm at the site, or the direction's own length"
    )
    alphas: list[float] = Field([], description="empty: nine from -0.32 to 0.32; raw: -4 to 4; project-out: 0 to 1")
    positions: str = Field("suffix", description="tokens of the prompt that are steered: last, last-K, suffix, prompt")
    during_reply: bool = Field(False, description="also steer every token that is generated")
    when: str | None = Field(
        None, description="steer only prompts in whose text this feature fires: resid_post.21/F12, or best; null: all"
    )
    when_above: float = Field(0.0, ge=0, description="the value above which it fires; best brings its own")
    swept_layers: int = Field(5, ge=1, description="layers of the sweep: those of the best candidates")
    test_prompts: int = Field(30, ge=1, description="test prompts per side")
    reply_tokens: int = Field(16, ge=1, description="length of the replies that are judged")
    ordinary_prompts: int = Field(20, ge=1, description="safe prompts whose replies by the base model must stay likely")
    ordinary_tokens: int = Field(48, ge=1, description="length of those replies")
    max_loss: float = Field(0.15, gt=0, description="share by which their cross-entropy may rise at the chosen alphas")
    random_directions: int = Field(20, ge=2)
    shuffled_directions: int = Field(5, ge=1, description="directions between sides to which prompts are dealt by lot")
    ablated_writers: int = Field(10, ge=0, description="heads and MLPs that write most of it, which are ablated")
    features: bool = Field(False, description="also the direction's cosine with every SAE feature")
    xstest: str | None = Field(
        None, description="also steer the prompts of this file: XSTest, or any CSV with prompt and label, and category"
    )

    @property
    def dial(self) -> list[float]:
        """The alphas, or those that the edit and its units suggest."""
        if self.alphas:
            return list(dict.fromkeys(self.alphas))
        if self.edit == "project-out":
            return [0.0, 0.5, 1.0]
        return [round(0.08 * step, 2) if self.units == "norm" else float(step) for step in range(-4, 5)]
