"""What a steering run is made from: its prompts, the recording, the candidates, and the prompts to try them on."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sfc.circuits.files import load_circuit
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.core.sites import in_order, short_site, site_from_short, site_of
from sfc.data.balance import balance
from sfc.data.read import load_prompt_file
from sfc.data.render import Role, TokenizedPrompt
from sfc.data.schema import ALL, keyed_ranks
from sfc.models.batches import PACKED_TOKENS
from sfc.models.engine import PreparedPrompts, prepare_suffixes
from sfc.models.generation import generate_replies
from sfc.models.judge import is_refusal
from sfc.models.loading import Model, without_adapter
from sfc.models.positions import steered_tokens
from sfc.pipeline import circuit_artifact
from sfc.pipeline_study import BEST, direction_source
from sfc.run import Run
from sfc.saes.format import load_dictionaries
from sfc.studies.collect.fill import Corpus, short_enough
from sfc.studies.steer.directions import (
    Contrast,
    Vector,
    circuit_directions,
    difference_of_means,
    direction_of_feature,
    make_contrast,
    probe_direction,
)
from sfc.studies.steer.options import ContrastKind, SteeringOptions
from sfc.studies.steer.select import Candidate, Fold, Recording, record
from sfc.studies.steer.sweep import with_replies

_SPREAD_LAYERS = 10
_LABELS = ("safe", "toxic")


class Side(NamedTuple):
    """Prompts of one label, ready to be steered."""

    prompts: pd.DataFrame
    prepared: PreparedPrompts


Tested = Mapping[str, Side]
"""by label, `safe` and `toxic`"""


class Learned(NamedTuple):
    """What was learned from the discovery split."""

    recording: Recording
    contrasts: Mapping[ContrastKind, Contrast]
    fold: Int[np.ndarray, " prompts"]
    """of each recorded prompt"""
    candidates: list[Candidate]

    def vector(self, contrast: Contrast, candidate: Candidate) -> Vector:
        """A contrast's difference of means where the candidate was read; at the last token if it was read nowhere."""
        rows = self.recording.at(candidate.site, candidate.token or -1)[torch.from_numpy(contrast.rows)]
        return difference_of_means(rows, contrast.positive)


def learn(run: Run, model: Model) -> Learned:
    """Record the discovery prompts, make the contrasts and the candidates.

    Raises:
        UserError: there are too few prompts, or the model or a dictionary lacks what is named.
    """
    config, seed = SteeringOptions.of(run.experiment), run.experiment.seed
    fixed = _fixed_directions(run, model)
    sites = list(fixed) or [site_of(kind, layer) for layer in _layers(model, config) for kind in config.kinds]
    if config.when:
        sites = _after_the_condition(run, sites)
    corpus = _discovery(run, model)
    n_tokens = min(int((prompt.roles == Role.SUFFIX).sum()) for prompt in corpus.sequences) or 1
    with progress_bar("recording", len(corpus.sequences), "prompts") as progress:
        recording = record(model, corpus.table, corpus.sequences, in_order(sites), n_tokens, progress)
    contrasts = _contrasts(run, model, recording)
    fold = keyed_ranks(recording.prompts, ["refusal_label"], f"fold {seed}").to_numpy() % config.folds
    if fixed:
        candidates = [
            Candidate(site, None, vector, [vector] * config.folds, recording.norm(site))
            for site, vector in fixed.items()
            if site in sites
        ]
    else:
        learner = probe_direction if config.direction == "probe" else difference_of_means
        contrast = contrasts["toxic-safe" if config.direction == "probe" else config.direction]  # pyright: ignore
        candidates = [
            _learned(recording, contrast, fold, (site, token), learner)
            for site in recording.activations
            for token in range(-n_tokens, 0)
        ]
    return Learned(recording, contrasts, fold, candidates)


def folds_of(run: Run, model: Model, learned: Learned) -> list[Fold]:
    """For each fold, some of its safe and toxic prompts, ready to be steered."""
    config = SteeringOptions.of(run.experiment)
    toxic = learned.recording.prompts["refusal_label"].to_numpy(dtype=bool)
    place = keyed_ranks(learned.recording.prompts, ["refusal_label"], f"fold {run.experiment.seed}").to_numpy()
    # Prompts are dealt to folds by place, so that the first places hold equally many of each fold.
    tried = place < max(config.tried_prompts, config.folds)

    def prepared(side: np.ndarray, number: int) -> PreparedPrompts:
        chosen = np.flatnonzero(side & tried & (learned.fold == number))
        return _prepared(model, [learned.recording.tokenized[i] for i in chosen], config)

    return [Fold(prepared(~toxic, number), prepared(toxic, number)) for number in range(config.folds)]


