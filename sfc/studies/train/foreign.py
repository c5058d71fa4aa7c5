"""Dictionaries that others trained, in place of our own: fetched, checked on activations of this model, and copied."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from sfc.core.artifacts import replacing
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar
from sfc.models.loading import choose_device
from sfc.run import Run
from sfc.saes.architectures import CONFIG_FILE, WEIGHTS_FILE
from sfc.saes.dictionary import Dictionary
from sfc.saes.format import fetch_pretrained, load_dictionary
from sfc.saes.quality import ALL, quality_by_role
from sfc.saes.source import check_site, for_layer, local_dictionaries
from sfc.studies.train.rows import HeldOutBlock


def adopt_dictionaries(run: Run, source: str, folder: Path, held_out: Callable[[str], Iterable[HeldOutBlock]]) -> None:
    """Copy the dictionary of each site from `source` (see `saes.source`) into `folder`, once it is known to fit.

    Args:
        held_out: gives the activations of a site that the fit is measured on, block by block.

    Raises:
        UserError: a dictionary cannot be fetched or read, or does not fit (see `check_fit`).
    """
    sites = run.experiment.activations.sites
    local = local_dictionaries(source, sites)
    with progress_bar("checking", len(sites), "dictionaries") as progress:
        for site in sites:
            if local:
                _adopt(run, local[site], folder / site, held_out(site))
            else:
                with TemporaryDirectory(dir=folder) as fetched:
                    fetch_pretrained(for_layer(source, site), Path(fetched))
                    check_site(Path(fetched), site)
                    _adopt(run, Path(fetched), folder / site, held_out(site))
            progress(1)


def check_fit(dictionary: Dictionary, blocks: Iterable[HeldOutBlock], smallest: float) -> float:
    """The fraction of the variance of these rows that the dictionary explains.

    Raises:
        UserError: its width is not that of the rows, or it explains less than `smallest`.
    """
    explained = 1 - quality_by_role(dictionary, _of_width(dictionary, blocks))[ALL].quality.fvu
    if not explained >= smallest:  # NaN is not a fit either
        raise UserError(
            f"{dictionary.site}: the dictionary explains {explained:.3f} of the variance of held-out activations, less"
            f" than saes.min_variance_explained={smallest:g}; it was made for another model or layer, or reads"
            " activations that were scaled or centred and its files do not say how"
        )
    return explained


def _of_width(dictionary: Dictionary, blocks: Iterable[HeldOutBlock]) -> Iterator[HeldOutBlock]:
    for block in blocks:
        if dictionary.d_in != block.rows.shape[1]:
            raise UserError(
                f"{dictionary.site}: the dictionary reads activations of width {dictionary.d_in}, those of this model"
                f" have {block.rows.shape[1]}; it was made for another model"
            )
        yield block


def _adopt(run: Run, origin: Path, target: Path, blocks: Iterable[HeldOutBlock]) -> None:
    device = choose_device(run.device)
    check_fit(load_dictionary(origin, device), blocks, run.experiment.saes.min_variance_explained)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        with replacing(target / name) as temporary:
            shutil.copyfile(origin / name, temporary)
