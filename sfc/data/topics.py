"""Pairs of a toxic and a safe prompt on the same topic, as the data set lists its topics, or else by shared words."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from sfc.core.errors import UserError
from sfc.data.read import read_table
from sfc.data.schema import TOPICS_FILE

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
