"""One `Experiment` says everything a run depends on: model, prompts, sites, SAEs, discovery, evaluation.

`sfc.core.experiments` reads them. Presets are YAML files in `sfc/core/presets/`; any other YAML file with the same keys
works as well.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sfc.core.options import Section, Share
from sfc.core.sites import SiteKind, site_of
from sfc.core.study_options import PatchingConfig, RepairConfig, SteeringConfig

Method = Literal["learned-mask", "attribution", "integrated-gradients", "exact", "correlation", "magnitude"]
EdgeKind = Literal["attribution", "correlation"]
ErrorMode = Literal["node", "keep-current", "keep-clean", "ablate"]
NodeChoice = Literal["features", "heads", "mlps", "heads-and-mlps"]
Population = Literal["toxic", "safe"]
PromptContrast = Literal["toxic-safe", "toxic-hard", "refused-complied", "model-base"]
ReferenceChoice = Literal["safe-mean", "toxic-mean", "balanced-mean", "complied-mean", "base", "zero", "paired"]
_OWN_REFERENCES: dict[PromptContrast, ReferenceChoice] = {"refused-complied": "complied-mean", "model-base": "base"}


class ModelConfig(Section):
    """Which model, how prompts are rendered for it, and what counts as refusing."""

    source: str = Field(description="embedded, tiny, a folder, or a Hugging Face model id")
    revision: str | None = Field(None, description="commit or tag on the model hub")
    adapter: str | None = Field(
        None, description="adapter merged into the weights: a name inside the package or a folder"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    template: str = Field(
        "chat", description="chat: the tokenizer's own; plain: 'User: … Assistant:'; or a text with {prompt} in it"
    )
    system_prompt: str | None = Field(None, description="system message of the chat template; null: the template's own")
    refusal_tokens: list[str] = Field(
        min_length=1, description="tokens that open a refusal: the set R of the refusal score"
    )
    against_tokens: list[str] = Field([], description="if given, the score is the logit difference of R and these")


class PromptsConfig(Section):
    """Which prompts, how many, and how they are split."""

    hard_share: Share = Field(0.25, description="share of hard prompts among the safe ones of a balanced set")
    discovery: Share = 0.5
    reference: Share = 0.15
    test: Share = 0.35
    max_tokens: int = Field(256, ge=8, description="longer prompts are left out, and counted")
    limit: int | None = Field(None, ge=4, description="at most this many prompts per category and kind")

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "PromptsConfig":
        if abs(self.discovery + self.reference + self.test - 1) > 1e-9 or min(self.discovery, self.test) <= 0:
            raise ValueError("discovery + reference + test must be 1, discovery and test above 0")
        return self


class ActivationsConfig(Section):
    """Which activations are stored, and how."""

    kind: SiteKind = "resid_post"
    layers: list[int] = Field(min_length=1)
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    batch_tokens: int = Field(1024, ge=1, description="tokens per forward pass, padding included")
    shard_tokens: int = Field(1_000_000, ge=1, description="rows per HDF5 file")
    gzip: bool = False

    @model_validator(mode="after")
    def _layers_ascend(self) -> "ActivationsConfig":
        if self.layers != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError("layers must be ascending, different and not negative")
        return self

    def identity(self) -> dict[str, Any]:
        """What stored activations depend on; which sites a store holds is not part of it."""
        return self.model_dump(exclude={"kind", "layers"})

    @property
    def sites(self) -> list[str]:
        """TransformerLens hook points, in the order in which the model passes them."""
        return [site_of(self.kind, layer) for layer in self.layers]


class CorpusConfig(Section):
    """What the SAEs learn from, apart from the prompts that circuits are discovered on."""

    source: str = Field(
        "prompts",
        description="prompts: the circuits' own; replies: these with the model's greedy replies; a file (.txt, .csv or"
        " .jsonl with a column text); or hf:NAME or hf:NAME:SPLIT, a Hugging Face data set",
    )
    reply_tokens: int = Field(32, ge=1, description="replies: at most this many tokens of each")
    context: int = Field(128, ge=8, description="files and data sets: tokens per piece of a text")
    max_tokens: int | None = Field(None, ge=1, description="files and data sets: read no more tokens than this")
    stored: Literal["auto", "always", "never"] = Field(
        "auto", description="never: run the model again for every epoch; auto: where the store would not fit the disk"
    )

    def identity(self) -> dict[str, Any]:
        """What the activations depend on: whether they are stored is not part of it."""
        return self.model_dump(exclude={"stored"})


class SaeConfig(Section):
    """The top-k sparse autoencoders, one per site."""

    source: str | None = Field(
        None,
        description="use these instead of training: a folder of SAELens dictionaries (one subfolder per site, or one"
        " dictionary), or a pretrained release/sae_id; {layer} stands for the layer",
    )
    min_variance_explained: float = Field(
        0.5,
        le=1,
        allow_inf_nan=False,
        description="with saes.source: a dictionary that explains less of a site's variance is refused",
    )
    expansion: int = Field(4, ge=1, description="features per dimension of the activation")
    k: int | str = Field(
        32, description="active features per token: a count, or a percentage of the features such as '5%'"
    )
    steps: int = Field(400, ge=1)
    batch_size: int = Field(512, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    decay_share: Share = Field(
        0.3, description="share of the steps, at the end, over which the learning rate falls to zero"
    )
    auxiliary_weight: float = Field(1 / 32, ge=0, description="weight of the dead-feature loss of Gao et al. 2024")
    dead_after: int = Field(100_000, ge=1, description="tokens without firing after which a feature counts as dead")
    held_out: Share = Field(0.05, description="share of the prompts kept from training, for quality.csv")
    l1_weight: float = Field(
        0.0, ge=0, description="weight of the features' mean L1 norm over sqrt(d_in), beside the variance unexplained"
    )
    decoder_bias: Literal["median", "mean"] = Field(
        "median", description="where b_dec starts: the geometric median or the mean of a sample"
    )
    layers_at_once: int = Field(4, ge=1, description="SAEs trained in one pass over the activations: bounds memory")
    buffer_rows: int = Field(
        1 << 15, ge=1, description="rows per site that are shuffled at once; two such buffers are in memory"
    )
    checkpoint_seconds: float = Field(60, gt=0, description="time between checkpoints, at most a twentieth of it spent")
    seed: int | None = Field(
        None, ge=0, description="of initialisation and of the order of the rows; null: the experiment's"
    )

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on; no seed of their own is left out, so that older SAEs stay valid."""
        without = {"source", "min_variance_explained", "layers_at_once", "checkpoint_seconds"}
        return self.model_dump(exclude=without if self.seed is not None else without | {"seed"})

    def active_features(self, d_sae: int) -> int:
        """The k of top-k for a dictionary of `d_sae` features."""
        k = round(float(self.k[:-1]) / 100 * d_sae) if isinstance(self.k, str) else self.k
        return min(max(k, 1), d_sae)

    @model_validator(mode="after")
    def _k_is_a_count_or_a_percentage(self) -> "SaeConfig":
        try:
            valid = 0 < float(self.k[:-1]) <= 100 and self.k.endswith("%") if isinstance(self.k, str) else self.k >= 1
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"k must be a positive count or a percentage such as '5%', not {self.k!r}")
        return self


