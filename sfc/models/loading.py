"""Load any causal language model as a `Model`: a TransformerLens bridge with its tokenizer and its template.

A LoRA adapter (Hu et al. 2021), in the format of the `peft` library, is merged into the weights: it adds
`(alpha / r) B A` to a weight matrix W [out, in], with A [r, in] and B [out, r].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sfc.core.artifacts import read_json
from sfc.core.config import ModelConfig
from sfc.core.errors import CannotLoadModel, UserError
from sfc.core.ranks import local_rank
from sfc.data.render import TokenizedPrompt, tokenize_prompts
from sfc.models.linear import use_quick_products
from sfc.models.sources import ADAPTER_CONFIG, WEIGHTS, adapter_folder, embedded_model_folder, tiny_model_folder


def merge_adapter(model: Any, name: str) -> None:
    """Add the adapter to the weights of a Hugging Face model, in place.

    Raises:
        UserError: the adapter is missing, corrupt, or made for another model.
    """
    folder = adapter_folder(name)
    config = read_json(folder / ADAPTER_CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is corrupt ({error})") from None
    scale = config["lora_alpha"] / config["r"]
    for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        try:
            weight = model.get_submodule(module).weight
            delta = tensors[key.replace("lora_A", "lora_B")].float() @ tensors[key].float()
            with torch.no_grad():
                weight.add_((scale * delta).to(weight))
        except (AttributeError, KeyError, RuntimeError) as error:
            raise UserError(f"adapter {name!r} does not fit this model at {module!r}: {error}") from None


transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Model:
    """A language model ready to be run and looked into."""

    bridge: TransformerBridge
    tokenizer: Any
    config: ModelConfig

    @property
    def hf(self) -> Any:
        """The Hugging Face model; the bridge's hooks live inside it."""
        return self.bridge.original_model

    @cached_property
    def hooks(self) -> Mapping[str, torch.nn.Module]:
        """The hook points by name. The bridge lists them again each time it is asked: milliseconds that add up."""
        return self.bridge.hook_dict

    @property
    def n_layers(self) -> int:
        return self.bridge.cfg.n_layers

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
        return tokenize_prompts(self.tokenizer, list(texts), self.config.template, self.config.system_prompt, reply)

    def width(self, site: str) -> int:
        """Dimensions of the activation at a site; the heads' outputs (`hook_z`) count side by side."""
        config = self.bridge.cfg
        return config.n_heads * config.d_head if site.endswith("hook_z") else config.d_model

    def check_sites(self, sites: Sequence[str]) -> None:
        """Raise a `UserError` if the model has no such hook point."""
        for site in sites:
            if site not in self.hooks:
                raise UserError(
                    f"the model has no site {site!r}: it has layers 0 to {self.n_layers - 1}"
                    " (--set activations.layers=[…], activations.kind=resid_post)"
                )


class Outline(NamedTuple):
    """What can be said of a model without its weights."""

    tokenizer: Any
    n_layers: int
    d_model: int
    heads_width: int
    """of the heads' outputs side by side"""

    def width(self, site: str) -> int:
        """Dimensions of the activation at a site, as `Model.width`."""
        return self.heads_width if site.endswith("hook_z") else self.d_model


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; started by `torchrun`, each process has a GPU of its own.

    Raises:
        UserError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def load_model(config: ModelConfig, device: torch.device | str = "cpu") -> Model:
    """Load the weights, merge the adapter if one is named, and wrap the model for hooks.

    Raises:
        CannotLoadModel: the model cannot be found or read.
        UserError: its adapter cannot.
    """
    hf, tokenizer = load_weights(config)
    if config.adapter:
        merge_adapter(hf, config.adapter)
    hf.to(device)
    use_quick_products(hf)
    bridge = TransformerBridge.boot_transformers(
        hf.config._name_or_path, hf_model=hf, tokenizer=tokenizer, device=device, dtype=hf.dtype
    )
    # Last, because the bridge adds a bias to an unembedding that has none.
    bridge.original_model.requires_grad_(False).eval()
    return Model(bridge, tokenizer, config)


def load_outline(config: ModelConfig) -> Outline:
    """Load the tokenizer and the sizes, not the weights.

    Raises:
        CannotLoadModel: they cannot be found or read.
    """
    folder = _folder(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=config.revision)
        sizes = AutoConfig.from_pretrained(folder, revision=config.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(config, error) from None
    head = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    return Outline(tokenizer, sizes.num_hidden_layers, sizes.hidden_size, head * sizes.num_attention_heads)


def _folder(config: ModelConfig) -> str | Path:
    own = {"embedded": embedded_model_folder, "tiny": tiny_model_folder}
    return own[config.source]() if config.source in own else config.source


def _cannot_load(config: ModelConfig, error: Exception) -> CannotLoadModel:
    reason = str(error).strip().splitlines()[0]
    where = "the folder" if Path(config.source).exists() else "no such folder, nor a model the hub gives"
    return CannotLoadModel(f"cannot load model {config.source!r} ({where}): {reason}")


def load_weights(config: ModelConfig) -> tuple[Any, Any]:
    dtype = cast(torch.dtype, getattr(torch, config.dtype))
    folder = _folder(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=config.revision)
        model, report = cast(
            tuple[Any, dict[str, set[str]]],
            AutoModelForCausalLM.from_pretrained(
                folder, revision=config.revision, dtype=dtype, use_safetensors=True, output_loading_info=True
            ),
        )
        if report["missing_keys"]:  # they would be random
            raise ValueError(f"its files lack weights, among them {min(report['missing_keys'])}")
        return model, tokenizer
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(config, error) from None
