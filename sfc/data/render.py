"""From a prompt's text to tokens, each with its role in the chat template.

Roles are found by character offsets in the rendered text: `prefix` (template before the user's text), `content`,
`suffix` (template after it, where the model decides). A token that spans a border is content. What the model itself
wrote after the suffix, or is made to have written, is `reply`.

A template is code that comes with a model. What it renders depends on nothing but itself and its arguments: a date that
it prints is always the same one. And what a prompt says stays text: where it spells a token of the template, such as
`<|im_end|>`, it is read as the characters that it is made of.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import IntEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sfc.core.errors import UserError, one_line

PLAIN_TEMPLATE = "User: {prompt}\nAssistant:"
_SLOT = "{prompt}"
_PROBE = "\u2042probe\u2042"
_DAY = datetime(2024, 7, 26)
"""the day on which every template is rendered"""
_DIRECTIVES = ("-d", "-m", "-j", "-H", "-I", "-M", *"aAbBdeFmyYjHIMSpfuwUWcxX", "%")
# Transformers gives no way to set the date that its function tells a template: a macro takes the function's place.
_PINNED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{letter}', {_DAY.strftime('%' + letter)!r})" for letter in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)
NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


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


def template_around(
    tokenizer: Any, template: str, system_prompt: str | None, arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> tuple[str, str]:
    """The text before and after the user's prompt.

    Args:
        template: `chat` (the tokenizer's own), `plain`, or a text that holds `{prompt}` once.
        arguments: variables of the chat template.

    Raises:
        UserError: the tokenizer has no chat template, or it cannot be rendered, or not twice the same way, or the
            template does not hold the prompt exactly once.
    """
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("this model has no chat template: use --set model.template=plain or a text with {prompt}")
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages = [*system, {"role": "user", "content": _PROBE}]
        rendered = _rendered(tokenizer, messages, arguments)
        if _rendered(tokenizer, messages, arguments) != rendered:
            raise UserError("this model's chat template renders otherwise each time: use a text with {prompt} instead")
        around = rendered.split(_PROBE)
    else:
        around = (PLAIN_TEMPLATE if template == "plain" else template).split(_SLOT)
    if len(around) != 2:
        raise UserError(f"the template {template!r} must hold the prompt exactly once, written {{prompt}}")
    return around[0], around[1]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], arguments: Mapping[str, Any]) -> str:
    try:
        source = tokenizer.get_chat_template()
        if "strftime_now" in source:
            source = _PINNED_DATE + source
        return tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=True, **arguments
        )
    except Exception as error:  # a template can raise whatever it likes
        raise UserError(
            f"this model's chat template cannot be rendered ({one_line(error)}): change model.system_prompt or"
            " model.template_arguments, or use model.template=plain or a text with {prompt}"
        ) from None


def tokenize_prompts(
    tokenizer: Any,
    texts: list[str],
    template: str = "chat",
    system_prompt: str | None = None,
    reply: str = "",
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> list[TokenizedPrompt]:
    """Render each text in the template and tokenize it, with roles.

    A `reply` that is begun for the model comes after the template; a space sets it off where the template does not end
    in white space.

    Special tokens that the tokenizer puts before every text by itself (such as a BOS) are added only where the template
    does not write them; what it puts after a text never is, because the model decides at the template's last token.

    Raises:
        UserError: as `template_around`, or a text spells a token of the template and cannot be read otherwise.
    """
    before, after = template_around(tokenizer, template, system_prompt, arguments)
    begun = f" {reply}" if reply and not after[-1:].isspace() else reply
    after_all = after + begun
    writes_bos = template == "chat" or (tokenizer.bos_token is not None and before.startswith(tokenizer.bos_token))
    opening = [] if writes_bos else opening_tokens(tokenizer)
    encoded = _encoded(tokenizer, [before + text + after_all for text in texts])
    control = control_tokens(tokenizer, before + after_all)
    [own] = _encoded(tokenizer, [before + "x" + after_all])
    prompts = []
    for text, tokens in zip(texts, encoded, strict=True):
        if control and _of(control, tokens) != _of(control, own):
            tokens = _with_plain_content(tokenizer, before, text, after_all, own, control)
        start, end = np.array([(0, 0)] * len(opening) + [offsets for _, offsets in tokens]).reshape(-1, 2).T
        content_end = len(before) + len(text)
        roles = np.full(len(start), Role.CONTENT)
        roles[end <= len(before)] = Role.PREFIX
        roles[(start >= content_end) & (end > content_end)] = Role.SUFFIX
        # Some of the template's tokens take in the white space of the text beside them.
        ids = np.array([*opening, *(token for token, _ in tokens)], dtype=np.int64)
        by_template = np.isin(ids, list(control))
        roles[by_template & (start < len(before))] = Role.PREFIX
        roles[by_template & (end > content_end)] = Role.SUFFIX
        roles[start >= content_end + len(after)] = Role.REPLY
        prompts.append(TokenizedPrompt(ids, roles))
    return prompts


_Tokens = list[tuple[int, tuple[int, int]]]
"""ids, and from which character to which each goes"""


def _encoded(tokenizer: Any, texts: list[str]) -> list[_Tokens]:
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [list(zip(ids, offsets, strict=True)) for ids, offsets in pairs]


def opening_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text by itself."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((start for start in starts if whole[start : start + len(bare)] == bare), 0)]


def control_tokens(tokenizer: Any, template: str = "") -> frozenset[int]:
    """Ids that no text of a user may become: special tokens, and whatever else a template writes as one token.

    The token of unknown characters is none of them, where it is nothing else as well.
    """
    used = {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "sep", "cls")}
    unknown = {getattr(tokenizer, "unk_token", None)} - used
    return frozenset(
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if not token.content.isspace()
        and (token.content in template or (token.special and token.content not in unknown))
    )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special ones; what spells such a token is read as its characters."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    control = control_tokens(tokenizer)
    return (
        ids
        if control.isdisjoint(ids)
        else _without_control(tokenizer, control).encode(text, add_special_tokens=False).ids
    )


def _of(control: frozenset[int], tokens: _Tokens) -> list[int]:
    return [token for token, _ in tokens if token in control]


def _with_plain_content(
    tokenizer: Any, before: str, text: str, after: str, own: _Tokens, control: frozenset[int]
) -> _Tokens:
    """The tokens of a prompt that spells tokens of the template, as plain text within the template's own.

    Args:
        own: tokens of the template around one character.

    Raises:
        UserError: the template is not read as it is around other prompts, or the prompt still as tokens of it.
    """
    start, end, rendered = len(before), len(before) + len(text), before + text + after
    prefix = [(token, span) for token, span in own if span[1] <= start]
    suffix = [(token, (a + len(text) - 1, b + len(text) - 1)) for token, (a, b) in own if a > start]
    # Read from the template's last token before the text to its first after it: nothing merges with these.
    first = max((number for number, (token, _) in enumerate(prefix, 1) if token in control), default=0)
    last = min((number for number, (token, _) in enumerate(suffix) if token in control), default=len(suffix))
    at, to = prefix[first - 1][1][1] if first else 0, suffix[last][1][0] if last < len(suffix) else len(rendered)
    read = _without_control(tokenizer, control, at > 0).encode(rendered[at:to], add_special_tokens=False)
    inside = [(token, (a + at, b + at)) for token, (a, b) in zip(read.ids, read.offsets, strict=True)]
    tokens = [*prefix[:first], *inside, *suffix[last:]]
    begins = [token for token, span in tokens if span[1] <= start]
    ends = [token for token, span in tokens if span[0] >= end and span[1] > end]
    is_same = (
        begins == [token for token, _ in prefix][: len(begins)]
        and ends == [token for token, _ in suffix][len(suffix) - len(ends) :]
    )
    if not is_same or _of(control, inside):
        raise UserError(
            f"the prompt {text[:60]!r} spells a token of the model's template, which this tokenizer cannot read as"
            " plain text: leave it out"
        )
    return tokens


@lru_cache(maxsize=4)
def _without_control(tokenizer: Any, control: frozenset[int], goes_on: bool = False) -> Any:
    """A tokenizer that reads what spells these tokens as plain text.

    Args:
        goes_on: it reads what comes after something else, where some put no space before the first word.
    """
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["id"] in control
    as_text = json.dumps(described)
    if goes_on:
        as_text = as_text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    plain = Tokenizer.from_str(as_text)
    plain.encode_special_tokens = True
    plain.no_padding()
    plain.no_truncation()
    return plain


def answered(prompt: TokenizedPrompt, reply: Sequence[int]) -> TokenizedPrompt:
    """The prompt with the tokens of a reply after it."""
    return TokenizedPrompt(
        np.concatenate([prompt.ids, np.array(reply, dtype=prompt.ids.dtype)]),
        np.concatenate([prompt.roles, np.full(len(reply), Role.REPLY)]),
    )
