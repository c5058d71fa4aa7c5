"""The architectures of sparse autoencoders (SAEs) by name, and `cfg.json`, which says what a dictionary is.

Dictionaries are kept in SAELens' format. An architecture says which tensors its weights file holds, and how they become
a `Dictionary`. Whoever registers another one in `ARCHITECTURES` can use its dictionaries like those below. Nothing here
imports torch before weights are read.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sfc.core.artifacts import read_model
from sfc.core.errors import UserError
from sfc.core.registry import Registry
from sfc.core.sites import site_named

if TYPE_CHECKING:
    from torch import Tensor

    from sfc.saes.dictionary import Dictionary

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

MATRICES = ("W_enc", "W_dec")
"""the weights that may be kept in half precision; products with them are in that of the activation"""

# SAELens itself does nothing at inference for the second and third: training folds them into the weights.
Normalisation = Literal[
    "none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm"
]  # fmt: skip
Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, "Tensor"]


class Metadata(BaseModel):
    """Where a dictionary comes from; whatever else is said of it is kept."""

    model_config = ConfigDict(extra="allow")

    hook_name: str
    """the site it was trained at, or another name of it (see `site_named`)"""


class DictionaryConfig(BaseModel):
    """What `cfg.json` says, in the form of SAELens 6 whatever version wrote it; keys that are not used are kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    architecture: str
    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1)
    apply_b_dec_to_input: bool = True
    normalize_activations: Normalisation = "none"
    reshape_activations: Literal["none", "hook_z"] = "none"
    """`hook_z`: heads are put side by side before they are encoded, as they are here in any case"""
    metadata: Metadata

    @property
    def site(self) -> str:
        return site_named(self.metadata.hook_name)

    @model_validator(mode="after")
    def _heads_are_read_where_there_are_some(self) -> "DictionaryConfig":
        if self.reshape_activations == "hook_z" and not self.site.endswith("hook_z"):
            raise ValueError(f"reshape_activations is 'hook_z', but the site is {self.site}")
        return self

    @property
    def reads(self) -> str:
        """The site whose activation is encoded: the same, but for transcoders."""
        return self.site

    @model_validator(mode="before")
    @classmethod
    def _as_saelens_6_has_it(cls, values: Any) -> Any:
        """Configurations of earlier versions, which are recognised by the version that they name or lack."""
        if not isinstance(values, dict):
            raise ValueError("this is not the configuration of a SAELens dictionary")
        metadata = values.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        major = str(values.get("sae_lens_version") or metadata.get("sae_lens_version")).partition(".")[0]
        if major.isdecimal() and int(major) >= 6:
            return {**values, "metadata": metadata}
        site = values.get("hook_name", values.get("hook_point"))
        upgraded = {
            "architecture": "standard",
            "reshape_activations": "hook_z" if "hook_z" in str(site) else "none",
            **values,
            "metadata": {} if site is None else {"hook_name": site},
        }
        activation, arguments = _activation(values), values.get("activation_fn_kwargs")
        if activation == "topk" and isinstance(arguments, dict) and arguments.get("k") is not None:
            upgraded |= {"architecture": "topk", "k": arguments["k"]}
        normalisation = values.get("normalize_activations")
        if normalisation is None or isinstance(normalisation, bool):
            upgraded["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
        return upgraded


def _activation(values: Mapping[str, Any]) -> Any:
    """The activation function that a configuration names, as versions of SAELens before 6 do."""
    return values.get("activation_fn", values.get("activation_fn_str"))


@dataclass(frozen=True)
class Architecture:
    """A kind of SAE: what its files must say and hold, and what they become."""

    name: str
    """`architecture` in `cfg.json`"""
    shapes: Callable[[Any], Shapes]
    """from the configuration, the shape of every tensor in the weights file"""
    build: Callable[[Any, Weights], "Dictionary"]
    """from the configuration and the weights, in float32, the dictionary of unnormalised activations"""
    config: type[DictionaryConfig] = DictionaryConfig
    activations: Collection[str] = ("relu",)
    """the activation functions that its configuration may name, if it names one"""
    copies: int = 1
    """how often its tensors are there once it is built"""


ARCHITECTURES = Registry[Architecture]("SAE architecture")
_UNFINISHED = "it is a checkpoint of training: save_inference_model of SAELens writes the JumpReLU SAE that it becomes"
_REFUSED = {
    "temporal": "what it encodes of a token depends on the tokens before it, and here features are functions of one"
    " activation",
    "batchtopk": _UNFINISHED,
    "matryoshka_batchtopk": _UNFINISHED,
}
"""why architectures of SAELens' own are not among them"""


def read_config(folder: Path) -> DictionaryConfig:
    """The configuration of the dictionary in `folder`, with the keys of its architecture.

    Raises:
        UserError: the file is missing or damaged, or describes what cannot be used here.
    """
    path = folder / CONFIG_FILE
    general = read_model(path, DictionaryConfig)
    if general.architecture in _REFUSED:
        raise UserError(f"{path}: a {general.architecture} dictionary cannot be used: {_REFUSED[general.architecture]}")
    try:
        architecture = ARCHITECTURES[general.architecture]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    activation = _activation(general.model_extra or {})
    if activation is not None and activation not in architecture.activations:
        raise UserError(
            f"{path}: a {architecture.name} dictionary with the activation function {activation!r} is not understood;"
            f" known: {', '.join(architecture.activations)}"
        )
    return read_model(path, architecture.config)


def memory_of(config: DictionaryConfig, dtype: str) -> int:
    """Bytes that a dictionary takes once it is loaded: matrices in this precision, the rest in float32."""
    architecture = ARCHITECTURES[config.architecture]
    of_matrices = 4 if dtype == "float32" else 2
    shapes = architecture.shapes(config).items()
    return architecture.copies * sum(prod(shape) * (of_matrices if name in MATRICES else 4) for name, shape in shapes)


class _TopKConfig(DictionaryConfig):
    k: int = Field(ge=1)
    rescale_acts_by_decoder_norm: bool = False

    @model_validator(mode="after")
    def _there_are_k_features(self) -> "_TopKConfig":
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, but there are only {self.d_sae} features")
        return self


class _MatchingPursuitConfig(DictionaryConfig):
    residual_threshold: float = 1e-2
    max_iterations: int | None = Field(None, ge=1)
    stop_on_duplicate_support: bool = True


def _shapes(*vectors: str) -> Callable[[DictionaryConfig], Shapes]:
    """The tensors of an SAE whose encoder has, beside its matrix, these vectors with an element for each feature."""

    def shapes(config: DictionaryConfig) -> Shapes:
        matrices = {"W_enc": (config.d_in, config.d_sae), "W_dec": (config.d_sae, config.d_in), "b_dec": (config.d_in,)}
        return matrices | dict.fromkeys(vectors, (config.d_sae,))

    return shapes


def _top_k(config: _TopKConfig, weights: Weights) -> "Dictionary":
    from sfc.saes.dictionary import TopKDictionary

    if config.rescale_acts_by_decoder_norm:  # features are then in units of decoder rows of length one
        norm = weights["W_dec"].norm(dim=1).clamp(min=float(np.finfo(np.float32).tiny))
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norm, weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    return TopKDictionary(weights, k=config.k, site=config.site, apply_b_dec_to_input=config.apply_b_dec_to_input)


def _abs_top_k(config: _TopKConfig, weights: Weights) -> "Dictionary":
    """The k features of largest magnitude, of either sign (AbsTopK), are the k largest of twice as many that have none.

    Feature i of the doubled dictionary is feature i where it is positive, and feature d_sae + i is its opposite.
    """
    return _top_k(
        config,
        {
            "W_enc": _with_opposite(weights["W_enc"], 1),
            "b_enc": _with_opposite(weights["b_enc"], 0),
            "W_dec": _with_opposite(weights["W_dec"], 0),
            "b_dec": weights["b_dec"],
        },
    )


def _with_opposite(weight: "Tensor", dimension: int) -> "Tensor":
    import torch

    return torch.cat([weight, -weight], dim=dimension)


def _matching_pursuit(config: _MatchingPursuitConfig, weights: Weights) -> "Dictionary":
    from sfc.saes.dictionary import MatchingPursuitDictionary

    if not config.apply_b_dec_to_input:  # what is not subtracted is not added either
        weights["b_dec"] = weights["b_dec"].new_zeros(config.d_in)
    return MatchingPursuitDictionary(
        weights,
        site=config.site,
        residual_threshold=config.residual_threshold,
        steps=config.max_iterations or config.d_in,
        stop_on_repetition=config.stop_on_duplicate_support,
    )


def _tied_shapes(config: DictionaryConfig) -> Shapes:
    return {"W_dec": (config.d_sae, config.d_in), "b_dec": (config.d_in,)}


def _jumprelu(config: DictionaryConfig, weights: Weights) -> "Dictionary":
    from sfc.saes.dictionary import JumpReLUDictionary

    return JumpReLUDictionary(weights, site=config.site, apply_b_dec_to_input=config.apply_b_dec_to_input)


def _standard(config: DictionaryConfig, weights: Weights) -> "Dictionary":
    """`relu(x @ W_enc + b_enc)`: all thresholds are 0."""
    return _jumprelu(config, {**weights, "threshold": weights["b_enc"].new_zeros(config.d_sae)})


def _gated(config: DictionaryConfig, weights: Weights) -> "Dictionary":
    """A gated SAE is a JumpReLU SAE, since gate and magnitude share an encoder.

    With `pre = x @ W_enc`, its features are `relu(exp(r_mag) pre + b_mag)` where `pre + b_gate > 0`. Scaled by
    exp(r_mag) and moved by b_mag, the gate is `magnitude > b_mag - exp(r_mag) b_gate` (Rajamanoharan et al. 2024,
    Improving Dictionary Learning with Gated Sparse Autoencoders).
    """
    gain = weights["r_mag"].exp()
    threshold = weights["b_mag"] - gain * weights["b_gate"]
    encoder = {"W_enc": weights["W_enc"] * gain, "b_enc": weights["b_mag"], "threshold": threshold}
    return _jumprelu(config, {**encoder, "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]})


for architecture in (
    Architecture("topk", _shapes("b_enc"), _top_k, _TopKConfig, ("topk", "relu")),
    Architecture("abstopk", _shapes("b_enc"), _abs_top_k, _TopKConfig, copies=2),
    Architecture("jumprelu", _shapes("b_enc", "threshold"), _jumprelu, activations=("jumprelu", "relu")),
    Architecture("standard", _shapes("b_enc"), _standard),
    Architecture("gated", _shapes("b_gate", "b_mag", "r_mag"), _gated),
    Architecture("matching_pursuit", _tied_shapes, _matching_pursuit, _MatchingPursuitConfig),
):
    ARCHITECTURES.register(architecture)
