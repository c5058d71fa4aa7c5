"""Dictionaries that take the place of trained ones: where `saes.source` says they are. Nothing here imports torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from sfc.core.config import SaeConfig, Source
from sfc.core.errors import UserError
from sfc.core.reading import hash_of_given
from sfc.core.sites import SiteKind, in_order, kind_of, layer_of, site_named
from sfc.saes.architectures import CONFIG_FILE, WEIGHTS_FILE, read_config


class Layout(NamedTuple):
    """How a library lays out the files of a dictionary in a folder."""

    loader: str
    """which of SAELens' loaders reads them"""
    files: tuple[str, ...]
    may_have: tuple[str, ...] = ()


LAYOUTS = (
    Layout("sae_lens", (CONFIG_FILE, WEIGHTS_FILE)),
    Layout("gemma_2", ("params.npz",)),  # Gemma Scope
    Layout("gemma_3", ("params.safetensors",), ("config.json",)),  # Gemma Scope 2
    Layout("llama_scope", ("hyperparams.json", "checkpoints/final.safetensors")),
    Layout("sparsify", (CONFIG_FILE, "sae.safetensors")),
)
"""SAELens' own first"""
_CAN_RUN_CODE = {".pt", ".pth", ".pkl", ".bin"}


def layout_of(folder: Path) -> Layout | None:
    """The layout of the dictionary that lies in a folder itself, if one does."""
    return next((each for each in LAYOUTS if all((folder / name).is_file() for name in each.files)), None)


def saes_identity(config: SaeConfig, sites: Sequence[str]) -> dict[str, Any]:
    """A JSON value that changes when the dictionaries that `config` describes change.

    Those in folders count by content, wherever the folders are. Of a pretrained release only the name is known before
    it is fetched.

    Raises:
        UserError: as `local_dictionaries`.
    """
    if config.source is None:
        return config.identity()
    folders = local_dictionaries(config.source, sites)
    content = {
        site: _hashes(folders[site]) if site in folders else source_of(config.source, site) for site in sites
    }  # fmt: skip
    included = {"min_variance_explained", "held_out"} | (set() if config.dtype == "float32" else {"dtype"})
    identity = config.model_dump(include=included)
    return {"content": content if folders else config.source, **identity}


def _hashes(folder: Path) -> list[str]:
    layout = layout_of(folder) or LAYOUTS[0]
    there = [name for name in layout.may_have if (folder / name).is_file()]
    return [hash_of_given(folder / name, 1) for name in (*layout.files, *there)]


EMBEDDED = "embedded"
EMBEDDED_DICTIONARIES = Path(__file__).parent / "embedded"
"""those of the preset smollm2, a folder per site; its README says how they were made"""


def local_dictionaries(source: Source, sites: Sequence[str]) -> dict[str, Path]:
    """The folder of each site's dictionary, but of those that may be a pretrained `release/sae_id`.

    A folder holds a dictionary itself, or one subfolder per site, named by it. `embedded` is the package's own.

    Raises:
        UserError: there is no dictionary for a site, or it was made for another one.
    """
    if source == EMBEDDED:
        _check_embedded(sites)
        return {site: EMBEDDED_DICTIONARIES / site for site in sites}
    bases = {site: Path(source_of(source, site)).expanduser() for site in sites}
    # Sites of one kind have one source: where some of it are folders, one that is missing is not on a hub.
    kinds = {kind_of(site) for site, base in bases.items() if base.is_dir()}
    for site in sites:
        first, _, rest = source_of(source, site).partition("/")
        if kind_of(site) not in kinds and (not rest or first in ("", ".", "..", "~") or Path(first).is_dir()):
            raise UserError(
                f"saes.source: no folder {source_of(source, site)}, and a pretrained dictionary is named release/sae_id"
            )
    return {site: _dictionary_folder(base, site) for site, base in bases.items() if kind_of(site) in kinds}


def _check_embedded(sites: Sequence[str]) -> None:
    there = in_order(path.parent.name for path in EMBEDDED_DICTIONARIES.glob(f"*/{CONFIG_FILE}"))
    if missing := [site for site in sites if site not in there]:
        raise UserError(
            f"saes.source: no dictionary for {missing[0]} comes with the package, only for {', '.join(there)}; train"
            " your own with --set saes.source=null"
        )


def source_of(source: Source, site: str) -> str:
    """What `saes.source` says of a site: that of its kind, with the site's layer in place of `{layer}`.

    Raises:
        UserError: it says nothing of that kind.
    """
    kind = kind_of(site)
    if isinstance(source, str):
        named = source
    elif kind in source:
        named = source[cast(SiteKind, kind)]
    else:
        raise UserError(f"saes.source names dictionaries for {', '.join(source)}, and none for {kind}")
    return named.replace("{layer}", str(layer_of(site)))


def check_site(folder: Path, site: str) -> None:
    """Refuse the dictionary in `folder` unless it was made for `site`.

    Raises:
        UserError: it was not, or its configuration cannot be used.
    """
    made_for = read_config(folder).site
    if made_for != site:
        raise UserError(
            f"the dictionary in {folder} is one of {made_for}, not of {site}; choose sites with --set"
            " activations.layers=[…] and activations.kind=…, or write {layer} in saes.source"
        )


def _dictionary_folder(base: Path, site: str) -> Path:
    named = [folder for folder in sorted(base.glob("*/")) if site_named(folder.name) == site] if base.is_dir() else []
    for folder in (base / site, *named, base):
        layout = layout_of(folder)
        if layout is not None:
            if layout is LAYOUTS[0]:  # of others it is known once they are converted
                check_site(folder, site)
            return folder
        if unsafe := [path for path in folder.glob("*") if path.suffix in _CAN_RUN_CODE]:
            raise UserError(
                f"saes.source: {unsafe[0]} is of a kind that can run code, and is not opened: name a release of"
                " SAELens' list in its place (release/sae_id), or convert it where you trust it:"
                " SAE.from_pretrained('OWNER/REPOSITORY', 'FOLDER',"
                " converter=dictionary_learning_sae_huggingface_loader_1).save_model('NEW_FOLDER')"
            )
    raise UserError(
        f"saes.source: no dictionary for {site}: {base} and {base / site} lack {CONFIG_FILE} and {WEIGHTS_FILE}, and"
        " the files of Gemma Scope, Llama Scope and sparsify"
    )
