"""Dictionaries that take the place of trained ones: where `saes.source` says they are. Nothing here imports torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfc.core.config import SaeConfig
from sfc.core.errors import UserError
from sfc.core.reading import hash_of_given
from sfc.core.sites import in_order, layer_of
from sfc.saes.architectures import CONFIG_FILE, WEIGHTS_FILE, read_config


def saes_identity(config: SaeConfig, sites: Sequence[str]) -> dict[str, Any]:
    """A JSON value that changes when the dictionaries that `config` describes change.

    Those in a folder count by content, wherever the folder is. Of a pretrained release only the name is known before it
    is fetched.

    Raises:
        UserError: as `local_dictionaries`.
    """
    if config.source is None:
        return config.identity()
    folders = local_dictionaries(config.source, sites)
    files = {site: [hash_of_given(folders[site] / name, 1) for name in (CONFIG_FILE, WEIGHTS_FILE)] for site in folders}
    return {"content": files or config.source, **config.model_dump(include={"min_variance_explained", "held_out"})}


EMBEDDED = "embedded"
EMBEDDED_DICTIONARIES = Path(__file__).parent / "embedded"
"""those of the preset smollm2, a folder per site; its README says how they were made"""


def local_dictionaries(source: str, sites: Sequence[str]) -> dict[str, Path]:
    """The folder of each site's dictionary; empty where `source` may be a pretrained `release/sae_id`.

    A folder holds a dictionary itself, or one subfolder per site, named by it. `embedded` is the package's own.

    Raises:
        UserError: there is no dictionary for a site, or it was made for another one.
    """
    if source == EMBEDDED:
        _check_embedded(sites)
        return {site: EMBEDDED_DICTIONARIES / site for site in sites}
    bases = {site: Path(for_layer(source, site)).expanduser() for site in sites}
    if not any(base.is_dir() for base in bases.values()):
        first, _, rest = source.partition("/")
        if not rest or first in ("", ".", "..", "~") or Path(first).is_dir():
            raise UserError(f"saes.source: no folder {source}, and a pretrained dictionary is named release/sae_id")
        return {}
    return {site: _dictionary_folder(base, site) for site, base in bases.items()}


def _check_embedded(sites: Sequence[str]) -> None:
    there = in_order(path.parent.name for path in EMBEDDED_DICTIONARIES.glob(f"*/{CONFIG_FILE}"))
    if missing := [site for site in sites if site not in there]:
        raise UserError(
            f"saes.source: no dictionary for {missing[0]} comes with the package, only for {', '.join(there)}; train"
            " your own with --set saes.source=null"
        )


def for_layer(source: str, site: str) -> str:
    """`source` with the layer of the site in place of `{layer}`."""
    return source.replace("{layer}", str(layer_of(site)))


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
    for folder in (base / site, base):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            check_site(folder, site)
            return folder
    raise UserError(
        f"saes.source: no dictionary for {site}: {base} and {base / site} lack {CONFIG_FILE} and {WEIGHTS_FILE}"
    )
