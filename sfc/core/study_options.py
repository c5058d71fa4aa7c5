"""The sections of an experiment for the studies beside the main line: patching, steering, repair."""

from typing import Annotated, Literal

from pydantic import Field

from sfc.core.options import Section, Share

ComponentKind = Literal["resid", "attn", "mlp", "head"]
EditKind = Literal["add", "project-out", "clamp"]
ContrastKind = Literal["toxic-safe", "refused-complied", "hard-score"]
SteeringKind = Literal["resid_pre", "resid_mid", "resid_post"]


class PatchingConfig(Section):
    """What is patched, between which pairs of prompts."""

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


class SteeringConfig(Section):
    """How directions are found and chosen, and how prompts are steered along them."""

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


class RepairConfig(Section):
    """How the edit that lowers over-refusal is chosen and measured."""

    sizes: list[Annotated[int, Field(ge=1)]] = Field([5, 10, 20, 50], min_length=1, description="features ablated")
    toxic_share: float = Field(
        0.5, description="of its effect on hard prompts that a feature may have on toxic ones, and still qualify"
    )
    refused_above: float = Field(0.0, description="score above which a discovery prompt counts as refused")
    most_lost: float = Field(0.05, ge=0, description="share of toxic discovery prompts whose refusal may be lost")
    prompts: int = Field(100, ge=2, description="discovery prompts of each kind: half to score features, half to try")
    test_prompts: int = Field(30, ge=1, description="test prompts of each kind: hard, toxic, safe")
    random_draws: int = Field(3, ge=1, description="random edits of each size, matched by site and firing rate")
    reply_tokens: int = Field(16, ge=1, description="length of the replies that are judged")
    ordinary_prompts: int = Field(20, ge=1, description="safe test prompts whose replies by the base model are read")
    ordinary_tokens: int = Field(48, ge=1, description="length of those replies")
