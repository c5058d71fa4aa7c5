"""The three sums behind sparse dictionaries, each computed in two ways, and which way is the quicker.

The same sums by groups of features are what the loss of a Matryoshka SAE is made of; no entry is read twice for them.

Only k of d_sae features are active in a row. *Sparse*, a sum reads the table's rows of the active features and nothing
else; *dense*, the values are spread over all features, and it is one matrix product. On a CPU sparse sums win even
where 5 % of the features are active; a GPU multiplies so much faster than it gathers that dense products can win there.

So on a CPU sums are sparse. On any other device both ways of a sum are timed the first time that it is asked of such
shapes; the quicker is said, and remembered in the cache folder, so that the same command computes the same numbers the
next time. The environment variable `SFC_SUMS` names one way for all (`sparse`, `dense`), or asks for timing on a CPU as
well (`measured`).
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sfc.core.artifacts import read_json, write_json
from sfc.core.errors import UserError
from sfc.core.machine import seconds_of
from sfc.core.progress import say
from sfc.models.sources import cache_folder

VARIABLE = "SFC_SUMS"
_SPARSE: Literal["sparse"] = "sparse"
_DENSE: Literal["dense"] = "dense"
_MEASURED = "measured"
_ROUNDS = 3
_REMEMBERED = TypeAdapter(dict[str, Literal["sparse", "dense"]])


def row_sums(
    weights: Float[Tensor, "rows entries"], indices: Int[Tensor, "rows entries"], table: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "rows d_in"]:
    """`out[n] = sum_e weights[n, e] * table[indices[n, e]]`."""

    def sparse() -> Tensor:
        # Detached, here and below: embedding_bag would prepare for a backward pass of its own, three times as slow.
        return F.embedding_bag(indices, table.detach(), per_sample_weights=weights.detach(), mode="sum")

    def dense() -> Tensor:
        return (_spread(weights, indices, len(table)) @ table).to(table.dtype)

    return _quicker("row sums", sparse, dense, indices, table.shape)


def dots(
    vectors: Float[Tensor, "rows d_in"], indices: Int[Tensor, "rows entries"], table: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "rows entries"]:
    """`out[n, e] = vectors[n] . table[indices[n, e]]`; there is at least one entry in a row."""

    def sparse() -> Tensor:
        return _dots_with_owners(vectors, indices, _rows(indices), table)

    def dense() -> Tensor:
        return (vectors @ table.t()).gather(1, indices).to(vectors.dtype)

    return _quicker("products", sparse, dense, indices, table.shape)


def sums_by_feature(
    weights: Float[Tensor, "rows entries"],
    indices: Int[Tensor, "rows entries"],
    vectors: Float[Tensor, "rows d_in"],
    d_sae: int,
) -> Float[Tensor, "d_sae d_in"]:
    """`out[i] = sum of weights[n, e] * vectors[n]` over the entries with `indices[n, e] = i`."""

    def sparse() -> Tensor:
        return _sums_of_owners(weights, indices, _rows(indices), vectors, d_sae)

    def dense() -> Tensor:
        return (_spread(weights, indices, d_sae).t() @ vectors).to(vectors.dtype)

    return _quicker("sums by feature", sparse, dense, indices, (d_sae, vectors.shape[1]))


def group_sums(
    weights: Float[Tensor, "rows entries"],
    indices: Int[Tensor, "rows entries"],
    borders: Sequence[int],
    table: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "rows groups d_in"]:
    """`row_sums`, taken apart into sums over groups of features: group g is from `borders[g]` to `borders[g + 1]`."""

    def sparse() -> Tensor:
        features, order = indices.sort(dim=1)
        rows, entries = features.shape
        row_starts = entries * torch.arange(rows, device=features.device)[:, None]
        in_earlier = torch.stack([(indices < first).sum(dim=1) for first in borders[:-1]], dim=1)
        starts = (row_starts + in_earlier).flatten()
        values = weights.detach().gather(1, order).flatten()
        sums = F.embedding_bag(features.flatten(), table.detach(), starts, per_sample_weights=values, mode="sum")
        return sums.view(rows, len(borders) - 1, table.shape[1])

    def dense() -> Tensor:
        spread = _spread(weights, indices, len(table))
        sums = [spread[:, first:end] @ table[first:end] for first, end in pairwise(borders)]
        return torch.stack(sums, dim=1).to(table.dtype)

    return _quicker(f"sums of {len(borders) - 1} groups", sparse, dense, indices, table.shape)


def group_dots(
    vectors: Float[Tensor, "rows groups d_in"],
    indices: Int[Tensor, "rows entries"],
    borders: Sequence[int],
    table: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "rows entries"]:
    """`out[n, e] = vectors[n, g] . table[indices[n, e]]`, g the group of the feature; arguments as `group_sums`."""

    def sparse() -> Tensor:
        return _dots_with_owners(vectors.flatten(0, 1), indices, _rows_and_groups(indices, borders), table)

    def dense() -> Tensor:
        parts = [vectors[:, g] @ table[first:end].t() for g, (first, end) in enumerate(pairwise(borders))]
        return torch.cat(parts, dim=1).gather(1, indices).to(vectors.dtype)

    return _quicker(f"products of {len(borders) - 1} groups", sparse, dense, indices, table.shape)


def grouped_sums_by_feature(
    weights: Float[Tensor, "rows entries"],
    indices: Int[Tensor, "rows entries"],
    borders: Sequence[int],
    vectors: Float[Tensor, "rows groups d_in"],
) -> Float[Tensor, "d_sae d_in"]:
    """`out[i] = sum over indices[n, e] = i of weights[n, e] * vectors[n, g]`, g the group of i."""

    def sparse() -> Tensor:
        owners = _rows_and_groups(indices, borders)
        return _sums_of_owners(weights, indices, owners, vectors.flatten(0, 1), borders[-1])

    def dense() -> Tensor:
        spread = _spread(weights, indices, borders[-1])
        parts = [spread[:, first:end].t() @ vectors[:, g] for g, (first, end) in enumerate(pairwise(borders))]
        return torch.cat(parts).to(vectors.dtype)

    return _quicker(
        f"sums by feature of {len(borders) - 1} groups", sparse, dense, indices, (borders[-1], vectors.shape[2])
    )


def _rows(indices: Int[Tensor, "rows entries"]) -> Int[Tensor, " entries_of_all_rows"]:
    """Which row each entry is of."""
    return torch.arange(len(indices), device=indices.device).repeat_interleave(indices.shape[1])


def _rows_and_groups(
    indices: Int[Tensor, "rows entries"], borders: Sequence[int]
) -> Int[Tensor, " entries_of_all_rows"]:
    """Which row and group each entry is of, numbered row by row."""
    owners = (len(borders) - 1) * torch.arange(len(indices), device=indices.device)[:, None]
    # Borders are compared one by one: a tensor of them would have to be copied to the device, which waits for that.
    for first in borders[1:-1]:
        owners = owners + (indices >= first)
    return owners.expand_as(indices).flatten()


def _dots_with_owners(
    vectors: Float[Tensor, "owners d_in"],
    indices: Int[Tensor, "rows entries"],
    owners: Int[Tensor, " entries_of_all_rows"],
    table: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "rows entries"]:
    """Of each entry, the product of its owner's vector and its feature's row of the table."""
    # What autograd calls for embedding_bag. Gathering table[indices] first takes 75 MB and 100 times as long. Where the
    # owners are given, it does not look at the starts of bags.
    no_starts = torch.zeros_like(owners[:1])
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors.contiguous(), table, indices.flatten().contiguous(), no_starts, owners, 0, -1
    )
    return products.view(indices.shape)


def _sums_of_owners(
    weights: Float[Tensor, "rows entries"],
    indices: Int[Tensor, "rows entries"],
    owners: Int[Tensor, " entries_of_all_rows"],
    vectors: Float[Tensor, "owners d_in"],
    d_sae: int,
) -> Float[Tensor, "d_sae d_in"]:
    """Of each feature, the sum of the vectors of its entries' owners, by the entries' weights."""
    features, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(features, torch.arange(d_sae + 1, device=features.device))
    return F.embedding_bag(
        owners[order],
        vectors.detach().contiguous(),
        starts,
        per_sample_weights=weights.detach().flatten()[order],
        mode="sum",
        include_last_offset=True,
    )


def _spread(weights: Tensor, indices: Tensor, d_sae: int) -> Float[Tensor, "rows d_sae"]:
    """The weights as a row of all features; a feature that is there twice has their sum."""
    return weights.new_zeros(len(weights), d_sae).scatter_add_(1, indices, weights)


def _quicker(
    name: str, sparse: Callable[[], Tensor], dense: Callable[[], Tensor], indices: Tensor, table: Sequence[int]
) -> Tensor:
    """The sum, in the way that is the quicker one here, or that is asked for."""
    wanted = os.environ.get(VARIABLE) or (_SPARSE if indices.device.type == "cpu" else _MEASURED)
    if wanted not in (_SPARSE, _DENSE, _MEASURED):
        raise UserError(f"{VARIABLE} is {wanted!r}: it can be {_SPARSE}, {_DENSE} or {_MEASURED}")
    if wanted == _MEASURED and indices.numel():
        wanted = _measured(name, sparse, dense, indices, table)
    return dense() if wanted == _DENSE else sparse()


def _measured(
    name: str, sparse: Callable[[], Tensor], dense: Callable[[], Tensor], indices: Tensor, table: Sequence[int]
) -> Literal["sparse", "dense"]:
    """Which way is the quicker for such shapes; rows count by powers of two."""
    rows, entries = indices.shape
    device = torch.cuda.get_device_name(indices.device) if indices.device.type == "cuda" else indices.device.type
    key = f"{device}: {name} of {entries} of {table[0]} features, {table[1]} wide, {1 << rows.bit_length()} rows"
    choices = known()
    if key not in choices:
        of_sparse, of_dense = (seconds_of(way, indices.device, _ROUNDS) for way in (sparse, dense))
        choices[key] = _SPARSE if of_sparse <= of_dense else _DENSE
        say(f"{key}: {choices[key]} ({_SPARSE} {1000 * of_sparse:.2g} ms, {_DENSE} {1000 * of_dense:.2g} ms)")
        write_json(_remembered(), choices)
    return choices[key]


def _remembered() -> Path:
    return cache_folder() / "quicker-sums.json"


@cache
def known() -> dict[str, Literal["sparse", "dense"]]:
    """What was measured on this machine before; a file that says something else is measured again."""
    try:
        return _REMEMBERED.validate_python(read_json(_remembered()))
    except (UserError, ValidationError):
        return {}
