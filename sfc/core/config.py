"""One `Experiment` says everything a run depends on: model, prompts, sites, SAEs, discovery, evaluation.

`sfc.core.experiments` reads them. Presets are YAML files in `sfc/core/presets/`; any other YAML file with the same keys
works as well.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from sfc.core.errors import UserError
from sfc.core.options import Options, Section, Share, option
from sfc.core.sites import SiteKind, in_order, site_of


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
    template_arguments: dict[str, JsonValue] = Field(
        {}, description="variables of the chat template, such as {enable_thinking: false}"
    )
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

    kind: SiteKind | Annotated[list[SiteKind], Field(min_length=1)] = Field(
        "resid_post", description="which activations of each layer, one kind or several"
    )
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
        kinds: list[SiteKind] = self.kind if isinstance(self.kind, list) else [self.kind]
        return in_order([site_of(kind, layer) for layer in self.layers for kind in kinds])


class CorpusConfig(Section):
    """What the SAEs learn from: one source, or several that are mixed. Test prompts are never among it."""

    source: str | Annotated[list[str], Field(min_length=1)] = Field(
        "prompts",
        description="any of: prompts, the circuits' own; sampled, conversations that the model writes itself (section"
        " sample); FILE (.txt, .csv or .jsonl with a column text) or hf:NAME@COMMIT[:SPLIT], texts; chat:FILE (a column"
        " prompt, instruction or text, and perhaps reply) or chat:hf:NAME@COMMIT[:SPLIT]:COLUMN, instructions in the"
        " model's template",
    )
    replies: bool = Field(False, description="prompts and instructions without a reply get the model's greedy one")
    reply_tokens: int = Field(32, ge=1, description="at most this many tokens of each reply, sampled ones apart")
    context: int = Field(128, ge=8, description="texts: tokens per piece")
    max_tokens: int | None = Field(None, ge=1, description="read no more tokens than this of any file or data set")
    stored: Literal["auto", "always", "never"] = Field(
        "auto", description="never: run the model again for every epoch; auto: where the store would not fit the disk"
    )

    @property
    def sources(self) -> list[str]:
        """Every source that is mixed."""
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def is_prompts_alone(self) -> bool:
        """Whether the SAEs learn from the circuits' prompts as they are."""
        return self.sources == ["prompts"] and not self.replies

    def identity(self) -> dict[str, Any]:
        """What the activations depend on beside the sources: whether they are stored is not part of it."""
        return self.model_dump(exclude={"source", "stored"})

    @model_validator(mode="after")
    def _sources_differ(self) -> "CorpusConfig":
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("a source is named twice")
        return self


class SampleOptions(Options):
    """The conversations that the model writes itself, both sides, at temperature 1."""

    section = "sample"
    tokens: int = option(2_000_000, ge=1, description="write at least this many: instructions, template and replies")
    instruction_tokens: int = option(48, ge=4, description="leave out instructions that do not end within so many")
    reply_tokens: int = option(48, ge=0, description="cut replies after so many; 0: write instructions alone")
    positive_share: Share = option(
        1 / 3, description="share of conversations begun with the first words of prompts that call for the behavior"
    )
    unfiltered: bool = option(False, description="keep whatever ends: code, markup, fragments and other languages, too")
    batch: int = option(128, ge=1, description="instructions begun at once; a kill loses one such batch")

    def identity(self) -> dict[str, Any]:
        """What the conversations depend on; more of them begin with the same ones."""
        return self.model_dump(exclude={"tokens"})


Source = str | Annotated[dict[SiteKind, str], Field(min_length=1)]
"""where dictionaries come from: one source for all kinds of sites, or one for each"""


