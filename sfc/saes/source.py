"""SAELens' `cfg.json`: read, brought to the form of SAELens 6, and checked. No torch here.

Dictionaries that are used in place of trained ones: where `saes.source` says they are. No torch here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfc.core.artifacts import hash_of_file, read_json
from sfc.core.config import SaeConfig
from sfc.core.errors import UserError
from sfc.core.sites import layer_of

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


def saes_identity(config: SaeConfig, sites: Sequence[str]) -> dict[str, Any]:
    """A JSON value that changes when the dictionaries that `config` describes change.

    Those in a folder count by content, wherever it lies. Of a pretrained release only the name is known beforehand.

    Raises:
        UserError: as `local_dictionaries`.
    """
    if config.source is None:
        return config.identity()
    folders = local_dictionaries(config.source, sites)
    files = {site: [hash_of_file(folders[site] / name) for name in (CONFIG_FILE, WEIGHTS_FILE)] for site in folders}
    return {"content": files or config.source, **config.model_dump(include={"min_variance_explained", "held_out"})}


def local_dictionaries(source: str, sites: Sequence[str]) -> dict[str, Path]:
    """The folder of each site's dictionary; empty where `source` is no folder but may be a pretrained `release/sae_id`.

    A folder holds a dictionary itself, or one subfolder per site, named by it.

    Raises:
        UserError: there is no dictionary for a site, or it was made for another one.
    """
    bases = {site: Path(for_layer(source, site)).expanduser() for site in sites}
    if not any(base.is_dir() for base in bases.values()):
        first, _, rest = source.partition("/")
        if not rest or first in ("", ".", "..", "~") or Path(first).is_dir():
            raise UserError(f"saes.source: no folder {source}, and a pretrained dictionary is named release/sae_id")
        return {}
    return {site: _dictionary_folder(base, site) for site, base in bases.items()}


def for_layer(source: str, site: str) -> str:
    """`source` with the layer of the site in place of `{layer}`."""
    return source.replace("{layer}", str(layer_of(site)))


def check_site(folder: Path, site: str) -> None:
    """Refuse the dictionary in `folder` unless it was made for `site`.

    Raises:
        UserError: it was not, or its configuration cannot be used.
    """
    made_for = read_config(folder)["metadata"]["hook_name"]
    if made_for != site:
        raise UserError(
            f"the dictionary in {folder} is one of {made_for}, not of {site}; choose sites with --set"
            " activations.layers=[…] and activations.kind=…, or write {layer} in saes.source"
        )


def _dictionary_folder(base: Path, site: str) -> Path:
    for folder in (base / site, base):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            check_site(folder, site)
            return folder
    raise UserError(
        f"saes.source: no dictionary for {site}: {base} and {base / site} lack {CONFIG_FILE} and {WEIGHTS_FILE}"
    )