class DiscoveryConfig(Section):
    """How nodes are scored and how the graph is drawn between them."""

    nodes: NodeChoice = Field("features", description="what circuits are made of; heads and MLPs need no SAEs")
    method: Method = "learned-mask"
    population: Population = Field("toxic", description="prompts the circuit explains; the others give the reference")
    contrast: PromptContrast = Field(
        "toxic-safe",
        description="toxic-hard: the prompts on the safe side are hard ones only; refused-complied: toxic prompts alone"
        " (population safe: hard ones alone), those refused against those answered; model-base: the model against the"
        " one it was trained from, on the same prompts",
    )
    base: str | None = Field(
        None, description="contrast model-base: that model, a folder or a model id; null: itself without its adapter"
    )
    reference: ReferenceChoice | None = Field(
        None, description="what ablated nodes are set to; null: the mean of the other population"
    )
    aggregation: Literal["mean", "max", "last"] = Field(
        "max", description="correlation: feature values over the sequence"
    )
    threshold: float = Field(0.1, ge=0, description="correlation: smallest |r| of a node")
    top_per_layer: int | None = Field(None, ge=1, description="correlation: take the strongest n per layer instead")
    permutations: int = Field(500, ge=1, description="correlation: permutations of the labels that p-values come from")
    min_firing: int = Field(5, ge=1, description="correlation: features that fire on fewer prompts are not tested")
    ig_steps: int = Field(10, ge=1, description="integrated-gradients: points per path from reference to clean")
    exact_nodes: int = Field(300, ge=1, description="exact: how many nodes, by attribution, are measured and ranked")
    mask_steps: int = Field(240, ge=1, description="learned-mask: steps of gradient descent")
    mask_prompts: int = Field(10, ge=1, description="learned-mask: prompts per step")
    mask_price: float = Field(2e-3, gt=0, description="learned-mask: price per node, in squares of F(M) - F(0)")
    mask_last_price: float = Field(1e-2, gt=0, description="learned-mask: the price to which it rises at last")
    mask_seed: int = Field(0, ge=0, description="learned-mask: which prompts each step draws")
    edges: EdgeKind = Field("attribution", description="what an edge between neighbouring layers is drawn by")
    edge_share: Share = Field(0.01, description="attribution: smallest edge, as a share of the circuit's largest")
    edge_threshold: float = Field(0.5, ge=0, le=1, description="correlation: smallest |r| of an edge")
    edges_per_node: int = Field(5, ge=1, description="at most this many edges into a node")
    edge_tokens: int = Field(
        2048, ge=1, description="attribution: tokens times nodes that go through a layer's Jacobian at once"
    )
    drop_dead_ends: bool = Field(False, description="leave out nodes from which no edges lead to the last layer")
    halves: bool = Field(False, description="also discover on two halves of the prompts: do they agree?")
    audit_nodes: int = Field(30, ge=2, description="audit: strongest nodes, and as many random ones, measured exactly")
    audit_prompts: int = Field(50, ge=1, description="audit: at most this many discovery prompts")

    @model_validator(mode="after")
    def _components_have_neither_feature_values_nor_edges(self) -> "DiscoveryConfig":
        if self.nodes != "features" and self.method in ("correlation", "magnitude"):
            raise ValueError(f"method {self.method!r} needs nodes 'features', not {self.nodes!r}")
        if self.nodes != "features" and self.drop_dead_ends:
            raise ValueError(f"nodes {self.nodes!r} have no edges, so that all would be dead ends")
        return self

    @model_validator(mode="after")
    def _halves_are_of_runs(self) -> "DiscoveryConfig":
        if self.halves and self.method in ("correlation", "magnitude"):
            raise ValueError(f"method {self.method!r} runs no prompts that could be halved: leave discovery.halves out")
        return self

    @model_validator(mode="after")
    def _pairs_are_toxic_and_safe(self) -> "DiscoveryConfig":
        if self.contrast != "toxic-safe" and self.reference == "paired":
            raise ValueError(f"contrast {self.contrast!r} has no pairs: reference 'paired' goes with toxic-safe")
        return self

    @model_validator(mode="after")
    def _some_contrasts_have_references_of_their_own(self) -> "DiscoveryConfig":
        own = _OWN_REFERENCES.get(self.contrast)
        if self.reference is not None and self.reference != own and (own or self.reference in _OWN_REFERENCES.values()):
            raise ValueError(f"contrast {self.contrast!r} does not go with reference {self.reference!r}")
        return self

    @model_validator(mode="after")
    def _a_base_is_run(self) -> "DiscoveryConfig":
        if self.contrast == "model-base" and self.method in ("correlation", "magnitude"):
            raise ValueError(f"method {self.method!r} looks at one model alone: contrast 'model-base' needs another")
        if self.contrast != "model-base" and self.base is not None:
            raise ValueError(f"contrast {self.contrast!r} has no base model: leave discovery.base out")
        return self

    @property
    def explains_positives(self) -> bool:
        """Whether the prompts explained are those of the discovery prompts whose label is true."""
        return self.population == "toxic" or self.contrast == "refused-complied"

    def identity(self) -> dict[str, Any]:
        """What a circuit depends on; what nearly all have in common is left out, so that older circuits stay valid."""
        usual = {"contrast": self.contrast == "toxic-safe", "halves": not self.halves, "base": self.base is None}
        return self.model_dump(exclude={name for name, is_usual in usual.items() if is_usual})

    @property
    def name_of_prompts(self) -> str:
        """What is added to the names of artifacts that are not about toxic prompts against safe ones."""
        contrast = "" if self.contrast == "toxic-safe" else f"-{self.contrast}"
        return f"{'' if self.population == 'toxic' else f'-{self.population}'}{contrast}"

    @property
    def reference_choice(self) -> ReferenceChoice:
        """The reference by name."""
        usual = "safe-mean" if self.population == "toxic" else "toxic-mean"
        return self.reference or _OWN_REFERENCES.get(self.contrast, usual)


