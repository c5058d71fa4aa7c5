"""At which tokens a prompt is steered.

    last      the last token of the prompt, where the reply is decided
    last-K    its last K tokens
    suffix    the template after the user's text
    prompt    every token

The first token of a sequence, an attention sink, is in no set. Tokens of a reply are steered only where asked for.
"""

import re
from typing import Literal

import numpy as np
from jaxtyping import Bool

from sfc.core.errors import UserError
from sfc.data.render import Role, TokenizedPrompt

EditKind = Literal["add", "project-out", "clamp"]
"""how an activation is edited along a direction"""

_LAST = re.compile(r"last(?:-([1-9]\d*))?")


def check_positions(name: str) -> str:
    """The name of a position set, if it is one.

    Raises:
        UserError: it is none.
    """
    if name in ("suffix", "prompt") or _LAST.fullmatch(name):
        return name
    raise UserError(f"unknown positions {name!r}: write last, last-K, suffix or prompt")


def steered_tokens(name: str, prompt: TokenizedPrompt, during_reply: bool) -> Bool[np.ndarray, " pos"]:
    """Which tokens of a prompt, and of the reply that follows it, are steered.

    Raises:
        UserError: the name is no position set.
    """
    check_positions(name)
    is_reply = prompt.roles == Role.REPLY
    steered = ~is_reply
    if name == "suffix":
        steered = prompt.roles == Role.SUFFIX
    elif match := _LAST.fullmatch(name):
        end = int((~is_reply).sum())
        steered = np.arange(len(is_reply)) >= end - int(match[1] or 1)
        steered &= ~is_reply
    steered = steered | is_reply if during_reply else steered
    steered[0] = False
    return steered
