"""What SAEs are trained and measured on: rows of a store, or of runs of the model where no store would fit the disk.

The rows are those of every source that `corpus.source` names, mixed, and without the test prompts. Dictionaries that
others trained, in place of our own, are fetched, checked on such rows, and copied.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.core.artifacts import replacing
from sfc.core.config import Experiment, SampleOptions, Source
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.core.ranks import told
from sfc.data.corpus import PROMPTS, SAMPLED, holds_prompt, is_chat, pieces, read_chats, read_texts
from sfc.data.render import Role, answered, plain_ids
from sfc.data.schema import keyed_numbers, keyed_ranks, with_ids
from sfc.models.generation import with_replies
from sfc.models.loading import Model, choose_device
from sfc.run import Run
from sfc.saes.architectures import CONFIG_FILE, WEIGHTS_FILE
from sfc.saes.dictionary import Dictionary
from sfc.saes.format import load_dictionary
from sfc.saes.plan import TokenTable, joined, plan_batches
from sfc.saes.published import in_saelens_format
from sfc.saes.quality import ALL, DECIDING, quality_by_role
from sfc.saes.source import check_site, local_dictionaries, source_of
from sfc.saes.store import Store, read_prompts, stored_sites
from sfc.saes.stream import BLOCKS_PER_BUFFER, RowSource, live_source, stored_source
from sfc.session import Session
from sfc.studies.collect import COLLECT
from sfc.studies.collect.fill import Corpus, circuit_prompts, fill_corpus, n_bytes, short_enough
from sfc.studies.sample import SAMPLE
from sfc.studies.sample.write import read_sample
from sfc.studies.study import ensure


@dataclass(frozen=True)
class TrainingRows:
    """Rows of activations, what they are, and which are kept from training."""

    table: pd.DataFrame
    """the prompts (or pieces of text), and whether one is `held_out` to be measured on, or `trained` on"""
    tokens: TokenTable
    source: Callable[[Sequence[str]], RowSource]
    """the rows at some sites"""
    held_out: Callable[[str], Iterator["HeldOutBlock"]]
    """the held-out rows at a site, block by block"""

    @property
    def trained(self) -> Bool[np.ndarray, " rows"]:
        """Which rows are trained on."""
        return self.table["trained"].to_numpy()[self.tokens.prompt]

    def weights(self, deciding_share: float) -> Float[np.ndarray, " rows"]:
        """How often each row is trained on in an epoch.

        Args:
            deciding_share: of all that are trained on, so many are deciding tokens, if there are fewer by themselves
                and any at all; those are trained on more than once.
        """
        weights = self.trained.astype(float)
        deciding = self.trained & is_deciding(self.tokens)
        others, n_deciding = int(self.trained.sum() - deciding.sum()), int(deciding.sum())
        if n_deciding and others:
            weights[deciding] = max(deciding_share / (1 - deciding_share) * others / n_deciding, 1)
        return weights


def is_deciding(tokens: TokenTable) -> Bool[np.ndarray, " rows"]:
    """The tokens after which the model begins a reply: the last one of the template after each prompt."""
    in_suffix = tokens.role == Role.SUFFIX
    goes_on = np.append((tokens.prompt[1:] == tokens.prompt[:-1]) & in_suffix[1:], False)
    return in_suffix & ~goes_on


class HeldOutBlock(NamedTuple):
    """A block of held-out rows in float32, and their roles or `DECIDING`; for a transcoder with the rows it reads."""

    rows: Float[Tensor, "rows d"]
    roles: Int[np.ndarray, " rows"]
    read: Float[Tensor, "rows d_read"] | None = None


def held_out_rows(rows: TrainingRows, dictionary: Dictionary) -> Iterator[HeldOutBlock]:
    """The held-out rows that a dictionary writes and reads."""
    written = rows.held_out(dictionary.writes)
    if dictionary.reads == dictionary.writes:
        yield from written
    else:
        for block, read in zip(written, rows.held_out(dictionary.reads), strict=True):
            yield block._replace(read=read.rows)


def training_rows(session: Session) -> TrainingRows:
    """Open the rows of `corpus.source`; collect them into a store first, where that is wanted and fits.

    Raises:
        UserError: the corpus cannot be read, or is too small to keep a part of it from training.
    """
    run, experiment = session.run, session.run.experiment
    sites = run.sites
    if told(lambda: set(sites) <= set(stored_sites(run.corpus))):
        return _stored_rows(run)
    model = session.model
    corpus = sae_corpus(session)
    needed = sum(n_bytes(corpus.sequences, model.width(site), experiment.activations.dtype) for site in sites)
    free = shutil.disk_usage(run.root).free
    wanted = experiment.corpus.stored
    if told(lambda: wanted == "always" or (wanted == "auto" and needed < 0.9 * free)):
        if run.corpus == run.store:
            ensure(COLLECT, run, session=session)
        else:
            fill_corpus(run, model, corpus, sites)
        return _stored_rows(run)
    say(f"not stored ({needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB free): the model runs again for every epoch")
    return _live_rows(run, model, corpus)


def _stored_rows(run: Run) -> TrainingRows:
    store = Store(run.corpus.folder)
    table = _with_held_out(read_prompts(run.corpus.folder), run.experiment)
    is_held_out, roles = table["held_out"].to_numpy()[store.tokens.prompt], _roles(store.tokens)

    def held_out(site: str) -> Iterator[HeldOutBlock]:
        for start, stop in store.blocks(_block_rows(run)):
            wanted = is_held_out[start:stop]
            if wanted.any():
                rows = store.read(site, start, stop)[torch.from_numpy(wanted)]
                yield HeldOutBlock(rows, roles[start:stop][wanted])

    return TrainingRows(table, store.tokens, lambda sites: stored_source(store, sites, _block_rows(run)), held_out)


def _live_rows(run: Run, model: Model, corpus: Corpus) -> TrainingRows:
    experiment = run.experiment
    config, dtype = experiment.activations, getattr(torch, experiment.activations.dtype)
    table = _with_held_out(corpus.table, experiment)
    batches = plan_batches(corpus.sequences, config, model.device)
    held_out_sequences = [sequence for sequence, out in zip(corpus.sequences, table["held_out"], strict=True) if out]
    held_out_batches = plan_batches(held_out_sequences, config, model.device)
    roles = _roles(joined([batch.tokens for batch in held_out_batches]))

    def held_out(site: str) -> Iterator[HeldOutBlock]:
        source = live_source(model, held_out_batches, [site], dtype, _block_rows(run))
        for block, (start, stop) in enumerate(pairwise(source.starts)):
            yield HeldOutBlock(source.read(block)[0], roles[start:stop])

    return TrainingRows(
        table,
        joined([batch.tokens for batch in batches]),
        lambda sites: live_source(model, batches, sites, dtype, _block_rows(run)),
        held_out,
    )


def _roles(tokens: TokenTable) -> Int[np.ndarray, " rows"]:
    return np.where(is_deciding(tokens), DECIDING, tokens.role)


def _block_rows(run: Run) -> int:
    return max(run.experiment.saes.buffer_rows // BLOCKS_PER_BUFFER, 1)


def _with_held_out(table: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """Add which prompts are kept from training and which are trained on, chosen by hash within each split."""
    ranks = keyed_ranks(table, ["split"], f"held out {experiment.seed}").to_numpy()
    sizes = table.groupby("split")["prompt"].transform("size").to_numpy()
    held_out = ranks < np.ceil(experiment.saes.held_out * sizes)
    trained = ~held_out
    if experiment.saes.half is not None:
        # By the text, so that one that is there twice is in one half.
        of_texts = keyed_numbers(table["prompt"], f"half {experiment.seed}") % 2
        trained &= of_texts == ("first", "second").index(experiment.saes.half)
    if not held_out.any() or not trained.any():
        raise UserError("saes.held_out leaves nothing to train on or nothing to measure on: --set saes.held_out=0.05")
    return table.assign(held_out=held_out, trained=trained)


def adopt_dictionaries(run: Run, source: Source, folder: Path) -> None:
    """Copy the dictionary of each site from `source` (see `saes.source`) into `folder`.

    Raises:
        UserError: a dictionary cannot be fetched or read.
    """
    sites = run.experiment.activations.sites
    local = local_dictionaries(source, sites)
    with progress_bar("fetching", len(sites), "dictionaries") as progress:
        for site in sites:
            with TemporaryDirectory(dir=folder, prefix=".fetched-") as scratch:
                origin = in_saelens_format(source_of(source, site), local.get(site), Path(scratch))
                check_site(origin, site)
                _copy(origin, folder / site)
            progress(1)


def check_adopted(run: Run, folder: Path, rows: TrainingRows) -> None:
    """Refuse adopted dictionaries that do not fit the held-out rows, and remove them.

    Raises:
        UserError: one is damaged, or does not fit (see `check_fit`).
    """
    sites, smallest = run.experiment.activations.sites, run.experiment.saes.min_variance_explained
    device = choose_device(run.device)
    with progress_bar("checking", len(sites), "dictionaries") as progress:
        for site in sites:
            try:
                dictionary = load_dictionary(folder / site, device, run.experiment.saes.dtype)
                check_fit(dictionary, held_out_rows(rows, dictionary), smallest)
            except UserError:
                shutil.rmtree(folder / site)
                raise
            progress(1)


def check_fit(dictionary: Dictionary, blocks: Iterable[HeldOutBlock], smallest: float) -> float:
    """The fraction of the variance of these rows that the dictionary explains.

    Raises:
        UserError: its width is not that of the rows, or it explains less than `smallest`.
    """
    explained = 1 - quality_by_role(dictionary, _of_width(dictionary, blocks))[ALL].quality.fvu
    if not explained >= smallest:  # NaN is not a fit either
        raise UserError(
            f"{dictionary.site}: the dictionary explains {explained:.3f} of the variance of held-out activations, less"
            f" than saes.min_variance_explained={smallest:g}; it was made for another model or layer, or reads"
            " activations that were scaled or centred and its files do not say how"
        )
    return explained


def _of_width(dictionary: Dictionary, blocks: Iterable[HeldOutBlock]) -> Iterator[HeldOutBlock]:
    for block in blocks:
        read = block.rows if block.read is None else block.read
        for verb, width, rows in (("writes", dictionary.d_in, block.rows), ("reads", dictionary.d_read, read)):
            if width != rows.shape[1]:
                raise UserError(
                    f"{dictionary.site}: the dictionary {verb} activations of width {width}, those of this model have"
                    f" {rows.shape[1]}; it was made for another model"
                )
        yield block


def _copy(origin: Path, target: Path) -> None:
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        with replacing(target / name) as temporary:
            shutil.copyfile(origin / name, temporary)


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
