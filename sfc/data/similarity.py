"""Which prompts are alike: near-duplicates, and pairs of a toxic and a safe prompt on the same topic.

Near-duplicates share most of their character 5-grams: texts are compared as sets of them by their Jaccard similarity.
The obvious way looks at every pair; here two steps avoid that without missing any:

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
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from sfc.core.errors import UserError
from sfc.data.read import read_table
from sfc.data.schema import TOPICS_FILE

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


_WORD = re.compile(r"[^\W_]+")
_STEM = 5  # letters: "threat" and "threatening" are the same topic


def listed_topics(folder: Path, sources: Sequence[str]) -> list[int] | None:
    """The number in `topics.csv` of each prompt's topic; None where a data set has no such file.

    The n-th topic owns the n-th block of rows of each file; the blocks of a file are equally long.

    Args:
        sources: file and row of each prompt, as `or-bench-toxic.csv:17`.

    Raises:
        UserError: a file cannot be divided into as many blocks as there are topics.
    """
    path = folder / TOPICS_FILE
    if not path.is_file():
        return None
    n_topics = len(read_table(path, ("category", "topic")))
    places = [source.rsplit(":", 1) for source in sources]
    topic_at: dict[str, dict[str, int]] = {}
    for file in {file for file, _ in places}:
        rows = read_table(folder / file, ("prompt", "category")).index
        if len(rows) % n_topics:
            raise UserError(f"{folder / file} has {len(rows)} rows, no multiple of the {n_topics} topics of {path}")
        topic_at[file] = {str(row): place * n_topics // len(rows) for place, row in enumerate(rows)}
    return [topic_at[file][row] for file, row in places]


def topic_pairs(
    texts: Sequence[str], labels: Bool[np.ndarray, " texts"], topics: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Pairs of texts with label True and False, on the same topic wherever that is possible.

    Every text of the smaller side is in one pair. Of all ways to pair them, this one has the most pairs within a topic,
    where topics are given, and the largest sum of cosines between texts as bags of stems, weighted by the logarithm of
    their inverse document frequency.

    Returns:
        The two numbers of each pair, that of label True first, in ascending order.
    """
    toxic, safe = np.flatnonzero(labels), np.flatnonzero(~labels)
    if not len(toxic) or not len(safe):
        return []
    weights = _weights(texts)
    similarity = (weights[toxic] @ weights[safe].T).toarray()
    if topics is not None:
        same = np.asarray(topics)[toxic, None] == np.asarray(topics)[safe]
        similarity = similarity + len(texts) * same  # no sum of cosines outweighs a pair within a topic
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return sorted(zip(toxic[rows].tolist(), safe[columns].tolist(), strict=True))


def _weights(texts: Sequence[str]) -> sparse.csr_matrix:
    """Texts by stems, rows of length 1 (0 where a text has no stem of its own)."""
    numbers: dict[str, int] = {}
    entries = []
    for row, text in enumerate(texts):
        stems = {word[:_STEM] for word in _WORD.findall(text.lower())}
        entries += [(row, numbers.setdefault(stem, len(numbers))) for stem in sorted(stems)]
    rows, columns = np.array(entries, dtype=int).reshape(-1, 2).T
    rarity = np.log(len(texts) / np.bincount(columns, minlength=len(numbers)))
    values = rarity[columns]
    norms = np.sqrt(np.bincount(rows, values**2, minlength=len(texts)))
    values = values / np.where(norms > 0, norms, 1)[rows]
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(texts), len(numbers)))
