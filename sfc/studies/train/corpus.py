"""What the SAEs learn from: every source that `corpus.source` names, mixed, and without the test prompts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sfc.core.config import SampleOptions
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.data.corpus import PROMPTS, SAMPLED, holds_prompt, is_chat, pieces, read_chats, read_texts
from sfc.data.render import answered, plain_ids
from sfc.data.schema import with_ids
from sfc.models.generation import with_replies
from sfc.session import Session
from sfc.studies.collect.fill import Corpus, circuit_prompts, short_enough
from sfc.studies.sample import SAMPLE
from sfc.studies.sample.write import read_sample
from sfc.studies.study import ensure

_SPLIT = "corpus"
"""the split of whatever is not among the circuits' prompts"""
_REPLY_BATCH_TOKENS = 4096


def sae_corpus(session: Session) -> Corpus:
    """All that `corpus.source` names, one source after the other; conversations are sampled first where needed.

    Instructions that an earlier source has are left out, and so are test prompts: as an instruction, as a text, or as a
    line of an instruction, a reply or a text.

    Raises:
        UserError: a source cannot be read, or holds nothing.
    """
    parts: list[Corpus] = []
    for source in session.run.experiment.corpus.sources:
        is_chats = source in (PROMPTS, SAMPLED) or is_chat(source)
        parts.append(_chats(session, source, parts) if is_chats else _texts(session, source))
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return Corpus(table, [sequence for part in parts for sequence in part.sequences])


def _test_ids(session: Session) -> set[str]:
    prompts = session.run.prompts.frame
    return set(prompts.loc[prompts["split"] == "test", "id"])


def _texts(session: Session, source: str) -> Corpus:
    config, tokenizer, test = session.run.experiment.corpus, session.model.tokenizer, _test_ids(session)
    texts = (text for text in read_texts(source) if not holds_prompt(text, test))
    sequences = pieces(tokenizer, texts, config.context, config.max_tokens)
    table = pd.DataFrame({"prompt": [tokenizer.decode(sequence.ids) for sequence in sequences], "split": _SPLIT})
    return Corpus(with_ids(table), sequences)


def _chats(session: Session, source: str, before: Sequence[Corpus]) -> Corpus:
    """Instructions in the model's template, with their replies where these are known or wanted."""
    model, config, longest = session.model, session.run.experiment.corpus, session.run.experiment.prompts.max_tokens
    if source == PROMPTS:
        table, sequences = circuit_prompts(session.run, model.tokenize)
        replies = [""] * len(sequences)
    else:
        table, sequences = short_enough(model.tokenize, _new_rows(session, source, before), longest)
        replies = table.pop("reply").tolist()
    # What the model wrote itself ends with its end of turn; what a file says is text.
    known = (
        model.tokenizer(replies, add_special_tokens=False)["input_ids"]
        if source == SAMPLED
        else [plain_ids(model.tokenizer, reply) for reply in replies]
    )
    most = None if source == SAMPLED else config.reply_tokens
    sequences = [answered(sequence, ids[:most]) for sequence, ids in zip(sequences, known, strict=True)]
    wanted = np.array([config.replies and not reply for reply in replies])
    if source not in (PROMPTS, SAMPLED) and config.max_tokens is not None:
        lengths = np.array([len(sequence.ids) for sequence in sequences]) + wanted * config.reply_tokens
        fits = max(int((lengths.cumsum() <= config.max_tokens).sum()), 1)
        table, sequences, wanted = table.iloc[:fits], sequences[:fits], wanted[:fits]
    if wanted.any():
        asked = [sequences[row] for row in np.flatnonzero(wanted)]
        with progress_bar("the model's replies", len(asked), "prompts") as progress:
            made = with_replies(model, asked, config.reply_tokens, _REPLY_BATCH_TOKENS, progress)
        for row, sequence in zip(np.flatnonzero(wanted), made, strict=True):
            sequences[row] = sequence
    return Corpus(table, sequences)


def _new_rows(session: Session, source: str, before: Sequence[Corpus]) -> pd.DataFrame:
    """The instructions of a source that are no test prompts and in no earlier source; columns as `Corpus`, and `reply`.

    Raises:
        UserError: the source cannot be read, or has none.
    """
    run, test = session.run, _test_ids(session)
    if source == SAMPLED:
        folder = ensure(SAMPLE, run, session=session).folder
        chats = read_sample(folder, SampleOptions.of(run.experiment).tokens)
    else:
        chats = read_chats(source)
    rows = with_ids(pd.DataFrame(list(chats), columns=["prompt", "reply"])).assign(split=_SPLIT)
    in_test = [
        any(holds_prompt(text, test) for text in texts) for texts in zip(rows["prompt"], rows["reply"], strict=True)
    ]
    known = {id for corpus in before for id in corpus.table["id"]}
    is_old = rows.duplicated("id") | rows["id"].isin(known)
    new = rows[~is_old & ~np.array(in_test, dtype=bool)]
    if new.empty:
        raise UserError(f"corpus.source {source!r} has no instruction that is not in the test split or known already")
    if len(new) < len(rows):
        say(f"left out: {len(rows) - len(new):,} instructions of {source} that are test prompts or known already")
    return new
