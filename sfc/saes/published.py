"""Dictionaries as others publish them, converted to SAELens' format by SAELens' own loaders.

They are those of a release on a hub, or lie in a folder that is laid out as in the repository it is from (see
`sfc.saes.source.LAYOUTS`). Nothing that comes with them is run. SAELens is imported when there is something to convert:
that takes seconds.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from sfc.core.artifacts import read_json, replacing, write_json
from sfc.core.errors import UserError, one_line
from sfc.saes.architectures import CONFIG_FILE, WEIGHTS_FILE, Weights
from sfc.saes.format import read_tensors
from sfc.saes.source import LAYOUTS, Layout, layout_of


def in_saelens_format(source: str, folder: Path | None, scratch: Path) -> Path:
    """The folder of a dictionary in SAELens' format.

    Args:
        source: what `saes.source` says of it: where there is no folder, a pretrained `release/sae_id`.
        folder: where it lies; itself the answer where it is in SAELens' format.
        scratch: an empty folder, for what is fetched or converted.

    Raises:
        UserError: it cannot be fetched, or SAELens cannot read it.
    """
    if folder is None:
        fetch_pretrained(source, scratch)
        return scratch
    layout = layout_of(folder)
    if layout is None or layout.loader == LAYOUTS[0].loader:
        return folder
    convert_folder(folder, layout, scratch)
    return scratch


def fetch_pretrained(name: str, target: Path) -> None:
    """Fetch the dictionary `release/sae_id` and write it into `target` in SAELens' format.

    The release is one of SAELens' list, or a hub repository `owner/name`, where `sae_id` is the path of a folder in it.
    The release's scaling factor is folded into the weights.

    Raises:
        UserError: it cannot be fetched.
    """
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading import pretrained_saes_directory as directory

    parts = name.split("/")
    owner = 1 if parts[0] in directory.get_pretrained_saes_directory() else 2
    release, sae_id = "/".join(parts[:owner]), "/".join(parts[owner:])
    if not sae_id:
        raise UserError(f"saes.source: {name} is neither a folder nor a dictionary of a release that SAELens knows")
    try:
        if owner == 2:
            folder = _fetched_folder(release, sae_id)
        else:
            repo_id, path = directory.get_repo_id_and_folder_name(release, sae_id)
            overrides = directory.get_config_overrides(release, sae_id)
            with _finding_files(loaders, loaders.hf_hub_download):
                load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loaders.get_conversion_loader_name(release)]
                config, weights = _loaded(load, repo_id, path, overrides)
            return _write(config, weights, directory.get_norm_scaling_factor(release, sae_id), target)
    except UserError:
        raise
    except Exception as error:  # whatever its many loaders and the network raise, the user has to know
        raise UserError(f"saes.source: SAELens cannot fetch {sae_id!r} of {release!r} ({one_line(error)})") from error
    layout = layout_of(folder)
    if layout is None:
        raise UserError(f"saes.source: {release} has no dictionary {sae_id!r} in a layout that is known")
    return convert_folder(folder, layout, target)


def convert_folder(folder: Path, layout: Layout, target: Path) -> None:
    """Write the dictionary that lies in `folder`, laid out as in its repository, into `target` in SAELens' format.

    Raises:
        UserError: SAELens cannot read it, or it is not an SAE.
    """
    from sae_lens.loading import pretrained_sae_loaders as loaders

    root = next((path for path in folder.parents if "gemma-scope" in path.name), folder.parent)
    factor = None
    try:
        if layout.loader == "sparsify":
            config, weights = _of_sparsify(folder)
        elif layout.loader == LAYOUTS[0].loader:
            config, weights = loaders.sae_lens_disk_loader(folder, cfg_overrides={"dtype": "float32"})
        else:
            with _finding_files(loaders, _find_below(root)):
                load = loaders.NAMED_PRETRAINED_SAE_LOADERS[layout.loader]
                config, weights = _loaded(load, f"local/{root.name}", folder.relative_to(root).as_posix(), {})
        if layout.loader == "llama_scope":  # which SAELens has in its list, for each of them
            norm = read_json(folder / "hyperparams.json")["dataset_average_activation_norm"]["in"]
            factor = config["d_in"] ** 0.5 / norm
        _write(config, weights, factor, target)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(
            f"saes.source: SAELens cannot read the dictionary in {folder} ({one_line(error)}); folders have to be named"
            " as in the repository that they are from"
        ) from error


def _fetched_folder(repository: str, path: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, allow_patterns=[f"{path}/*", "config.json"])) / path


def _loaded(
    load: Callable[..., Any], repo_id: str, path: str, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], Weights]:
    """What one of SAELens' loaders makes of a path in a repository, in float32, on the CPU."""
    config, weights, _ = load(
        repo_id=repo_id,
        folder_name=path,
        device="cpu",
        force_download=False,
        cfg_overrides={**overrides, "device": "cpu", "dtype": "float32"},
    )
    return config, weights


