"""What dictionaries take: rows that they encode and put together again, training, their memory and files.

Their sizes come from their own configurations where these are at hand, from the names of published ones, or from what
is to be trained. How long they take is measured on one of random weights, as wide as the activation and with the same
number of active features; a very large one has fewer features there, and what grows with their number is multiplied.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sfc.core.config import SaeConfig
from sfc.core.machine import seconds_of
from sfc.core.work import Amounts, Work
from sfc.saes.architectures import CONFIG_FILE, read_config
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.source import local_dictionaries, source_of
from sfc.saes.start import ENCODED_ROWS, KMEANS_BLOCK, KMEANS_ROUNDS, start
from sfc.saes.train import dead_features, train_step


class Width(NamedTuple):
    """How large a dictionary is."""

    d_in: int
    d_sae: int
    k: int
    """features that are active in a row, or about so many"""
    is_known: bool = True
    """whether its configuration says so; else it is what its name or the settings say"""

    def weights(self, itemsize: int) -> int:
        """Bytes of its two matrices."""
        return 2 * self.d_in * self.d_sae * itemsize

    @property
    def recorded_features(self) -> int:
        """Bytes that are kept of the features of a token: values and numbers of the active ones."""
        return 8 * self.k

    def recorded(self, itemsize: int) -> int:
        """Bytes that are kept of a token: its activation, in numbers of so many bytes, and its features."""
        return itemsize * self.d_in + self.recorded_features


_USUAL_ACTIVE = 100
"""of a published dictionary that does not say it: those of Gemma Scope 2 that presets name have 60 to 150"""
_NAMED_WIDTH = re.compile(r"width_(\d+)k|-(\d+)k(?:/|$)")
_NAMED_EXPANSION = re.compile(r"[lr_](\d+)x(?:_|/|$)")


def width_of(saes: SaeConfig, folder: Path, site: str, d_in: int) -> Width:
    """The size of the dictionary at a site of this width.

    Args:
        folder: where the dictionaries lie, once they are made or taken.

    Raises:
        UserError: `saes.source` names none, or its configuration is damaged.
    """
    folders = [folder / site]
    if saes.source is not None:
        folders += filter(None, [local_dictionaries(saes.source, [site]).get(site)])
    for folder in folders:
        if (folder / CONFIG_FILE).is_file():
            config = read_config(folder)
            return Width(config.d_in, config.d_sae, getattr(config, "k", _USUAL_ACTIVE))
    if saes.source is None:
        d_sae = saes.expansion * d_in
        return Width(d_in, d_sae, saes.active_features(d_sae))
    name = source_of(saes.source, site)
    if found := _NAMED_WIDTH.search(name):
        d_sae = 1024 * int(found[1] or found[2])
    else:
        found = _NAMED_EXPANSION.search(name)
        d_sae = d_in * (int(found[1]) if found else saes.expansion)
    return Width(d_in, d_sae, min(_USUAL_ACTIVE, d_sae), is_known=False)


def start_work(config: SaeConfig, width: Width, n_sites: int, n_rows: int) -> Work:
    """The start of so many dictionaries, with a share of so many rows: a sample is read, and centroids are found."""
    rows = min(config.start_rows, n_rows)
    # Where there are fewer rows than features, rows themselves are the centroids.
    has_rounds = config.start == "kmeans" and rows >= width.d_sae
    encoded = (KMEANS_ROUNDS * rows * has_rounds + min(ENCODED_ROWS, rows)) * n_sites
    # The sample of all sites, and of one its scaled, centred and normalised copies.
    sample = 4 * rows * width.d_in * (n_sites + 4) + 4 * KMEANS_BLOCK * width.d_sae
    return Work("start", Amounts(encoded=encoded), host=sample)


_COPIES_OF_WEIGHTS = 4
"""weights, their gradients, and Adam's two moments"""
_BUFFERS = 3
"""of rows: one that is used, one that is read ahead, and a block with its copies"""


