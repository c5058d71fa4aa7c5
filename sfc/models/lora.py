"""Merge a LoRA adapter (Hu et al. 2021), in the format of the `peft` library, into the weights of a model.

Plain LoRA adds `(alpha / r) B A` to a weight matrix W [out, in], with A [r, in] and B [out, r], and is merged here.
What is more than that `peft` merges, where it is installed. Whatever neither of the two understands is refused by its
name: an adapter that is half read is another model.
"""

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfc.core.artifacts import read_json
from sfc.core.errors import UserError, one_line
from sfc.models.sources import ADAPTER_CONFIG, WEIGHTS, adapter_folder

_SAYS_NOTHING = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "target_modules", "task_type",
}  # fmt: skip
"""keys of the configuration that do not change what is merged, given the weights and r and alpha"""
_BY_PEFT = {
    "alpha_pattern", "bias", "fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
"""keys that change it as `peft` knows"""
_KEPT = ("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_NEUTRAL = (None, False, "none", {}, [])
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def merge_adapter(model: Any, name: str) -> Any:
    """Add the adapter to the weights of a Hugging Face model.

    Returns:
        The model, which is changed in place.

    Raises:
        UserError: the adapter is missing, corrupt, made for another model, or of a kind that cannot be merged.
    """
    folder = adapter_folder(name)
    config = _read_config(folder / ADAPTER_CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} is corrupt ({one_line(error)})") from None
    lacking = sorted(
        other
        for key in tensors
        for this, that in ((_A, _B), (_B, _A))
        if key.endswith(this) and (other := key.removesuffix(this) + that) not in tensors
    )
    if lacking:
        raise UserError(f"adapter {name!r} lacks {lacking[0]}: of each pair of matrices both are needed")
    unusual = _unusual(config)
    if unknown := sorted(set(unusual) - _BY_PEFT):
        raise UserError(f"adapter {name!r} cannot be merged: {unknown[0]}={unusual[unknown[0]]!r} is not supported")
    more = [*unusual, *_more_than_linear(model, tensors)]
    try:
        if more:
            return _merge_by_peft(model, name, config, tensors, more[0])
        _merge(model, config["r"], config["lora_alpha"], tensors)
        return model
    except UserError:
        raise
    except Exception as error:  # of what the weights are, or the configuration says, and of peft
        raise UserError(f"adapter {name!r} does not fit this model: {one_line(error)}") from None


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else "no JSON object"
        raise UserError(f"{path} is no LoRA adapter ({kind}): only LoRA can be merged")
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or not config[key] > 0:
            raise UserError(f"{path}: {key} must be a number above 0, not {config.get(key)!r}")
    return config


def _unusual(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says that plain LoRA has not."""
    plain_start = {"init_lora_weights": (True, False, "gaussian")}
    return {
        key: value
        for key, value in config.items()
        if key not in _SAYS_NOTHING and value not in _NEUTRAL and value not in plain_start.get(key, ())
    }


def _more_than_linear(model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Weights that are not a pair of matrices for a linear layer of the model."""
    more = []
    for key in sorted(tensors):
        name = key.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        try:
            is_linear = isinstance(model.get_submodule(name), torch.nn.Linear)
        except AttributeError:
            is_linear = True  # there is no such module, which merging says
        if not key.endswith((_A, _B)) or not is_linear:
            more.append(key)
    return more


@torch.no_grad()
def _merge(model: Any, r: int, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    embedding = model.get_input_embeddings().weight
    for key in sorted(key for key in tensors if key.endswith(_A)):
        module = key.removeprefix(_PREFIX).removesuffix(_A)
        weight = model.get_submodule(module).weight
        a, b = tensors[key].float(), tensors[key.removesuffix(_A) + _B].float()
        if a.shape != (r, weight.shape[1]) or b.shape != (weight.shape[0], r):
            raise ValueError(
                f"{module} is {list(weight.shape)}, and with r={r} not {list(b.shape)} times {list(a.shape)}"
            )
        if weight is embedding:
            raise ValueError(f"{module} is tied to the embedding, which would change with it")
        weight.add_((alpha / r * b @ a).to(weight))


def _merge_by_peft(model: Any, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], reason: str) -> Any:
    if find_spec("peft") is None:
        raise UserError(f"adapter {name!r} is more than plain LoRA ({reason}): pip install peft, which merges it")
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    settings = {key: config[key] for key in (*_KEPT, *_BY_PEFT) if config.get(key) is not None}
    with warnings.catch_warnings(action="ignore"):  # of what it puts right by itself
        wrapped = get_peft_model(model, LoraConfig(**settings))
    loaded = set_peft_model_state_dict(wrapped, dict(tensors))
    if loaded.unexpected_keys:
        raise ValueError(f"there is no place for {min(loaded.unexpected_keys)}")
    adapted = [key for key in loaded.missing_keys if "lora_" in key or "modules_to_save" in key]
    if adapted:
        raise ValueError(f"it lacks {min(adapted)}")
    return wrapped.merge_and_unload(safe_merge=True)