def test_prompts(run: Run, model: Model) -> Tested:
    """Prompts of the test split, as many toxic as safe, ready to be steered."""
    frame = _test_frame(run)
    columns = ["id", "prompt", "category", "dataset_type", "label"]
    return _by_label(run, model, frame.assign(label=np.where(frame["refusal_label"], "toxic", "safe"))[columns])


def test_corpus(run: Run, model: Model) -> tuple[list[TokenizedPrompt], np.ndarray]:
    """The same prompts in one list, and which of them are toxic."""
    corpus = short_enough(model.tokenize, _test_frame(run), run.experiment.prompts.max_tokens)
    return corpus.sequences, corpus.table["refusal_label"].to_numpy(dtype=bool)


def _test_frame(run: Run) -> pd.DataFrame:
    return _some(_balanced(run), "test", SteeringOptions.of(run.experiment).test_prompts, run.experiment.seed)


def xstest_prompts(run: Run, model: Model, per_side: int | None = None) -> Tested | None:
    """The prompts of `steering.xstest` that are labelled safe or unsafe, ready to be steered; None without a file.

    Args:
        per_side: at most this many of each label, chosen by hash.

    Raises:
        UserError: the file is malformed, or has not both kinds.
    """
    file = SteeringOptions.of(run.experiment).xstest
    if file is None:
        return None
    path = Path(file)
    frame = load_prompt_file(path)
    frame = frame[frame["label"].isin(_LABELS)]
    if frame["label"].nunique() < len(_LABELS):
        raise UserError(f"{path} needs prompts labelled safe and ones labelled unsafe")
    if per_side is not None:
        frame = frame[keyed_ranks(frame, ["label"], f"steering {run.experiment.seed}") < per_side]
    return _by_label(run, model, frame)


def hard_prompts(run: Run, model: Model) -> Side:
    """Hard prompts of the test split, ready to be steered: safe ones that models tend to refuse.

    Raises:
        UserError: the category has none.
    """
    config, frame = SteeringOptions.of(run.experiment), run.prompts.frame
    wanted = frame["dataset_type"] == "hard"
    if config.category != ALL:
        wanted &= frame["category"] == config.category
    chosen = _some(frame[wanted], "test", config.test_prompts, run.experiment.seed)
    if chosen.empty:
        raise UserError(f"--when is tried on hard prompts too, and the test split has none of {config.category!r}")
    corpus = short_enough(model.tokenize, chosen.assign(label="safe"), run.experiment.prompts.max_tokens)
    columns = ["id", "prompt", "category", "dataset_type", "label"]
    return Side(corpus.table[columns], _prepared(model, corpus.sequences, config))


def _by_label(run: Run, model: Model, frame: pd.DataFrame) -> Tested:
    corpora = {
        label: short_enough(model.tokenize, frame[frame["label"] == label], run.experiment.prompts.max_tokens)
        for label in _LABELS
    }
    return {
        label: Side(corpus.table, _prepared(model, corpus.sequences, SteeringOptions.of(run.experiment)))
        for label, corpus in corpora.items()
    }


def ordinary_prompts(run: Run, model: Model) -> dict[str, PreparedPrompts]:
    """For the splits `reference` and `test`, safe prompts with replies of the model without its adapter."""
    config, seed = SteeringOptions.of(run.experiment), run.experiment.seed
    frame = _balanced(run)
    safe = frame[~frame["refusal_label"]]
    prompts = {
        split: short_enough(
            model.tokenize, _some(safe, split, config.ordinary_prompts, seed), run.experiment.prompts.max_tokens
        ).sequences
        for split in ("reference", "test")
    }
    base = without_adapter(model)
    return {
        split: _prepared(model, with_replies(base, chosen, config.ordinary_tokens), config)
        for split, chosen in prompts.items()
    }


def _prepared(model: Model, prompts: list[TokenizedPrompt], config: SteeringOptions) -> PreparedPrompts:
    return prepare_suffixes(model, prompts, partial(steered_tokens, config.positions))


def _balanced(run: Run) -> pd.DataFrame:
    category = (
        None if SteeringOptions.of(run.experiment).category == ALL else SteeringOptions.of(run.experiment).category
    )
    return balance(run.prompts.frame, category, run.experiment.prompts.hard_share, run.experiment.seed)[0]


def _some(frame: pd.DataFrame, split: str, per_side: int, seed: int) -> pd.DataFrame:
    frame = frame[frame["split"] == split]
    return frame[keyed_ranks(frame, ["refusal_label"], f"steering {seed}") < per_side]


