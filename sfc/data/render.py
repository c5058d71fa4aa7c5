"""From a prompt's text to tokens, each with its role in the chat template.

Roles are found by character offsets in the rendered text: `prefix` (template before the user's text), `content`,
`suffix` (template after it, where the model decides). A token that spans a border is content. What the model itself
wrote after the suffix, or is made to have written, is `reply`.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sfc.core.errors import UserError

PLAIN_TEMPLATE = "User: {prompt}\nAssistant:"
_SLOT = "{prompt}"
_PROBE = "\u2042probe\u2042"


class Role(IntEnum):
    """Which part of the template a token is."""

    PREFIX = 0
    CONTENT = 1
    SUFFIX = 2
    REPLY = 3


class TokenizedPrompt(NamedTuple):
    """A rendered prompt: token ids and, for each, its `Role`."""

    ids: Int[np.ndarray, " pos"]
    roles: Int[np.ndarray, " pos"]


def template_around(tokenizer: Any, template: str, system_prompt: str | None) -> tuple[str, str]:
    """The text before and after the user's prompt.

    Args:
        template: `chat` (the tokenizer's own), `plain`, or a text that holds `{prompt}` once.

    Raises:
        UserError: the tokenizer has no chat template, or the template does not hold the prompt exactly once.
    """
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("this model has no chat template: use --set model.template=plain or a text with {prompt}")
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages = [*system, {"role": "user", "content": _PROBE}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        around = rendered.split(_PROBE)
    else:
        around = (PLAIN_TEMPLATE if template == "plain" else template).split(_SLOT)
    if len(around) != 2:
        raise UserError(f"the template {template!r} must hold the prompt exactly once, written {{prompt}}")
    return around[0], around[1]


def tokenize_prompts(
    tokenizer: Any, texts: list[str], template: str = "chat", system_prompt: str | None = None, reply: str = ""
) -> list[TokenizedPrompt]:
    """Render each text in the template and tokenize it, with roles.

    A `reply` that is begun for the model comes after the template; a space sets it off where the template does not end
    in white space.

    A tokenizer's own special tokens (such as a BOS) are added only where the template does not write them itself.

    Raises:
        UserError: as `template_around`.
    """
    before, after = template_around(tokenizer, template, system_prompt)
    begun = f" {reply}" if reply and not after[-1:].isspace() else reply
    rendered = [before + text + after + begun for text in texts]
    writes_bos = template == "chat" or (tokenizer.bos_token is not None and before.startswith(tokenizer.bos_token))
    encoded = tokenizer(rendered, add_special_tokens=not writes_bos, return_offsets_mapping=True)
    prompts = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        start, end = np.array(offsets).T
        content_end = len(before) + len(text)
        roles = np.full(len(ids), Role.CONTENT)
        roles[end <= len(before)] = Role.PREFIX
        roles[(start >= content_end) & (end > content_end)] = Role.SUFFIX
        roles[start >= content_end + len(after)] = Role.REPLY
        prompts.append(TokenizedPrompt(np.array(ids), roles))
    return prompts


def answered(prompt: TokenizedPrompt, reply: Sequence[int]) -> TokenizedPrompt:
    """The prompt with the tokens of a reply after it."""
    return TokenizedPrompt(
        np.concatenate([prompt.ids, np.array(reply, dtype=prompt.ids.dtype)]),
        np.concatenate([prompt.roles, np.full(len(reply), Role.REPLY)]),
    )