def training_work(config: SaeConfig, width: Width, n_sites: int, n_rows: int) -> Work:
    """All steps of the dictionaries of these sites, `layers_at_once` of them at a time."""
    at_once = min(config.layers_at_once, n_sites)
    batch = 4 * config.batch_size * (2 * width.d_sae + 6 * width.d_in + 4 * width.k)
    copies = _COPIES_OF_WEIGHTS + (1 if config.anchor_weight else 0)
    rows = min(config.buffer_rows, n_rows)
    return Work(
        "train",
        Amounts(trained=config.steps * config.batch_size * n_sites),
        device=at_once * copies * width.weights(4) + batch,
        host=4 * _BUFFERS * rows * at_once * width.d_in,
        kept=n_sites * width.weights(4),
        scratch=3 * at_once * width.weights(4),  # a checkpoint has Adam's moments, too
    )


_ELEMENTS = 1 << 24
"""of the matrices of a dictionary that is measured; the number of its features is cut to that"""
_OPERATIONS = 4e9
"""of the product of what is measured; the number of rows is cut to that"""
_ROWS = 512
_FEWEST = 64


@torch.no_grad()
def dictionary_speed(width: Width, dtype: str, device: torch.device) -> Amounts:
    """Seconds of a row that is encoded, and that is spliced in: forward, and back."""
    d_sae = min(width.d_sae, max(_ELEMENTS // width.d_in, 1))
    k, rows = min(width.k, d_sae), _rows(width.d_in * d_sae)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, width.d_in), dim=1).to(device, getattr(torch, dtype))
    weights = {"W_enc": directions.t(), "W_dec": directions}
    weights |= {"b_enc": torch.zeros(d_sae, device=device), "b_dec": torch.zeros(width.d_in, device=device)}
    dictionary = TopKDictionary(weights, k=k, site="blocks.0.hook_resid_post")
    x = torch.randn(rows, width.d_in, device=device)
    circuit, keep = torch.zeros(rows, 1, dtype=torch.long, device=device), torch.ones(1, d_sae, device=device)

    def put_together(values: Tensor, indices: Tensor) -> Tensor:
        # As `Ablation` does: what is kept of the row, and what the baseline has in its place.
        weighted = values * keep[circuit, indices]
        return dictionary.decode_sparse(weighted, indices) + dictionary.decode_sparse(values - weighted, indices)

    def back() -> None:
        with torch.enable_grad():
            inputs = x.detach().requires_grad_()
            torch.autograd.grad(put_together(*dictionary.encode_sparse(inputs)).sum(), inputs)

    sparse = dictionary.encode_sparse(x)
    encoding, decoding, whole = (
        seconds_of(call, device) / rows
        for call in (lambda: dictionary.encode_sparse(x), lambda: put_together(*sparse), back)
    )
    encoded, more_active = encoding * width.d_sae / d_sae, width.k / k
    backward = max(whole - encoding - decoding, 0.0)
    spliced = encoded + decoding * more_active
    return Amounts(encoded=encoded, spliced=spliced, spliced_backward=backward * more_active)


def _rows(elements: int) -> int:
    return int(min(max(_OPERATIONS / (2 * elements), _FEWEST), _ROWS))


def training_speed(config: SaeConfig, width: Width, device: torch.device) -> Amounts:
    """Seconds of a row that a dictionary of this size is trained on, in batches of the configuration's size.

    A step costs something for each of its rows and something for each parameter, which two batch sizes tell apart.
    """
    expansion = max(min(width.d_sae, _ELEMENTS // width.d_in) // width.d_in, 1)
    share = expansion * width.d_in / width.d_sae
    small = config.model_copy(update={"expansion": expansion, "k": max(round(width.k * share), 1), "start": "random"})
    many = min(_rows(expansion * width.d_in**2), config.batch_size)
    few = max(many // 4, 1)
    rows = torch.randn(many, width.d_in)
    training = start("blocks.0.hook_resid_post", rows, small, 0, device)
    dead = dead_features(training, small)

    def seconds(count: int) -> float:
        x = rows[:count].to(device)
        return seconds_of(lambda: train_step(training, x, small, int(small.k), config.learning_rate, dead), device)

    of_few, of_many = seconds(few), seconds(many)
    per_row = (of_many - of_few) / (many - few) if many > few else of_many / many
    per_step = max(of_many - many * per_row, 0.0)
    return Amounts(trained=(max(per_row, 0.0) + per_step / config.batch_size) / share)
