"""The prompts of a steering run: those that directions are learned from, and those that are steered."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.behaviors.behavior import HARD
from sfc.core.errors import UserError
from sfc.data.read import load_prompt_file
from sfc.data.render import TokenizedPrompt
from sfc.data.schema import ALL, keyed_ranks
from sfc.models.batches import PACKED_TOKENS
from sfc.models.engine import PreparedPrompts, prepare_suffixes
from sfc.models.generation import with_replies
from sfc.models.positions import steered_tokens
from sfc.run import Run
from sfc.session import Session
from sfc.studies.collect.fill import Corpus, short_enough
from sfc.studies.steer import SteeringOptions

_LABELS = ("safe", "toxic")
_COLUMNS = ["id", "prompt", "category", "dataset_type", "label"]


class Side(NamedTuple):
    """Prompts of one label, ready to be steered."""

    prompts: pd.DataFrame
    prepared: PreparedPrompts


Tested = dict[str, Side]
"""by label, `safe` and `toxic`"""


def discovery_prompts(session: Session) -> Corpus:
    """Discovery prompts, equally many toxic and safe; for a contrast among hard prompts, more of these."""
    run, options = session.run, SteeringOptions.of(session.run.experiment)
    chosen = _some(run, _balanced(run), "discovery", options.prompts)
    if "hard-score" in options.wanted_contrasts:
        chosen = pd.concat([chosen, _some(run, _hard(run), "discovery", options.prompts)])
        chosen = chosen[~chosen.index.duplicated()]
    return _short_enough(session, chosen)


def test_corpus(session: Session) -> Corpus:
    """Prompts of the test split, as many toxic as safe."""
    return _short_enough(session, _test_frame(session.run))


def test_prompts(session: Session) -> Tested:
    """The same prompts, ready to be steered."""
    frame = _test_frame(session.run)
    return _by_label(session, frame.assign(label=np.where(frame["refusal_label"], "toxic", "safe"))[_COLUMNS])


def hard_prompts(session: Session) -> Side:
    """Hard prompts of the test split, ready to be steered: safe ones that look toxic.

    Raises:
        UserError: the category has none.
    """
    run, options = session.run, SteeringOptions.of(session.run.experiment)
    chosen = _some(run, _hard(run), "test", options.test_prompts)
    if chosen.empty:
        raise UserError(f"--when is tried on hard prompts too, and the test split has none of {options.category!r}")
    return _side(session, chosen.assign(label="safe")[_COLUMNS])


def xstest_prompts(session: Session, per_side: int | None = None) -> Tested:
    """The prompts of `steering.xstest` that are labelled safe or unsafe, ready to be steered.

    Args:
        per_side: at most this many of each label, chosen by hash.

    Raises:
        UserError: the file is malformed, or lacks one of the labels.
    """
    experiment = session.run.experiment
    file = Path(str(SteeringOptions.of(experiment).xstest))
    frame = load_prompt_file(file)
    frame = frame[frame["label"].isin(_LABELS)]
    if frame["label"].nunique() < len(_LABELS):
        raise UserError(f"{file} needs prompts labelled safe and ones labelled unsafe")
    if per_side is not None:
        frame = frame[keyed_ranks(frame, ["label"], f"steering {experiment.seed}") < per_side]
    return _by_label(session, frame)


def ordinary_prompts(session: Session) -> dict[str, PreparedPrompts]:
    """For the splits `reference` and `test`, safe prompts with replies of the model without its adapter."""
    run, options = session.run, SteeringOptions.of(session.run.experiment)
    frame = _balanced(run)
    safe, base = frame[~frame["refusal_label"]], session.without_adapter
    replied = {}
    for split in ("reference", "test"):
        prompts = _short_enough(session, _some(run, safe, split, options.ordinary_prompts)).sequences
        replied[split] = prepared(session, with_replies(base, prompts, options.ordinary_tokens, PACKED_TOKENS))
    return replied


def prepared(session: Session, prompts: list[TokenizedPrompt]) -> PreparedPrompts:
    """Prompts, ready to be steered at the tokens that the options name."""
    positions = SteeringOptions.of(session.run.experiment).positions
    return prepare_suffixes(session.model, prompts, partial(steered_tokens, positions))


def _by_label(session: Session, frame: pd.DataFrame) -> Tested:
    return {label: _side(session, frame[frame["label"] == label]) for label in _LABELS}


def _side(session: Session, frame: pd.DataFrame) -> Side:
    corpus = _short_enough(session, frame)
    return Side(corpus.table, prepared(session, corpus.sequences))


def _short_enough(session: Session, frame: pd.DataFrame) -> Corpus:
    return short_enough(session.model.tokenize, frame, session.run.experiment.prompts.max_tokens)


def _test_frame(run: Run) -> pd.DataFrame:
    return _some(run, _balanced(run), "test", SteeringOptions.of(run.experiment).test_prompts)


def _balanced(run: Run) -> pd.DataFrame:
    return run.balanced(run.group(SteeringOptions.of(run.experiment).category))


def _hard(run: Run) -> pd.DataFrame:
    category, frame = run.group(SteeringOptions.of(run.experiment).category), run.prompts.frame
    hard = frame[frame["dataset_type"] == HARD]
    return hard if category == ALL else hard[hard["category"] == category]


def _some(run: Run, frame: pd.DataFrame, split: str, per_side: int) -> pd.DataFrame:
    frame = frame[frame["split"] == split]
    return frame[keyed_ranks(frame, ["refusal_label"], f"steering {run.experiment.seed}") < per_side]
