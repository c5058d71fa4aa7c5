"""How circuits are discovered and judged: two sections of an experiment. No torch here."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import NODES
from sfc.core.config import Experiment, ModelConfig
from sfc.core.options import Options, Share, option
from sfc.core.registry import KnownTo

EdgeKind = Literal["attribution", "correlation"]
ErrorMode = Literal["node", "keep-current", "keep-clean", "ablate"]
Population = Literal["toxic", "safe"]
PromptContrast = Literal["toxic-safe", "toxic-hard", "refused-complied", "model-base"]
BaselineChoice = Literal[
    "safe-mean", "toxic-mean", "balanced-mean", "complied-mean", "base", "zero", "paired", "counterfactual"
]
LARGE_PROMPT_FREE = 0.1
"""above this share, what a circuit restores under mean ablation is in good part not the prompt's doing"""
_OWN_BASELINES: dict[PromptContrast, BaselineChoice] = {"refused-complied": "complied-mean", "model-base": "base"}


class DiscoveryOptions(Options):
    """How nodes are scored and how the graph is drawn between them."""

    section = "discovery"

    nodes: Annotated[str, KnownTo(NODES)] = Field(
        "features", description="what circuits are made of; heads and MLPs need no SAEs"
    )
    category: str | None = option(
        None, description="OR-Bench category, such as self-harm, or all; null: violence, or what the behavior has"
    )
    method: Annotated[str, KnownTo(METHODS)] = option("learned-mask", description="how nodes are ranked")
    population: Population = option(
        "toxic",
        description="prompts to explain; the others give the baseline (counterfactuals explain those of both sides)",
    )
    contrast: PromptContrast = option(
        "toxic-safe",
        description="toxic-hard: the prompts on the safe side are hard ones only; refused-complied: toxic prompts alone"
        " (population safe: hard ones alone), those refused against those answered; model-base: the model against the"
        " one it was trained from, on the same prompts",
    )
    base: str | None = Field(
        None, description="contrast model-base: that model, a folder or a model id; null: itself without its adapter"
    )
    baseline: BaselineChoice | None = Field(
        None,
        description="what ablated nodes are set to. counterfactual: what they are in the run of an equally long prompt"
        " of the other side, for prompts of both sides; or a mean, as safe-mean. null: counterfactual, but the other"
        " population's mean with population safe, and what the contrast has",
    )
    pairs_per_prompt: int = Field(3, ge=1, description="counterfactual: at most so many other prompts for each")
    aggregation: Literal["mean", "max", "last"] = Field(
        "max", description="what is made of a feature's values over the sequence, where prompts have one each"
    )
    edges: EdgeKind = Field("attribution", description="what an edge between neighbouring layers is drawn by")
    edge_share: Share = Field(0.01, description="attribution: smallest edge, as a share of the circuit's largest")
    edge_threshold: float = Field(0.5, ge=0, le=1, description="correlation: smallest |r| of an edge")
    edges_per_node: int = Field(5, ge=1, description="at most this many edges into a node")
    edge_nodes: int = Field(200, ge=2, description="edges are looked for between so many of the circuit's best nodes")
    edge_prompts: int = Field(50, ge=1, description="attribution: at most so many discovery prompts, or pairs")
    edge_tokens: int = Field(
        2048, ge=1, description="attribution: tokens times nodes that go through a layer's Jacobian at once"
    )
    drop_dead_ends: bool = Field(False, description="leave out nodes from which no edges lead to the last layer")
    halves: bool = Field(False, description="also discover on two halves of the prompts: do they agree?")
    checked_nodes: int = Field(
        30, ge=2, description="approximation check: strongest nodes, and as many random ones, measured exactly"
    )
    checked_prompts: int = Field(50, ge=1, description="approximation check: at most this many discovery prompts")

    @model_validator(mode="after")
    def _choices_go_together(self) -> "DiscoveryOptions":
        kind, method, own = NODES[self.nodes], METHODS[self.method], _OWN_BASELINES.get(self.contrast)
        if not kind.has_features and not method.causal:
            raise ValueError(f"method {self.method!r} needs features, which nodes {self.nodes!r} do not have")
        if not kind.has_edges and self.drop_dead_ends:
            raise ValueError(f"nodes {self.nodes!r} have no edges, so that all would be dead ends")
        if self.halves and not method.per_prompt:
            raise ValueError(f"method {self.method!r} runs no prompts that could be halved: leave discovery.halves out")
        if self.contrast != "toxic-safe" and self.baseline == "paired":
            raise ValueError(f"contrast {self.contrast!r} has no pairs: baseline 'paired' goes with toxic-safe")
        against_base, by_counterfactuals = self.contrast == "model-base", self.baseline == "counterfactual"
        fits = self.baseline in (None, own) or (by_counterfactuals and not against_base)
        if not fits and (own or self.baseline in _OWN_BASELINES.values()):
            raise ValueError(f"contrast {self.contrast!r} does not go with baseline {self.baseline!r}")
        if by_counterfactuals and self.population == "safe" and self.contrast != "refused-complied":
            raise ValueError("baseline 'counterfactual' explains prompts of both sides: leave population out")
        if against_base and not method.causal:
            raise ValueError(f"method {self.method!r} looks at one model alone: contrast 'model-base' needs another")
        if not against_base and self.base is not None:
            raise ValueError(f"contrast {self.contrast!r} has no base model: leave discovery.base out")
        return self

    def check(self, experiment: Experiment) -> None:
        """Check that there is a base model where the contrast needs one."""
        if self.contrast == "model-base" and base_model(experiment) == experiment.model:
            raise ValueError("contrast 'model-base': the model has no adapter to leave out; give discovery.base")

    @property
    def explains_positives(self) -> bool:
        """Whether the prompts explained are those of the discovery prompts whose label is true."""
        return self.population == "toxic" or self.contrast == "refused-complied"

    @property
    def name_of_prompts(self) -> str:
        """What is added to the names of artifacts that are not about toxic prompts against safe ones."""
        contrast = "" if self.contrast == "toxic-safe" else f"-{self.contrast}"
        return f"{'' if self.population == 'toxic' else f'-{self.population}'}{contrast}"

    @property
    def baseline_choice(self) -> BaselineChoice:
        """The baseline by name."""
        usual = "counterfactual" if self.population == "toxic" else "toxic-mean"
        return self.baseline or _OWN_BASELINES.get(self.contrast, usual)


