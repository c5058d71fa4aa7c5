"""Near-duplicates: prompts that share most of their character 5-grams.

Texts are compared as sets of 5-grams by their Jaccard similarity. The obvious way looks at every pair; here two steps
avoid that without missing any:

1. Candidates. Order each set's grams from rare to common. A set of n grams shares at least `a = ceil(t n)` of them with
   any set of Jaccard similarity t or more. The l-th rarest shared gram has a - l shared ones behind it, so it is
   among the first n - a + l: two similar sets share l grams within these prefixes (prefix filtering, Chaudhuri et
   al. 2006). One sparse product of the prefixes counts what they share and never touches the common grams, which
   cost the most.
2. Verification. The exact similarity of every candidate pair, from the intersections of the whole sets.

Both run in blocks, so that memory is bounded whatever the number of texts.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

_GRAM = 5
_SHARED = 6  # the l above: more means longer prefixes, but far fewer candidates to verify
_BLOCK_ROWS = 1_000
_BLOCK_PAIRS = 50_000
_SEPARATORS = re.compile(r"[\W_]+")


Integers = NDArray[np.int64]


class Pair(NamedTuple):
    """Two texts by their places in the list, `first < second`, and their Jaccard similarity."""

    first: int
    second: int
    similarity: float


def grams(text: str) -> set[str]:
    """The character 5-grams of a text in lower case, where each run of anything but letters and digits is one space.

    The text is padded by a space on each side; one that is shorter than a gram counts as one gram.
    """
    words = _SEPARATORS.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()
    padded = f" {words} "
    return {padded[start : start + _GRAM] for start in range(max(1, len(padded) - _GRAM + 1))}


def near_duplicates(texts: Sequence[str], threshold: float = 0.5) -> list[Pair]:
    """All pairs of texts whose similarity is at least `threshold`, the most similar first.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, not {threshold}")
    if len(texts) < 2:
        return []
    membership = _membership(texts)
    sizes = np.diff(membership.indptr)
    needed = np.ceil(threshold * sizes - 1e-9).astype(np.int64)
    pairs: list[Pair] = []
    for first, second in _candidates(_prefixes(membership, sizes - needed + _SHARED), needed):
        shared = np.asarray(membership[first].multiply(membership[second]).sum(axis=1)).ravel()
        similarity = shared / (sizes[first] + sizes[second] - shared)
        close = similarity >= threshold
        pairs += map(Pair, first[close].tolist(), second[close].tolist(), similarity[close].tolist())
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _membership(texts: Sequence[str]) -> sparse.csr_matrix:
    """Texts by grams, ones where a text has a gram; the grams are numbered from rare to common."""
    numbers: dict[str, int] = {}
    indices: list[NDArray[np.int32]] = []
    for text in texts:
        row = [numbers.setdefault(gram, len(numbers)) for gram in grams(text)]
        indices.append(np.array(row, dtype=np.int32))
    flat = np.concatenate(indices)
    by_frequency = np.argsort(np.bincount(flat), kind="stable")
    rank = np.empty_like(by_frequency)
    rank[by_frequency] = np.arange(len(by_frequency))
    starts = np.concatenate([[0], np.cumsum([len(row) for row in indices])])
    matrix = sparse.csr_matrix(
        (np.ones(len(flat), dtype=np.int32), rank[flat], starts), shape=(len(texts), len(numbers))
    )
    matrix.sort_indices()
    return matrix


def _prefixes(membership: sparse.csr_matrix, lengths: Integers) -> sparse.csr_matrix:
    """Only the rarest grams of each text, as many as `lengths` says; columns are sorted from rare to common."""
    sizes = np.diff(membership.indptr)
    lengths = np.minimum(lengths, sizes)
    place = np.arange(membership.nnz) - np.repeat(membership.indptr[:-1], sizes)
    keep = place < np.repeat(lengths, sizes)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_matrix((membership.data[keep], membership.indices[keep], starts), shape=membership.shape)


def _candidates(prefixes: sparse.csr_matrix, needed: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Pairs of rows, each once and in blocks, whose prefixes share as much as those of similar texts must."""
    columns = prefixes.T.tocsr()
    for start in range(0, len(needed), _BLOCK_ROWS):
        shared = (prefixes[start : start + _BLOCK_ROWS] @ columns).tocoo()
        first, second = shared.row.astype(np.int64) + start, shared.col.astype(np.int64)
        enough = shared.data >= np.minimum(_SHARED, np.maximum(needed[first], needed[second]))
        keep = enough & (first < second)
        first, second = first[keep], second[keep]
        for block in range(0, len(first), _BLOCK_PAIRS):
            yield first[block : block + _BLOCK_PAIRS], second[block : block + _BLOCK_PAIRS]
