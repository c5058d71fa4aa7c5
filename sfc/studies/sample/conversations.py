"""Conversations of which the model writes both sides: the user's instruction, and its own reply.

A chat model that is given the template up to the user's words writes what users ask (Xu et al. 2024, Magpie). From
nothing at all a small model writes code and fragments, so that each instruction is begun by the first words of a known
prompt. Everything is drawn at temperature 1 from numbers that depend on the seed and the number of the batch alone.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sfc.data.render import Role, TokenizedPrompt
from sfc.data.schema import prompt_ids
from sfc.models.batches import TemplateLayout, pad
from sfc.models.generation import continue_tails, sampled
from sfc.models.kv_cached_suffix import flush_right
from sfc.models.loading import Model

FATES = ("unfinished", "malformed", "repeats", "test", "kept")
"""What becomes of an instruction: it did not end in time, is no plain request, is a copy of an earlier one or a test
prompt, or is kept"""

_MOST_WORDS = 6
_CODE = re.compile(r"[{}<>\[\]\\|=_#*~^`@$]|\w\(|\(\)|;\s*$|https?:|www\.", re.MULTILINE)
_DECLINES = re.compile(r"\bI(?:'m sorry|'m unable| am unable| can'?t| cannot| won't)\b.{0,20}\b(?:help|assist)", re.I)
_ENDS_WELL = re.compile(r"[\w.?!][\"')\u2019\u201d]?$")
_FEWEST_WORDS = 4
_LEAST_LETTERS = 0.75
_LEAST_DIFFERENT = 0.5


class Conversation(NamedTuple):
    """An instruction and the reply to it, both by the model."""

    prompt: str
    reply: str
    """as the model wrote it, its end-of-turn token included where it ended"""
    start: str
    """the words that the instruction was begun with"""
    kind: str
    """where these are from"""
    n_tokens: int
    """of the rendered conversation"""


class Start(NamedTuple):
    """The first words of an instruction, and where they are from."""

    text: str
    kind: str


def first_words(text: str, number: float) -> str:
    """One to six of the first words of a prompt, at most half of them, by a number in [0, 1)."""
    words = text.split()
    return " ".join(words[: 1 + int(number * min(_MOST_WORDS, max(len(words) // 2, 1)))])


def is_plain_request(text: str) -> bool:
    """Whether a text can stand as what somebody asks.

    It has at least four words, begins and ends like a sentence or a title, and is written in letters: no
    code, markup or addresses, at least three quarters of it letters and spaces, at least half of its words different
    ones. Nor does it decline to help, as a model does that has gone on in the other role.
    """
    words = text.lower().split()
    if len(words) < _FEWEST_WORDS or not text[0].isalnum() or not _ENDS_WELL.search(text):
        return False
    if _CODE.search(text) or _DECLINES.search(text) or "\ufffd" in text or not text.isprintable():
        return False
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return letters >= _LEAST_LETTERS * len(text) and len(set(words)) >= _LEAST_DIFFERENT * len(words)


def write_conversations(
    model: Model,
    starts: Sequence[Start],
    random: np.random.Generator,
    lengths: tuple[int, int],
    line_ends: Sequence[int],
    fate: Callable[[str], str | None],
) -> tuple[list[Conversation], dict[str, int]]:
    """A batch of conversations with these starts, and how many instructions met which of the `FATES`.

    Args:
        lengths: at most so many tokens of each instruction (its start not included), and of each reply.
        line_ends: ids of the tokens that end an instruction (`line_ends`), beside the model's end of a turn.
        fate: which of the fates an instruction meets that has ended and is a plain request; None: it is kept.
    """
    begun = [_without_suffix(prompt) for prompt in model.tokenize([start.text for start in starts])]
    written = _continued(model, begun, random.random((len(starts), lengths[0])), line_ends)
    counts, kept, texts = dict.fromkeys(FATES, 0), [], []
    for start, prompt, (ids, ended) in zip(starts, begun, written, strict=True):
        content = prompt.ids[prompt.roles == Role.CONTENT].tolist()
        text = model.tokenizer.decode([*content, *ids], skip_special_tokens=True).partition("\n")[0].strip()
        met = "unfinished" if not ended else "malformed" if not is_plain_request(text) else fate(text) or "kept"
        counts[met] += 1
        if met == "kept":
            kept.append(start)
            texts.append(text)
    if not kept:
        return [], counts
    asked = model.tokenize(texts)
    replies = [ids for ids, _ in _continued(model, asked, random.random((len(kept), lengths[1])), ())]
    decode: Callable[[list[int]], str] = model.tokenizer.decode
    return [
        Conversation(text, decode(reply), start.text, start.kind, len(prompt.ids) + len(reply))
        for text, reply, start, prompt in zip(texts, replies, kept, asked, strict=True)
    ], counts


def not_repeated(test: set[str]) -> Callable[[str], str | None]:
    """The fate of instructions that come one after the other: copies of earlier ones and test prompts are left out.

    Args:
        test: ids of the test prompts.
    """
    seen: set[str] = set()

    def fate(text: str) -> str | None:
        (id,) = prompt_ids([text])
        if id in test or id in seen:
            return "test" if id in test else "repeats"
        seen.add(id)
        return None

    return fate


def _continued(
    model: Model, prompts: list[TokenizedPrompt], uniforms: np.ndarray[Any, Any], also_end: Sequence[int]
) -> list[tuple[list[int], bool]]:
    """What follows each prompt, and whether the model ended it."""
    batch = flush_right(pad(prompts, TemplateLayout.of(prompts), model.device))
    choose = sampled(torch.from_numpy(uniforms).to(model.device))
    said = continue_tails(model, batch, uniforms.shape[1], choose=choose, also_end=also_end)
    return list(zip(said.ids, said.ended, strict=True))


def _without_suffix(prompt: TokenizedPrompt) -> TokenizedPrompt:
    before = prompt.roles != Role.SUFFIX
    return TokenizedPrompt(prompt.ids[before], prompt.roles[before])


def line_ends(tokenizer: Any) -> list[int]:
    """Ids of all tokens with a line break. An instruction is one line: after it, models go on in the other role."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if "\n" in text]