class EvaluationConfig(Section):
    """How circuits are proved."""

    error_mode: ErrorMode = "node"
    sizes: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    random_draws: int = Field(20, ge=1, description="random circuits per size, matched per layer and firing rate")
    p_value_draws: int = Field(99, ge=1, description="random circuits of the reported size, for its p-value")
    target_faithfulness: float = Field(
        0.8, description="the smallest circuit that reaches it on the discovery split is reported"
    )
    min_denominator: float = Field(
        0.5, gt=0, description="below this |F(M) - F(0)| ratios are not measurable and are null"
    )
    replies: int = Field(20, ge=0, description="test prompts that are answered under the ablation, at a few sizes")
    reply_tokens: int = Field(16, ge=1, description="length of those replies, which are judged")


class ComparisonConfig(Section):
    """How the circuits of categories are compared: a protocol of its own, with few sizes and draws."""

    size: int = Field(200, ge=1, description="nodes of each circuit; the overlap depends on it")
    shuffles: int = Field(5, ge=0, description="shuffled pools of two categories, as a yardstick")
    edges: int = Field(500, ge=0, description="strongest edges of each circuit, whose overlap is measured as well")
    replies: int = Field(20, ge=0, description="test prompts per category that are answered with nodes ablated")
    reply_tokens: int = Field(16, ge=1, description="length of those replies, which are judged")


