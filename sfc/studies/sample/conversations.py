"""Conversations of which the model writes both sides: the user's instruction, and its own reply.

A chat model that is given the template up to the user's words writes what users ask (Xu et al. 2024, Magpie). From
nothing at all a small model writes code and fragments, so that each instruction is begun with the first words of a
known prompt, or with everyday ones. Everything is drawn at temperature 1.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from sfc.core.config import SampleOptions
from sfc.data.render import Role, TokenizedPrompt
from sfc.data.schema import prompt_ids
from sfc.models.batches import TemplateLayout, flush_right, pad, similar_lengths
from sfc.models.generation import continue_tails, end_tokens, sampled
from sfc.models.loading import Model

FATES = ("unfinished", "malformed", "copies", "test", "kept")
"""What becomes of an instruction: it does not end in time, is no plain request, is a copy of an earlier one or a test
prompt, or is kept"""

_MOST_FIRST_WORDS = 6
_CODE = re.compile(r"[{}<>\[\]\\|=_#*~^`@$]|\w\(|\(\)|;\s*$|https?:|www\.")
_DECLINES = re.compile(r"\bI(?:'m sorry|'m unable| am unable| can'?t| cannot| won't)\b.{0,20}\b(?:help|assist)", re.I)
_ENDS_WELL = re.compile(r"[\w.?!][\"')\u2019\u201d]?$")
_FEWEST_WORDS = 4
_LEAST_LETTERS = 0.75
_LEAST_DIFFERENT = 0.5
_BATCH_TOKENS = 4096


class Start(NamedTuple):
    """The words that an instruction is begun with, and where they are from."""

    text: str
    kind: str


class Conversation(NamedTuple):
    """An instruction and the reply to it, both by the model."""

    prompt: str
    reply: str
    """as the model wrote it, its end-of-turn token included where it ended; empty where none is wanted"""
    start: str
    kind: str
    n_tokens: int
    """of the rendered conversation"""


def first_words(text: str, number: float) -> str:
    """One to six of the first words of a prompt, at most half of them, as a number in [0, 1) says."""
    words = text.split()
    return " ".join(words[: 1 + int(number * min(_MOST_FIRST_WORDS, max(len(words) // 2, 1)))])


def is_plain_request(text: str) -> bool:
    """Whether a line can stand as what somebody asks.

    It has at least four words, begins with a letter or a digit and ends with one or with a full stop, a question or an
    exclamation mark; there is no code, markup or address in it, three quarters of it are letters and spaces, and half
    of its words are different ones. Nor does it decline to help, as a model does that has gone on in the other role.
    """
    words = text.lower().split()
    if len(words) < _FEWEST_WORDS or not text[0].isalnum() or not _ENDS_WELL.search(text):
        return False
    if _CODE.search(text) or _DECLINES.search(text) or "\ufffd" in text or not text.isprintable():
        return False
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return letters >= _LEAST_LETTERS * len(text) and len(set(words)) >= _LEAST_DIFFERENT * len(words)


class Writer:
    """Writes conversations, batch by batch. What was asked once is not asked again, and no test prompt is."""

    def __init__(self, model: Model, options: SampleOptions, test: set[str]) -> None:
        """A writer that has written nothing yet; `test` are the ids of the test prompts."""
        self._model, self._options, self._test = model, options, test
        self._asked: set[str] = set()
        texts = model.tokenizer.batch_decode([[token] for token in range(len(model.tokenizer))])
        (prompt,) = model.tokenize(["Hello."])
        # An instruction is one line: after that, a model goes on in the other role. And where the template has no token
        # that ends a turn, what comes after the user's words begins.
        self._after = prompt.ids[prompt.roles == Role.SUFFIX][:1].tolist()
        self._ends = {token for token, text in enumerate(texts) if "\n" in text} | set(self._after)

    def remember(self, prompt: str) -> None:
        """Never write an instruction that was written before."""
        self._asked.update(prompt_ids([prompt]))

    def write(self, starts: Sequence[Start], random: np.random.Generator) -> tuple[list[Conversation], dict[str, int]]:
        """Conversations with these starts, where they are kept, and how many instructions met which of the `FATES`."""
        options, tokenizer = self._options, self._model.tokenizer
        whole = self._model.tokenize([start.text for start in starts])
        begun = [TokenizedPrompt(*(part[prompt.roles != Role.SUFFIX] for part in prompt)) for prompt in whole]
        uniforms = random.random((len(starts), options.instruction_tokens))
        counts, kept = Counter[str](), list[tuple[Start, str]]()
        for start, prompt, ids in zip(starts, begun, self._continued(begun, uniforms, self._ends), strict=True):
            said = [*prompt.ids[prompt.roles == Role.CONTENT].tolist(), *(id for id in ids if id not in self._after)]
            text = tokenizer.decode(said, skip_special_tokens=True).strip().partition("\n")[0].strip()
            fate = self._fate(text, ended=ids[-1] in self._ends | end_tokens(self._model))
            counts[fate] += 1
            if fate == "kept":
                self.remember(text)
                kept.append((start, text))
        asked = self._model.tokenize([text for _, text in kept]) if kept else []
        replies: list[list[int]] = [[] for _ in asked]
        if options.reply_tokens:
            replies = self._continued(asked, random.random((len(kept), options.reply_tokens)), set())
        return [
            Conversation(text, tokenizer.decode(reply), start.text, start.kind, len(prompt.ids) + len(reply))
            for (start, text), prompt, reply in zip(kept, asked, replies, strict=True)
        ], {fate: counts[fate] for fate in FATES}

    def _fate(self, text: str, ended: bool) -> str:
        if not ended:
            return "unfinished"
        if not text or not (self._options.unfiltered or is_plain_request(text)):
            return "malformed"
        (id,) = prompt_ids([text])
        return "test" if id in self._test else "copies" if id in self._asked else "kept"

    def _continued(
        self, prompts: Sequence[TokenizedPrompt], uniforms: Float[np.ndarray, "prompts steps"], also_end: set[int]
    ) -> list[list[int]]:
        """What the model says after each prompt, drawn by the numbers in its row."""
        model, n_new = self._model, uniforms.shape[1]
        said: list[list[int]] = [[] for _ in prompts]
        for group in similar_lengths(prompts, _BATCH_TOKENS, n_new):
            some = [prompts[row] for row in group]
            batch = flush_right(pad(some, TemplateLayout.of(some), model.device))
            choose = sampled(torch.from_numpy(uniforms[group]).to(model.device))
            for row, ids in zip(
                group, continue_tails(model, batch, n_new, None, None, choose, also_end).ids, strict=True
            ):
                said[row] = ids
        return said