class SaeConfig(Section):
    """The top-k sparse autoencoders, one per site."""

    source: Source | None = Field(
        None,
        description="use these instead of training: embedded, those that come with the package; a folder of"
        " dictionaries (one subfolder per site, or one dictionary); or a pretrained release/sae_id; {layer} stands for"
        " the layer; or one of them for each kind of site, such as {resid_post: …, mlp_out: …}",
    )
    min_variance_explained: float = Field(
        0.5,
        le=1,
        allow_inf_nan=False,
        description="with saes.source: a dictionary that explains less of a site's variance is refused",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what dictionaries are kept in while they are used; products stay in float32"
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
    half: Literal["first", "second"] | None = Field(
        None, description="train on one of two disjoint halves of the prompts: do the same features come back?"
    )
    start: Literal["kmeans", "random"] = Field(
        "kmeans", description="where the features' directions start: centroids of a buffer of the rows, or at random"
    )
    start_rows: int = Field(
        1 << 16,
        ge=1,
        description="rows per site that the start is made of, all in memory; of more rows more features come back",
    )
    anchor_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the features' mean distance (1 - cosine) from the directions where they start: those"
        " that stay near come back more often from other seeds and other data, for more variance unexplained",
    )
    l1_weight: float = Field(
        0.0, ge=0, description="weight of the features' mean L1 norm over sqrt(d_in), beside the variance unexplained"
    )
    matryoshka: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.027, 0.111, 0.333],
        description="Bussmann et al. 2025: each of these shares of the features, the first ones, reconstructs by itself"
        " as well, so that what is general comes first, and circuits are small; []: only all of them together",
    )
    deciding_share: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="share of every batch that is of tokens after which the model begins its reply, the last ones of"
        " prompts; they are few, and what is to be explained happens there. 0: as many as there are",
    )
    decoder_bias: Literal["median", "mean"] = Field(
        "median", description="where b_dec starts: the geometric median or the mean of a sample"
    )
    finetune_steps: int = Field(
        0, ge=0, description="afterwards, train all sites together so many steps, by what the model says next"
    )
    finetune_rate: float = Field(3e-4, gt=0, description="learning rate of these steps")
    layers_at_once: int = Field(4, ge=1, description="SAEs trained in one pass over the activations: bounds memory")
    buffer_rows: int = Field(
        1 << 15, ge=1, description="rows per site that are shuffled at once; two such buffers are in memory"
    )
    checkpoint_seconds: float = Field(60, gt=0, description="time between checkpoints, at most a twentieth of it spent")
    seed: int | None = Field(
        None, ge=0, description="of initialisation and of the order of the rows; null: the experiment's"
    )

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on; what is not used is left out, so that older SAEs stay valid."""
        without = {"source", "min_variance_explained", "layers_at_once", "checkpoint_seconds"}
        without |= set() if self.finetune_steps else {"finetune_steps", "finetune_rate"}
        without |= {"dtype"} if self.dtype == "float32" else set()
        return self.model_dump(exclude=without if self.seed is not None else without | {"seed"})

    def prefixes(self, d_sae: int) -> list[int]:
        """How many features each share of `matryoshka` is, of `d_sae`; rising, and fewer than all."""
        sizes = {math.ceil(share * d_sae) for share in self.matryoshka}
        return sorted(size for size in sizes if size < d_sae)

    def active_features(self, d_sae: int) -> int:
        """The k of top-k for a dictionary of `d_sae` features.

        Raises:
            UserError: it is larger than that.
        """
        k = max(round(float(self.k[:-1]) / 100 * d_sae), 1) if isinstance(self.k, str) else self.k
        if k > d_sae:
            raise UserError(f"saes.k={k} is more than the {d_sae} features that a dictionary has; lower saes.k")
        return k

    @model_validator(mode="after")
    def _k_is_a_count_or_a_percentage(self) -> "SaeConfig":
        try:
            valid = 0 < float(self.k[:-1]) <= 100 and self.k.endswith("%") if isinstance(self.k, str) else self.k >= 1
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"k must be a positive count or a percentage such as '5%', not {self.k!r}")
        return self


class Experiment(Section):
    """Everything that a run depends on. Equal experiments on equal data give equal artifacts.

    Beside the sections below it has those that studies, behaviors and methods register (see `Options`).
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    description: str = ""
    seed: int = Field(0, ge=0)
    behavior: str = Field("refusal", description="what is explained: the name of a registered behavior")
    model: ModelConfig
    prompts: PromptsConfig = PromptsConfig()  # pyright: ignore[reportCallIssue]
    activations: ActivationsConfig
    corpus: CorpusConfig = CorpusConfig()  # pyright: ignore[reportCallIssue]
    saes: SaeConfig = SaeConfig()  # pyright: ignore[reportCallIssue]

    @property
    def sae_seed(self) -> int:
        """What SAEs are trained from; which rows are held out is up to `seed`."""
        return self.seed if self.saes.seed is None else self.saes.seed
