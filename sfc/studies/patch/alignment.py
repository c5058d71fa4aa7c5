"""Which token of one prompt stands for which of another: by role, from both ends of the template.

Template tokens correspond where the template is the same, token for token: its prefix counted from the start, its
suffix from the end. Content tokens correspond by count from the start or from the end; all of them only where both
prompts have equally many. What does not correspond is never patched: `Unalignable` says why.

Position sets, as users write them:

    last         the last token, where the next one is decided; corresponds in every pair
    last-K       the last K tokens
    suffix       the template after the prompt, and the reply that was begun
    content      the prompt itself
    prefix       the template before it; by causality the same in both runs, so that its effect is 0
    all          everything
    suffix[-2]   one token of a role, counted from the role's start (0, 1, …) or end (-1, -2, …)
    each         every token of content and suffix by itself (see `expand`)

The first token, an attention sink, is in no set.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sfc.core.errors import UserError
from sfc.data.render import Role, TokenizedPrompt

EACH = "each"
_ONE = re.compile(r"(prefix|content|suffix)\[(-?\d{1,9})\]")
_LAST = re.compile(r"last-([1-9]\d*)")
_ROLES = {"prefix": (Role.PREFIX,), "content": (Role.CONTENT,), "suffix": (Role.SUFFIX, Role.REPLY)}

Positions = Int[np.ndarray, " n"]


class Unalignable(Exception):
    """These two prompts have no corresponding tokens at these positions; the message says why."""


def check_positions(name: str) -> str:
    """The name of a position set, if it is one.

    Raises:
        UserError: there is no such set.
    """
    if name in ("last", "all", EACH, *_ROLES) or _LAST.fullmatch(name) or _ONE.fullmatch(name):
        return name
    raise UserError(
        f"unknown positions {name!r}: write last, last-K, suffix, content, prefix, all, each, or one token such as"
        " suffix[-1] or content[0]"
    )


def expand(names: Sequence[str], pairs: Sequence[tuple[TokenizedPrompt, TokenizedPrompt]]) -> list[str]:
    """The position sets with `each` spelt out, each once, in the order given.

    `each` is every suffix token and as many content tokens as the shortest prompt has, half from either end, so that
    every pair has them all. Prefix tokens are left out: their effect is 0.
    """
    prompts = [prompt for pair in pairs for prompt in pair]
    n_content = min((int((prompt.roles == Role.CONTENT).sum()) for prompt in prompts), default=0)
    n_suffix = max((int((prompt.roles == Role.SUFFIX).sum()) for prompt in prompts), default=0)
    from_start = [f"content[{i}]" for i in range((n_content + 1) // 2)]
    from_end = [f"content[{i}]" for i in range(-(n_content // 2), 0)]
    single = [*from_start, *from_end, *(f"suffix[{i}]" for i in range(-n_suffix, 0))]
    spelt = [one for name in names for one in (single if name == EACH else [name])]
    return list(dict.fromkeys(spelt))


def align(name: str, clean: TokenizedPrompt, corrupted: TokenizedPrompt) -> tuple[Positions, Positions]:
    """Positions of a set in the clean and in the corrupted prompt, the i-th of one corresponding to the other's i-th.

    Raises:
        Unalignable: the set has no token here, or they do not correspond.
    """
    if match := _ONE.fullmatch(name):
        ours, theirs = _one(match[1], int(match[2]), clean, corrupted)
    elif match := _LAST.fullmatch(name):
        ours, theirs = _last(int(match[1]), clean, corrupted)
    elif name == "last":
        ours, theirs = _last(1, clean, corrupted)
    else:
        roles = list(_ROLES) if name == "all" else [name]
        parts = [_role(role, clean, corrupted) for role in roles]
        ours, theirs = (np.concatenate(side) for side in zip(*parts, strict=True))
    corresponding = (ours > 0) & (theirs > 0)
    if not corresponding.any():
        raise Unalignable(f"{name}: no token but the first")
    return ours[corresponding], theirs[corresponding]


def _role(role: str, clean: TokenizedPrompt, corrupted: TokenizedPrompt) -> tuple[Positions, Positions]:
    """All tokens of a role; template tokens must be the same, content tokens equally many."""
    ours, theirs = _of_role(role, clean), _of_role(role, corrupted)
    if role == "content" and len(ours) != len(theirs):
        raise Unalignable(f"content: {len(ours)} tokens against {len(theirs)}")
    if role != "content" and not np.array_equal(clean.ids[ours], corrupted.ids[theirs]):
        raise Unalignable(f"{role}: the template{' or the begun reply' * (role == 'suffix')} is not the same in both")
    return ours, theirs


def _one(role: str, index: int, clean: TokenizedPrompt, corrupted: TokenizedPrompt) -> tuple[Positions, Positions]:
    sides = (_of_role(role, clean), _of_role(role, corrupted)) if role == "content" else _role(role, clean, corrupted)
    fewest = min(len(side) for side in sides)
    if not -fewest <= index < fewest:
        raise Unalignable(f"{role}[{index}]: only {fewest} {role} tokens")
    ours, theirs = (side[[index]] for side in sides)
    return ours, theirs


def _last(count: int, clean: TokenizedPrompt, corrupted: TokenizedPrompt) -> tuple[Positions, Positions]:
    """The last `count` tokens: the very last one always corresponds, others as far as those of their role do."""
    most = min(len(clean.ids), len(corrupted.ids)) - 1
    if count > most:
        raise Unalignable(f"last-{count}: only {most} tokens after the first")
    if count > 1:
        n_suffix = len(_role("suffix", clean, corrupted)[0])
        n_content = min(len(_of_role("content", prompt)) for prompt in (clean, corrupted))
        if count > n_suffix + n_content:
            _role("content", clean, corrupted)
            _role("prefix", clean, corrupted)
    ours, theirs = (np.arange(len(prompt.ids) - count, len(prompt.ids)) for prompt in (clean, corrupted))
    return ours, theirs


def _of_role(role: str, prompt: TokenizedPrompt) -> Positions:
    return np.flatnonzero(np.isin(prompt.roles, _ROLES[role]))