def _discovery(run: Run, model: Model) -> Corpus:
    """Discovery prompts, equally many toxic and safe; for a contrast among hard prompts, more of these."""
    config, seed = SteeringOptions.of(run.experiment), run.experiment.seed
    chosen = _some(_balanced(run), "discovery", config.prompts, seed)
    if "hard-score" in _wanted(config):
        frame = run.prompts.frame
        hard = frame[frame["dataset_type"] == "hard"]
        if config.category != ALL:
            hard = hard[hard["category"] == config.category]
        chosen = pd.concat([chosen, _some(hard, "discovery", config.prompts, seed)])
        chosen = chosen[~chosen.index.duplicated()]
    return short_enough(model.tokenize, chosen, run.experiment.prompts.max_tokens)


def _after_the_condition(run: Run, sites: list[str]) -> list[str]:
    """The sites at which the condition is known when the model gets there; how many are left out is said."""
    name = str(SteeringOptions.of(run.experiment).when)
    known_at = site_from_short(name.partition("/")[0]) if name != BEST else run.experiment.activations.sites[0]
    kept = [site for site in sites if in_order([known_at, site])[0] == known_at]
    if not kept:
        raise UserError(f"--when {name} is known at {short_site(known_at)} only: steer there or later (--layers)")
    if len(kept) < len(sites):
        say(f"left out: {len(sites) - len(kept)} of {len(sites)} sites, which come before {short_site(known_at)}")
    return kept


def _layers(model: Model, config: SteeringOptions) -> list[int]:
    layers = sorted(set(config.layers)) or sorted(
        {*np.linspace(0, model.n_layers - 1, _SPREAD_LAYERS).round().astype(int).tolist()}
    )
    if not 0 <= layers[0] <= layers[-1] < model.n_layers:
        raise UserError(f"steering.layers names layers the model has not: it has 0 to {model.n_layers - 1}")
    return layers


def _wanted(config: SteeringOptions) -> list[ContrastKind]:
    """The contrasts to make: those to be compared, and the one that is steered along, which comes first."""
    own = direction_source(config.direction)
    return list(dict.fromkeys([*([own] if own else []), *config.contrasts]))  # pyright: ignore[reportReturnType]


def _contrasts(run: Run, model: Model, recording: Recording) -> dict[ContrastKind, Contrast]:
    config, refused = SteeringOptions.of(run.experiment), None
    wanted = _wanted(config)
    if "refused-complied" in wanted:
        with progress_bar("judging replies", len(recording.tokenized), "prompts") as progress:
            replies = generate_replies(
                model, recording.tokenized, config.reply_tokens, 2 * PACKED_TOKENS, progress=progress
            )
        refused = np.array([is_refusal(reply) for reply in replies])
    contrasts: dict[ContrastKind, Contrast] = {}
    for kind in wanted:
        try:
            contrasts[kind] = make_contrast(kind, recording.prompts, recording.scores, refused, run.experiment.seed)
        except UserError as error:
            if kind == direction_source(config.direction):
                raise
            say(f"left out of the comparison: {error}")
    return contrasts


def _learned(
    recording: Recording,
    contrast: Contrast,
    fold: Int[np.ndarray, " prompts"],
    place: tuple[str, int],
    learner: Callable[[Tensor, np.ndarray], Vector],
) -> Candidate:
    """The direction at a site and token, from all prompts and without each fold."""
    rows = recording.at(*place)

    def learn_from(part: Contrast) -> Vector:
        if part.positive.all() or not part.positive.any():
            raise UserError("a fold leaves nothing on one side of a contrast: raise --set steering.prompts=…")
        return learner(rows[torch.from_numpy(part.rows)], part.positive)

    by_fold = [learn_from(contrast.among(fold != number)) for number in range(int(fold.max()) + 1)]
    return Candidate(*place, learn_from(contrast), by_fold, recording.norm(place[0]))


def _fixed_directions(run: Run, model: Model) -> dict[str, Vector]:
    """By site, directions that are not learned from activations; none where they are."""
    name = SteeringOptions.of(run.experiment).direction
    if direction_source(name):
        return {}
    sites = run.experiment.activations.sites
    if name == "circuit":
        circuit = load_circuit(
            circuit_artifact(run, SteeringOptions.of(run.experiment).category).folder / "circuit.json"
        )
        return circuit_directions(circuit, load_dictionaries(run.saes.folder, sites))
    site, vector = direction_of_feature(run, name)
    return {site: vector}