@contextmanager
def _finding_files(loaders: ModuleType, find: Callable[..., str]) -> Iterator[None]:
    """Let SAELens' loaders find files by `find`, which takes what `hf_hub_download` takes.

    They get the shapes of tensors from the file itself, not by requests of their own, which would need a network even
    where the file is there.
    """

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(find(repo_id=repo_id, filename=filename), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (it is not a dict)

    theirs = {name: getattr(loaders, name) for name in ("hf_hub_download", "get_safetensors_tensor_shapes")}
    try:
        loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = find, shapes  # type: ignore[attr-defined]
        yield
    finally:
        for name, function in theirs.items():
            setattr(loaders, name, function)


def _find_below(root: Path) -> Callable[..., str]:
    from huggingface_hub.errors import EntryNotFoundError

    def find(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        path = root / subfolder / filename
        if not path.is_file():
            raise EntryNotFoundError(f"{path} does not exist")
        return str(path)

    return find


def _of_sparsify(folder: Path) -> tuple[dict[str, Any], Weights]:
    """What sparsify (EleutherAI) saves, read as sparsify computes it: b_dec is subtracted before encoding.

    SAELens' loader does not subtract it, and transposes a decoder that is [d_sae, d_in] already.
    """
    settings = read_json(folder / CONFIG_FILE)
    if unknown := [name for name in ("transcode", "skip_connection", "signed") if settings.get(name)]:
        raise UserError(f"{folder / CONFIG_FILE}: dictionaries of sparsify with {unknown[0]}=true cannot be used")
    if settings.get("activation", "topk") != "topk":
        raise UserError(
            f"{folder / CONFIG_FILE}: the activation {settings['activation']!r} is not understood, only topk"
        )
    tensors = read_tensors(folder / "sae.safetensors")
    encoder = tensors["encoder.weight"]
    metadata = {"hook_name": folder.name, "sae_lens_version": version("sae-lens")}
    config = {"architecture": "topk", "k": settings["k"], "normalize_activations": "none", "metadata": metadata}
    named = {
        "W_enc": encoder.t(),
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    return {**config, "apply_b_dec_to_input": True}, named


def _write(config: dict[str, Any], weights: Weights, factor: float | None, target: Path) -> None:
    """Write what a loader gave as SAELens would save it; `factor` scales activations before they are encoded."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    config = handle_config_defaulting(config)
    if factor is not None and config["normalize_activations"] == "expected_average_only_in":
        scales = {"W_enc": factor, "W_dec": 1 / factor, "b_dec": 1 / factor}
        weights = {name: weight * scales.get(name, 1) for name, weight in weights.items()}
        config["normalize_activations"] = "none"
    # A loader says what the names of folders say; a width that it does not know is None.
    d_sae, d_out = weights["W_dec"].shape
    config |= {"d_sae": d_sae, "d_in": len(weights["W_enc"]) if "W_enc" in weights else d_out}
    metadata = {name: value for name, value in config["metadata"].items() if value is not None}
    config["metadata"] = {**metadata, "sae_lens_version": version("sae-lens")}
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / WEIGHTS_FILE) as temporary:
        save_file({name: weight.float().contiguous() for name, weight in weights.items()}, temporary)
    write_json(target / CONFIG_FILE, config)