class Experiment(Section):
    """Everything that a run depends on. Equal experiments on equal data give equal artifacts."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    seed: int = 0
    model: ModelConfig
    prompts: PromptsConfig = PromptsConfig()  # pyright: ignore[reportCallIssue]
    activations: ActivationsConfig
    corpus: CorpusConfig = CorpusConfig()  # pyright: ignore[reportCallIssue]
    saes: SaeConfig = SaeConfig()  # pyright: ignore[reportCallIssue]
    discovery: DiscoveryConfig = DiscoveryConfig()  # pyright: ignore[reportCallIssue]
    evaluation: EvaluationConfig
    comparison: ComparisonConfig = ComparisonConfig()  # pyright: ignore[reportCallIssue]
    patching: PatchingConfig = PatchingConfig()  # pyright: ignore[reportCallIssue]
    steering: SteeringConfig = SteeringConfig()  # pyright: ignore[reportCallIssue]
    repair: RepairConfig = RepairConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _there_is_a_base(self) -> "Experiment":
        if self.discovery.contrast == "model-base" and self.base_model == self.model:
            raise ValueError("contrast 'model-base': the model has no adapter to leave out; give discovery.base")
        return self

    @property
    def base_model(self) -> ModelConfig:
        """The model that `model` was trained from, read in the same template."""
        other = {"source": self.discovery.base, "revision": None} if self.discovery.base else {}
        return self.model.model_copy(update={"adapter": None, **other})

    @property
    def sae_seed(self) -> int:
        """What SAEs are trained from; which rows are held out is up to `seed`."""
        return self.seed if self.saes.seed is None else self.saes.seed
