"""Transcoders as SAELens saves them: sparse replacements of an MLP, encoded from its input, decoded to its output.

With a skip connection they are affine beside their features: `x_out = sum_i f_i(x_in) d_i + b + W_skip x_in` (Paulo,
Shabalin and Belrose 2025, *Transcoders Beat Sparse Autoencoders for Interpretability*). Nothing here imports torch
before weights are read.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from sfc.core.sites import MLP_INPUTS, kind_of, layer_of, site_of
from sfc.saes.architectures import ARCHITECTURES, Architecture, DictionaryConfig, Shapes, Weights

if TYPE_CHECKING:
    from sfc.saes.dictionary import Dictionary


class TranscoderConfig(DictionaryConfig):
    """What `cfg.json` of a transcoder says: its `hook_name` is encoded, its `hook_name_out` decoded."""

    d_out: int = Field(ge=1)

    @property
    def site(self) -> str:
        return str(self._told("hook_name_out"))

    @property
    def reads(self) -> str:
        """The site of our own name: SAELens has one hook, `hook_mlp_in`, for two places.

        In TransformerLens it is the residual stream before the norm; for dictionaries that were trained on Hugging Face
        models (Gemma Scope 2), what leaves the norm.
        """
        name = self.metadata.hook_name
        block, _, hook = name.rpartition(".")
        if hook != "hook_mlp_in":
            return name
        after_norm = str(self._told("hf_hook_name")).endswith("layernorm.output")
        return f"{block}.mlp.hook_in" if after_norm else f"{block}.hook_resid_mid"

    def _told(self, name: str) -> Any:
        return (self.metadata.model_extra or {}).get(name)

    @model_validator(mode="after")
    def _reads_what_the_mlp_reads(self) -> "TranscoderConfig":
        if self.apply_b_dec_to_input or self.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError("a transcoder that centres or normalises what it reads is not understood")
        if self._told("hook_name_out") is None:
            raise ValueError("metadata.hook_name_out is missing: it says which site the transcoder writes")
        layer = layer_of(self.site)
        inputs = [site_of(kind, layer) for kind in MLP_INPUTS]
        if kind_of(self.site) != "mlp_out" or self.reads not in inputs:
            raise ValueError(
                f"it reads {self.metadata.hook_name} and writes {self.site}; transcoders are used that write the output"
                f" of an MLP (hook_mlp_out) and read its input ({', '.join(inputs)})"
            )
        return self


def _shapes(*further: str) -> Callable[[TranscoderConfig], Shapes]:
    def shapes(config: TranscoderConfig) -> Shapes:
        d_in, d_sae, d_out = config.d_in, config.d_sae, config.d_out
        optional = {"threshold": (d_sae,), "W_skip": (d_out, d_in)}
        return {
            "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,),
            **{name: optional[name] for name in further},
        }  # fmt: skip

    return shapes


def _build(config: TranscoderConfig, weights: Weights) -> "Dictionary":
    """Without thresholds, `relu(x @ W_enc + b_enc)`: all are 0."""
    from sfc.saes.dictionary import Transcoder

    thresholds = weights.get("threshold", weights["b_enc"].new_zeros(config.d_sae))
    return Transcoder({**weights, "threshold": thresholds}, reads=config.reads, writes=config.site)


for name, further in {
    "transcoder": (),
    "skip_transcoder": ("W_skip",),
    "jumprelu_transcoder": ("threshold",),
    "jumprelu_skip_transcoder": ("threshold", "W_skip"),
}.items():
    activations = ("relu", "jumprelu") if "threshold" in further else ("relu",)
    ARCHITECTURES.register(Architecture(name, _shapes(*further), _build, TranscoderConfig, activations))
