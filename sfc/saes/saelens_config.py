"""SAELens' `cfg.json`: read, brought to the form of SAELens 6, and checked. No torch here."""

from pathlib import Path
from typing import Any

from sfc.artifacts import read_json
from sfc.errors import UserError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

_SUPPORTED = {
    "architecture": ("topk", "jumprelu", "standard", "gated"),
    # SAELens itself does nothing at inference for the second and third: training folds them into the weights.
    "normalize_activations": (
        "none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm"
    ),
    "reshape_activations": ("none",),
}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the dictionary in `folder`, in the form of SAELens 6 whatever version wrote it.

    Keys: architecture, d_in, d_sae, normalize_activations, apply_b_dec_to_input, metadata with hook_name, and for
    top-k dictionaries k and rescale_acts_by_decoder_norm.

    Raises:
        UserError: the file is missing or damaged, or describes what cannot be used here.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not the configuration of a SAELens dictionary")
    config = _upgraded(config)
    for key, supported in _SUPPORTED.items():
        if config.setdefault(key, "none") not in supported:
            raise UserError(f"{path}: {key} is {config[key]!r}; supported: {', '.join(supported)}")
    if not isinstance(config["metadata"].get("hook_name"), str):
        raise UserError(f"{path}: metadata.hook_name, the site of the dictionary, is missing; add it")
    counts = ("d_in", "d_sae", "k") if config["architecture"] == "topk" else ("d_in", "d_sae")
    for key in counts:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"{path}: {key} must be a positive whole number, not {config.get(key)!r}")
    for key, default in {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}.items():
        if type(config.setdefault(key, default)) is not bool:
            raise UserError(f"{path}: {key} must be true or false, not {config[key]!r}")
    if config["architecture"] == "topk" and config["k"] > config["d_sae"]:
        raise UserError(f"{path}: k is {config['k']}, but there are only {config['d_sae']} features")
    return config


def _upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of before SAELens 6, recognised by its version, as SAELens 6 would write it."""
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    major = str(config.get("sae_lens_version") or metadata.get("sae_lens_version")).partition(".")[0]
    if major.isdecimal() and int(major) >= 6:
        return {**config, "metadata": metadata}
    hook_name = config.get("hook_name", config.get("hook_point"))
    activation = config.get("activation_fn", config.get("activation_fn_str"))
    arguments = config.get("activation_fn_kwargs")
    upgraded = {
        **config,
        "architecture": config.get("architecture", "standard"),
        "reshape_activations": config.get("reshape_activations", "hook_z" if "hook_z" in str(hook_name) else "none"),
        "metadata": {"hook_name": hook_name},
    }
    if activation == "topk" and isinstance(arguments, dict) and arguments.get("k") is not None:
        upgraded |= {"architecture": "topk", "k": arguments["k"]}
    normalisation = config.get("normalize_activations")
    if normalisation is None or isinstance(normalisation, bool):
        upgraded["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    return upgraded
