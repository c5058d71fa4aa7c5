"""A run as a plan knows it: its prompts as tokens, and the sizes of its model and dictionaries; no weights.

What `Session` is to a study that measures, a `Sketch` is to one that says what measuring would take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress

import pandas as pd
import torch

from sfc.core.sites import in_order, layer_of
from sfc.core.work import Amounts, Work
from sfc.data.render import TokenizedPrompt
from sfc.models.loading import Outline, load_outline
from sfc.models.running import layer_before
from sfc.models.work import Sizes, block_speed, saved_bytes, sizes_of
from sfc.run import Run
from sfc.saes.work import Width, dictionary_speed, training_speed, width_of
from sfc.studies.collect.fill import Corpus, short_enough, tokenizing


@dataclass
class Known:
    """What is known of a model from its configuration."""

    outline: Outline
    sizes: Sizes
    saved: int
    """bytes that a block keeps of a token for the backward pass"""
    tokens: dict[str, TokenizedPrompt] = field(default_factory=dict)
    """prompts that were tokenized, by their texts"""


class Sketch:
    """A run with what its work depends on, each thing looked up when it is first asked for."""

    def __init__(self, run: Run, device: torch.device, known: dict[str, Known] | None = None) -> None:
        self.run, self.device = run, device
        self._known = {} if known is None else known

    def for_run(self, run: Run) -> "Sketch":
        """The sketch of another run, with what is known of models already."""
        return self if run is self.run else Sketch(run, self.device, self._known)

    @cached_property
    def known(self) -> Known:
        """Its model.

        Raises:
            UserError: its configuration or its tokenizer cannot be read.
        """
        config = self.run.experiment.model
        key = config.model_dump_json(exclude={"adapter"})
        if key not in self._known:
            outline = load_outline(config)
            self._known[key] = Known(outline, sizes_of(outline, config.dtype), saved_bytes(outline, config.dtype))
        return self._known[key]

    @property
    def sizes(self) -> Sizes:
        """Those of its model."""
        return self.known.sizes

    @cached_property
    def sites(self) -> list[str]:
        """The sites of its dictionaries."""
        return in_order(self.run.experiment.activations.sites)

    @cached_property
    def widths(self) -> dict[str, Width]:
        """The sizes of its dictionaries by site.

        Raises:
            UserError: `saes.source` names none, or their configuration is damaged.
        """
        saes, folder = (self.run.learned_by or self.run).experiment.saes, self.run.saes.folder
        return {site: width_of(saes, folder, site, self.known.outline.width(site)) for site in self.sites}

    @property
    def dictionaries(self) -> int:
        """Bytes of all dictionaries as they are used."""
        itemsize = getattr(torch, self.run.experiment.saes.dtype).itemsize
        return sum(width.weights(itemsize) for width in self.widths.values())

    @property
    def first_block(self) -> int:
        """Blocks that runs from the cached residual stream leave out."""
        return layer_before(self.sites[0]) + 1

    @property
    def suffix(self) -> int:
        """Blocks that such runs go through."""
        return self.sizes.n_layers - self.first_block

    @property
    def up_to_last(self) -> int:
        """Blocks up to the last site."""
        return layer_of(self.sites[-1]) + 1

    def tokens(self, texts: Sequence[str]) -> list[TokenizedPrompt]:
        """Texts in the model's template."""
        known = self.known.tokens
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            tokenize = tokenizing(self.known.outline.tokenizer, self.run.experiment.model)
            known.update(zip(new, tokenize(new), strict=True))
        return [known[text] for text in texts]

    def short_enough(self, frame: pd.DataFrame) -> Corpus:
        """The prompts of a table that are short enough; how many are not is left for the command to say.

        Raises:
            UserError: none is.
        """
        tokenized, most = self.tokens(frame["prompt"].tolist()), self.run.experiment.prompts.max_tokens
        fits = [len(prompt.ids) <= most for prompt in tokenized]
        if not any(fits):
            return short_enough(self.tokens, frame, most)
        return Corpus(frame[fits].reset_index(drop=True), list(compress(tokenized, fits)))

    @cached_property
    def circuit_prompts(self) -> list[TokenizedPrompt]:
        """The discovery and reference prompts, as they are collected.

        Raises:
            UserError: none is short enough.
        """
        frame = self.run.prompts.frame
        return self.short_enough(frame[frame["split"] != "test"]).sequences

    def in_use(self, tokens: int) -> int:
        """Bytes that a pass of a batch of so many tokens has in use at once, in one block."""
        return round(_ALIVE * tokens * self.known.saved)

    def gradients(self, tokens: int, blocks: int) -> int:
        """Bytes that a pass forward and back through so many blocks keeps of a batch of so many tokens."""
        return blocks * tokens * self.known.saved

    def encoding(self, tokens: int) -> int:
        """Bytes that the largest dictionary has in use to encode so many tokens: features, and what orders them."""
        return 3 * 4 * tokens * max(width.d_sae for width in self.widths.values())

    def loading(self) -> Work:
        """The model is loaded and compared with the plain one. On its way to a GPU it lies in main memory."""
        weights, passes = self.sizes.weights, Amounts(calls=_LOADING_PASSES * self.sizes.n_layers)
        on_its_way = 0 if self.device.type == "cpu" else weights
        return Work(LOADING, passes + Amounts(seconds=weights * _LOADING), weights, on_its_way)

    def speed(self, is_trained: bool) -> Amounts:
        """Seconds of one of everything, measured on the sketch's device.

        Args:
            is_trained: whether dictionaries are.
        """
        experiment = self.run.experiment
        largest = max(self.widths.values(), key=lambda width: width.d_in * width.d_sae)
        of_model = block_speed(
            self.known.outline, self.sizes, experiment.model.dtype, self.device, experiment.activations.batch_tokens
        )
        speed = of_model * _BRIDGED + dictionary_speed(largest, experiment.saes.dtype, self.device)
        return speed + training_speed(experiment.saes, largest, self.device) if is_trained else speed


_ALIVE = 0.5
"""of what a block keeps for the backward pass, what is there at once without one: 1.7 of 3.2 GB in one of Llama-2-7b"""
_BRIDGED = 1.12
"""what the bridge with its hooks adds to the bare blocks: a full pass over the embedded model's 270 pairs of violence
takes 8.4 to 8.9 s of one core, and 7.6 if it were its blocks alone"""
LOADING = "load the model"
_LOADING_PASSES = 10
"""of short prompts through all blocks, by which the bridge is compared with the plain model"""
_LOADING = 3e-9
"""seconds a byte of weights: 1.7 of one core for the embedded model's 0.54 GB, its adapter and all checks of weights"""
