"""At which tokens a prompt is steered.

    last      the last token of the prompt, where the reply is decided
    last-K    its last K tokens
    suffix    the template after the user's text
    prompt    every token

The first token of a sequence is an attention sink: whoever steers leaves it out. Asking for a name imports no torch.
"""

import re
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from sfc.core.errors import UserError
from sfc.data.render import Role

EditKind = Literal["add", "project-out", "clamp"]
"""how an activation is edited along a direction"""

_LAST = re.compile(r"last(?:-([1-9]\d{0,8}))?")


def check_positions(name: str) -> str:
    """The name of a position set, if it is one.

    Raises:
        UserError: there is no such set.
    """
    if name in ("suffix", "prompt") or _LAST.fullmatch(name):
        return name
    raise UserError(f"unknown positions {name!r}: write last, last-K, suffix or prompt")


def steered_tokens(name: str, roles: Int[np.ndarray, "*batch pos"]) -> Bool[np.ndarray, "*batch pos"]:
    """Which tokens of prompts a position set names, given their roles (negative for padding); none of a reply.

    Raises:
        UserError: the name is no position set.
    """
    check_positions(name)
    of_prompt = (roles >= 0) & (roles != Role.REPLY)
    if name == "suffix":
        return roles == Role.SUFFIX
    if match := _LAST.fullmatch(name):
        still_to_come = np.flip(np.flip(of_prompt, -1).cumsum(-1), -1)
        return of_prompt & (still_to_come <= int(match[1] or 1))
    return of_prompt
