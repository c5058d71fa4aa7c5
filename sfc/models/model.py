"""A loaded model: a TransformerLens bridge with its tokenizer and its template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.data.render import TokenizedPrompt, tokenize_prompts


def n_positions(config: Any) -> int | None:
    """The positions that a Hugging Face configuration speaks of; None where the architecture sets no limit."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


def is_finite(logits: Float[Tensor, "*rows vocab"]) -> Bool[Tensor, ""]:
    """Whether every row can be scored, on the device of the logits: some tokens may be ruled out by -inf, not all."""
    return logits.amax(-1).isfinite().all()


def not_finite(what: str, dtype: torch.dtype) -> UserError:
    """The error that says which numbers are not finite, and what to do about it."""
    if dtype == torch.float16:
        return UserError(f"{what} are not finite in float16: --set model.dtype=float32 or bfloat16")
    return UserError(f"{what} are not finite: its weights or what was changed in it are at fault")


@dataclass(frozen=True)
class Model:
    """A language model ready to be run and looked into."""

    bridge: TransformerBridge
    tokenizer: Any
    config: ModelConfig
    unusable: dict[str, str] = field(default_factory=dict)
    """sites whose hook is there but does not do what it should, and why (see `sfc.models.bridging`)"""

    @property
    def hf(self) -> Any:
        """The Hugging Face model; the bridge's hooks live inside it."""
        return self.bridge.original_model

    @cached_property
    def hooks(self) -> Mapping[str, torch.nn.Module]:
        """The hook points by name. The bridge lists them again each time it is asked: milliseconds that add up."""
        return self.bridge.hook_dict

    @property
    def architecture(self) -> str:
        """The class of the model, such as `LlamaForCausalLM`."""
        return type(self.hf).__name__

    @property
    def n_positions(self) -> int | None:
        """The most tokens of a prompt and its reply; None where the architecture sets no limit."""
        return n_positions(self.hf.config)

    @property
    def n_layers(self) -> int:
        return self.bridge.cfg.n_layers

    @property
    def is_parallel(self) -> bool:
        """Whether attention and MLP of a block both read the stream before it, so that neither hears the other."""
        return bool(getattr(self.bridge.cfg, "parallel_attn_mlp", False))

    @property
    def d_model(self) -> int:
        return self.bridge.cfg.d_model

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    def tokenize(self, texts: Sequence[str], reply: str = "") -> list[TokenizedPrompt]:
        """Render prompts in this model's template, each with the start of a reply, and tokenize them, with roles."""
        config = self.config
        return tokenize_prompts(
            self.tokenizer, list(texts), config.template, config.system_prompt, reply, config.template_arguments
        )

    def check_room(self, tokens: int) -> None:
        """Raise a `UserError` if a prompt and its reply of so many tokens have no room in the model's positions."""
        if self.n_positions is not None and tokens > self.n_positions:
            raise UserError(
                f"{self.config.source!r} has {self.n_positions:,} positions, a prompt with its reply needs {tokens:,}:"
                " lower prompts.max_tokens or the section's reply_tokens, or leave the prompt out"
            )

    def width(self, site: str) -> int:
        """Dimensions of the activation at a site; the heads' outputs (`hook_z`) count side by side."""
        config = self.bridge.cfg
        return config.n_heads * config.d_head if site.endswith("hook_z") else config.d_model

    def check_sites(self, sites: Sequence[str]) -> None:
        """Raise a `UserError` if the model has no such hook point, or one that cannot be used."""
        for site in sites:
            if site in self.unusable:
                raise UserError(
                    f"{self.architecture} cannot be used at the site {site!r}: {self.unusable[site]}; choose another"
                    " activations.kind"
                )
            if site not in self.hooks:
                raise UserError(
                    f"the model has no site {site!r}: it has layers 0 to {self.n_layers - 1}"
                    " (--set activations.layers=[…], activations.kind=resid_post)"
                )
