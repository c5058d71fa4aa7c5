"""Pairs of prompts that differ in a few words, read from files and aligned token by token.

`pairs.csv` has a prompt to be declined and a harmless one. A file of counterfactual pairs has two prompts and the
answer that goes with each: `The friends` goes on with ` have`, and `The friend` with ` has`.
"""

from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Int

from sfc.core.config import PromptsConfig
from sfc.core.errors import UserError
from sfc.core.reading import hash_of_given
from sfc.data.prepare import add_two_splits
from sfc.data.read import read_records
from sfc.data.render import Role, TokenizedPrompt
from sfc.data.schema import canonical_category, prompt_ids, with_ids

PAIRS_FILE = "pairs.csv"
_COUNTERFACTUAL = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")


def load_pairs(folder: Path, category: str, config: PromptsConfig, seed: int) -> pd.DataFrame:
    """The pairs of one category from `pairs.csv`, with columns `toxic`, `safe` and `split` (discovery or test).

    Raises:
        UserError: the file is missing or malformed, or has fewer than two pairs of the category.
    """
    path = folder / PAIRS_FILE
    pairs = _read(path)
    pairs = pairs[pairs["category"].map(canonical_category) == category]
    if len(pairs) < 2:
        raise UserError(f"{path} has {len(pairs)} pairs of category {category!r}: discovery and test need one each")
    split = add_two_splits(pairs.assign(prompt=pairs["toxic"], dataset_type="pair"), config, seed)
    return split[["toxic", "safe", "split"]].reset_index(drop=True)


def pairs_fingerprint(folder: Path) -> str:
    """SHA-256 of the file of pairs.

    Raises:
        UserError: it is missing or malformed.
    """
    _read(folder / PAIRS_FILE)
    return hash_of_given(folder / PAIRS_FILE)


def _read(path: Path) -> pd.DataFrame:
    return read_records(path, ("category", "toxic", "safe"))


def load_counterfactuals(path: Path, config: PromptsConfig, seed: int) -> pd.DataFrame:
    """The pairs of a file with `clean_prefix, patch_prefix, clean_answer, patch_answer` and perhaps `case`.

    Each pair is in the split discovery or test, chosen by hash. Pairs that share a prompt, directly or by way of
    others, are in the same one.

    Returns:
        A row per pair, with the columns of the file, `case` ("" where there is none) and `split`.

    Raises:
        UserError: the file is missing or malformed, the two sides of a pair are the same, two texts count as one
            prompt, or all pairs share prompts with one another.
    """
    pairs = read_records(path, _COUNTERFACTUAL, ("case",))
    for what in ("prefix", "answer"):
        same = pairs[pairs[f"clean_{what}"] == pairs[f"patch_{what}"]]
        if len(same):
            raise UserError(
                f"{path}: pair {same.index[0] + 1} has the same {what} twice ({same[f'clean_{what}'].iloc[0]!r})"
            )
    _check_ids(path, pairs)
    groups = list(
        nx.connected_components(nx.Graph(list(zip(pairs["clean_prefix"], pairs["patch_prefix"], strict=True))))
    )
    if len(groups) < 2:
        raise UserError(f"{path}: all pairs share prompts with one another, so that none can be kept for testing")
    names = ["\n".join(sorted(group)) for group in groups]
    name_of = {prompt: name for name, group in zip(names, groups, strict=True) for prompt in group}
    split = add_two_splits(pd.DataFrame({"prompt": names, "category": "", "dataset_type": "pair"}), config, seed)
    split_of = dict(zip(split["prompt"], split["split"], strict=True))
    return pairs.assign(split=[split_of[name_of[prompt]] for prompt in pairs["clean_prefix"]])


def _check_ids(path: Path, pairs: pd.DataFrame) -> None:
    """Raise a `UserError` where two texts have one id: their activations could not be told apart."""
    first: dict[str, str] = {}
    for side in ("clean_prefix", "patch_prefix"):
        for pair, (text, name) in enumerate(zip(pairs[side], prompt_ids(pairs[side]), strict=True), start=1):
            if first.setdefault(name, text) != text:
                raise UserError(
                    f"{path}: pair {pair}: {text!r} counts as the same prompt as {first[name]!r}, since they differ"
                    " only in case, spaces or forms of the same characters: use one of them"
                )


def prompts_of(pairs: pd.DataFrame, category: str) -> pd.DataFrame:
    """Every prompt of the pairs once: columns `id`, `prompt`, `category`, `dataset_type`, `split`."""
    sides = [pairs[["split"]].assign(prompt=pairs[side]) for side in ("clean_prefix", "patch_prefix")]
    unique = pd.concat(sides).drop_duplicates("prompt").sort_values("prompt", ignore_index=True)
    described = unique.assign(category=category, dataset_type="pair")
    return with_ids(described[["prompt", "category", "dataset_type", "split"]])


def aligned(
    ids: Int[np.ndarray, " pos"], partner: Int[np.ndarray, " pos"]
) -> tuple[TokenizedPrompt, TokenizedPrompt] | None:
    """Both prompts with roles by which each token finds its counterpart; None where it cannot be told which that is.

    Equally long prompts correspond token by token: all tokens are `SUFFIX`, which counts from the end. In others the
    shared start (the first token, an attention sink, counts as shared) and the shared end correspond, and the stretch
    in between corresponds as a whole, as `CONTENT`, to that of the partner. The last token, where the answer is given,
    must be in the shared end.
    """
    if len(ids) == len(partner):
        return _with_roles(ids, 0, len(ids)), _with_roles(partner, 0, len(ids))
    start = max(_n_shared(ids, partner), 1)
    end = _n_shared(ids[start:][::-1], partner[start:][::-1])
    stretch, partners_stretch = len(ids) - start - end, len(partner) - start - end
    if end == 0 or (stretch and not partners_stretch):
        return None
    return _with_roles(ids, start, end), _with_roles(partner, start, end)


def _n_shared(a: Int[np.ndarray, " a"], b: Int[np.ndarray, " b"]) -> int:
    """How many tokens the two begin with alike."""
    n = min(len(a), len(b))
    return int(np.logical_and.accumulate(a[:n] == b[:n]).sum())


def _with_roles(ids: Int[np.ndarray, " pos"], start: int, end: int) -> TokenizedPrompt:
    roles = np.full(len(ids), Role.CONTENT)
    roles[:start] = Role.PREFIX
    roles[len(ids) - end :] = Role.SUFFIX
    return TokenizedPrompt(ids, roles)
