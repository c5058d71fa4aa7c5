"""What is run through the model to fill a store: the circuits' prompts, or another corpus for the SAEs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sfc.config import CorpusConfig, ModelConfig
from sfc.errors import UserError
from sfc.models.generation import generate_ids
from sfc.models.loading import Model
from sfc.progress import progress_bar, say
from sfc.prompts.corpus import pieces, read_texts
from sfc.prompts.render import Role, TokenizedPrompt, tokenize_prompts
from sfc.run import Run

_REPLY_BATCH_TOKENS = 4096


class Corpus(NamedTuple):
    """Token sequences, and a table that says what they are: `prompt` (the text), `split`, and what else is known."""

    table: pd.DataFrame
    sequences: list[TokenizedPrompt]

    @property
    def n_tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)


Tokenize = Callable[[list[str]], list[TokenizedPrompt]]


def circuit_prompts(run: Run, tokenize: Tokenize) -> Corpus:
    """The discovery and reference prompts. Test prompts are left out, so that nothing learned can have seen them.

    Raises:
        UserError: no prompt is short enough.
    """
    frame = run.prompts.frame
    return short_enough(tokenize, frame[frame["split"] != "test"], run.experiment.prompts.max_tokens)


def sae_corpus(run: Run, model: Model) -> Corpus:
    """What `corpus.source` names.

    Raises:
        UserError: the source cannot be read, or holds nothing.
    """
    config = run.experiment.corpus
    if config.source == "prompts":
        return circuit_prompts(run, model.tokenize)
    if config.source == "replies":
        return _with_replies(circuit_prompts(run, model.tokenize), model, config.reply_tokens)
    return _texts(config, model.tokenizer)


def short_enough(tokenize: Tokenize, frame: pd.DataFrame, max_tokens: int) -> Corpus:
    """The prompts of at most `max_tokens` tokens; how many are left out is said.

    Raises:
        UserError: none is short enough.
    """
    tokenized = tokenize(frame["prompt"].tolist())
    fits = np.array([len(prompt.ids) <= max_tokens for prompt in tokenized])
    if not fits.any():
        raise UserError(f"no prompt has at most {max_tokens} tokens: raise --set prompts.max_tokens=…")
    if not fits.all():
        say(f"left out: {(~fits).sum():,} prompts of more than {max_tokens} tokens")
    return Corpus(frame[fits].reset_index(drop=True), [tokenized[i] for i in np.flatnonzero(fits)])


def tokenizing(tokenizer: Any, config: ModelConfig) -> Tokenize:
    """How prompts are rendered and tokenized for a model of which only the tokenizer is loaded."""
    return lambda texts: tokenize_prompts(tokenizer, texts, config.template, config.system_prompt)


def _with_replies(corpus: Corpus, model: Model, reply_tokens: int) -> Corpus:
    with progress_bar("the model's replies", len(corpus.sequences), "prompts") as progress:
        replies = generate_ids(model, corpus.sequences, reply_tokens, _REPLY_BATCH_TOKENS, progress=progress)
    sequences = [
        TokenizedPrompt(
            np.concatenate([prompt.ids, np.array(reply, dtype=prompt.ids.dtype)]),
            np.concatenate([prompt.roles, np.full(len(reply), Role.REPLY)]),
        )
        for prompt, reply in zip(corpus.sequences, replies, strict=True)
    ]
    return Corpus(corpus.table, sequences)


def _texts(config: CorpusConfig, tokenizer: Any) -> Corpus:
    sequences = pieces(tokenizer, read_texts(config.source), config.context, config.max_tokens)
    texts = [tokenizer.decode(sequence.ids) for sequence in sequences]
    return Corpus(pd.DataFrame({"prompt": texts, "split": "corpus"}), sequences)