class EvaluationOptions(Options):
    """How circuits are proved."""

    section = "evaluation"

    error_mode: ErrorMode = Field(
        "ablate",
        description="what becomes of what dictionaries miss: ablate; node, kept or ablated like any node; keep-current,"
        " as the published pipeline has it; keep-clean, as in the model",
    )
    sizes: list[Annotated[int, Field(ge=1)]] = Field(
        [5, 10, 20, 50, 100, 200, 500, 1000, 2000], min_length=1, description="circuit sizes of the curve"
    )
    random_draws: int = Field(
        10, ge=1, description="at most so many random circuits per size, matched per layer and firing rate"
    )
    random_width: float = Field(
        0.2, gt=0, description="they are drawn until the 95 % interval of their mean faithfulness is no wider than this"
    )
    null_draws: int = Field(
        1, ge=0, description="dictionaries of each null that the method is run on; 10 make p = 0.05 possible"
    )
    target: float = Field(
        0.8,
        description="the smallest circuit whose agreement and recovered shares (by means: faithfulness) reach it on the"
        " discovery split is reported",
    )
    min_denominator: float = Field(
        0.5, gt=0, description="below this |F(M) - F(0)| ratios are not measurable and are null"
    )
    replies: int = Field(20, ge=0, description="test prompts of each kind that are answered under the ablation")
    reply_tokens: int = Field(16, ge=1, description="length of those replies, which are judged")


def discovery_identity(experiment: Experiment) -> dict[str, Any]:
    """What circuits depend on of how they are discovered: the section, and the settings of its method."""
    discovery = DiscoveryOptions.of(experiment)
    options = METHODS[discovery.method].options
    return discovery.model_dump(exclude={"category"}) | (
        {options.section: options.of(experiment).model_dump()} if options else {}
    )


def base_model(experiment: Experiment) -> ModelConfig:
    """The model that the experiment's model was trained from, read in the same template."""
    base = DiscoveryOptions.of(experiment).base
    other = {"source": base, "revision": None} if base else {}
    return experiment.model.model_copy(update={"adapter": None, **other})
