"""What is learned from discovery prompts: one recorded run, contrasts of two sides, and candidates for a direction.

toxic-safe        what the data set expects: toxic prompts against safe and hard ones
refused-complied  what the model did: judged refusals against compliances
hard-score        among hard prompts alone: the upper half by score against the lower half
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.behaviors.behavior import HARD
from sfc.circuits.files import load_circuit
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.core.sites import in_order, short_site, site_from_short, site_of
from sfc.data.render import Role, TokenizedPrompt
from sfc.data.schema import keyed_numbers, keyed_ranks
from sfc.models.batches import PACKED_TOKENS, cache_suffixes, similar_lengths
from sfc.models.generation import generate_replies
from sfc.models.interventions import recorder
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import Score
from sfc.session import Session
from sfc.studies.steer import BEST, ContrastKind, SteeringOptions, named_feature
from sfc.studies.steer.directions import (
    Candidate,
    Vector,
    circuit_directions,
    difference_of_means,
    feature_direction,
    probe_direction,
)
from sfc.studies.steer.prompts import discovery_prompts

SPREAD_LAYERS = 10
_FEWEST = 4


class Contrast(NamedTuple):
    """Rows of a recording, and on which side each stands."""

    rows: Int[np.ndarray, " chosen"]
    positive: Bool[np.ndarray, " chosen"]

    def among(self, wanted: Bool[np.ndarray, " prompts"]) -> "Contrast":
        """The contrast without the rows that are not wanted."""
        kept = wanted[self.rows]
        return Contrast(self.rows[kept], self.positive[kept])

    def shuffled(self, seed: int) -> "Contrast":
        """The same rows, dealt to the two sides by lot."""
        return Contrast(self.rows, np.random.default_rng(seed).permutation(self.positive))


def make_contrast(
    kind: ContrastKind,
    prompts: pd.DataFrame,
    scores: Float[np.ndarray, " prompts"],
    refused: Bool[np.ndarray, " prompts"] | None,
    seed: int,
) -> Contrast:
    """Choose the rows of each side; of the longer side, some by hash.

    Args:
        prompts: `prompt`, `dataset_type` and `refusal_label`, a row per prompt.
        refused: judged replies; only `refused-complied` asks for them.

    Raises:
        UserError: a side has fewer than four prompts.
    """
    toxic = prompts["refusal_label"].to_numpy(dtype=bool)
    if kind == "toxic-safe":
        sides = toxic, ~toxic
    elif kind == "refused-complied":
        if refused is None:
            raise ValueError("refused-complied needs judged replies")
        sides = refused, ~refused
    else:
        hard = (prompts["dataset_type"] == HARD).to_numpy()
        middle = np.median(scores[hard]) if hard.any() else 0.0
        sides = hard & (scores > middle), hard & (scores < middle)
    size = min(int(side.sum()) for side in sides)
    if size < _FEWEST:
        raise UserError(
            f"the contrast {kind} has {int(sides[0].sum())} against {int(sides[1].sum())} discovery prompts, and needs"
            f" {_FEWEST} on each side: raise --set steering.prompts=…, or choose other steering.contrasts"
        )
    numbers = keyed_numbers(prompts["prompt"], f"contrast {kind} {seed}")
    chosen = [np.flatnonzero(side)[np.argsort(numbers[side], kind="stable")[:size]] for side in sides]
    return Contrast(np.concatenate(chosen), np.repeat([True, False], size))


@dataclass(frozen=True)
class Recording:
    """Activations at the last tokens of prompts; every direction is learned from these."""

    prompts: pd.DataFrame
    """`prompt`, `category`, `dataset_type`, `refusal_label`, a row per prompt"""
    tokenized: list[TokenizedPrompt]
    scores: Float[np.ndarray, " prompts"]
    activations: dict[str, Float[Tensor, "prompts token d_model"]]
    """by site, in float32, on the CPU; the last token comes last"""

    @property
    def n_tokens(self) -> int:
        return next(iter(self.activations.values())).shape[1]

    def at(self, site: str, token: int) -> Float[Tensor, "prompts d_model"]:
        """The activations at one token, counted from the end (-1 is the last), in float64."""
        return self.activations[site][:, token].double()

    def norm(self, site: str) -> float:
        """Mean norm of the residual stream over prompts and recorded tokens: the unit of a dial's `alpha`."""
        return float(self.activations[site].double().norm(dim=-1).mean())


@torch.no_grad()
def last_tokens(
    model: Model,
    score: Score,
    prompts: Sequence[TokenizedPrompt],
    sites: Sequence[str],
    n_tokens: int,
    progress: Callable[[int], object] = lambda prompts: None,
) -> tuple[Float[np.ndarray, " prompts"], dict[str, Float[Tensor, "prompts token width"]]]:
    """Scores of the prompts, and activations at their last tokens by site, in float32, on the CPU.

    Args:
        progress: called with the number of prompts done since the last call.

    Raises:
        UserError: the model has no such site.
    """
    model.check_sites(sites)
    scores = np.empty(len(prompts))
    kept = {site: torch.empty(len(prompts), n_tokens, model.width(site)) for site in sites}
    for group in similar_lengths(prompts, PACKED_TOKENS):
        seen: dict[str, Tensor] = {}
        suffixes = cache_suffixes(model, [prompts[i] for i in group], n_tokens)
        logits = last_logits(model, suffixes, {site: recorder(seen, site) for site in sites})
        scores[group] = score(logits, suffixes).cpu().numpy()
        for site, activation in seen.items():
            kept[site][group] = activation.float().cpu()
        progress(len(group))
    return scores, kept


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


def learn(session: Session, circuit: Path | None) -> Learned:
    """Record the discovery prompts, make the contrasts and the candidates.

    Args:
        circuit: the file of the circuit whose features give the direction; None: it comes from elsewhere.

    Raises:
        UserError: there are too few prompts, or the model or a dictionary lacks what is named.
    """
    options, seed = SteeringOptions.of(session.run.experiment), session.run.experiment.seed
    fixed = _fixed_directions(session, circuit)
    sites = list(fixed) or [site_of(kind, layer) for layer in _layers(session.model, options) for kind in options.kinds]
    if options.when:
        sites = _after_the_condition(session, sites)
    corpus = discovery_prompts(session)
    n_tokens = min(int((prompt.roles == Role.SUFFIX).sum()) for prompt in corpus.sequences) or 1
    with progress_bar("recording", len(corpus.sequences), "prompts") as progress:
        scores, activations = last_tokens(
            session.model, session.metric, corpus.sequences, in_order(sites), n_tokens, progress
        )
    recording = Recording(corpus.table, corpus.sequences, scores, activations)
    contrasts = _contrasts(session, recording)
    fold = keyed_ranks(recording.prompts, ["refusal_label"], f"fold {seed}").to_numpy() % options.folds
    if options.contrast is None:
        candidates = [
            Candidate(site, None, vector, [vector] * options.folds, recording.norm(site))
            for site, vector in fixed.items()
            if site in sites
        ]
    else:
        learner = probe_direction if options.direction == "probe" else difference_of_means
        candidates = [
            _learned(recording, contrasts[options.contrast], fold, (site, token), learner)
            for site in recording.activations
            for token in range(-n_tokens, 0)
        ]
    return Learned(recording, contrasts, fold, candidates)


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


def _fixed_directions(session: Session, circuit: Path | None) -> dict[str, Vector]:
    """By site, directions that are not learned from activations; none where they are."""
    options = SteeringOptions.of(session.run.experiment)
    if options.contrast is not None:
        return {}
    if circuit is not None:
        return circuit_directions(load_circuit(circuit), session.dictionaries)
    site, feature = named_feature(options.direction, session.run.experiment.activations.sites)
    return {site: feature_direction(session.dictionaries[site], feature)}


def _layers(model: Model, options: SteeringOptions) -> list[int]:
    spread = np.linspace(0, model.n_layers - 1, SPREAD_LAYERS).round().astype(int).tolist()
    layers = sorted(set(options.layers or spread))
    if not 0 <= layers[0] <= layers[-1] < model.n_layers:
        raise UserError(f"steering.layers names layers that the model does not have: it has 0 to {model.n_layers - 1}")
    return layers


def _after_the_condition(session: Session, sites: list[str]) -> list[str]:
    """The sites at which the condition is known when the model gets there; how many are left out is said."""
    experiment = session.run.experiment
    name = str(SteeringOptions.of(experiment).when)
    known_at = site_from_short(name.partition("/")[0]) if name != BEST else experiment.activations.sites[0]
    kept = [site for site in sites if in_order([known_at, site])[0] == known_at]
    if not kept:
        raise UserError(f"--when {name} is known at {short_site(known_at)} only: steer there or later (--layers)")
    if len(kept) < len(sites):
        say(f"left out: {len(sites) - len(kept)} of {len(sites)} sites, which come before {short_site(known_at)}")
    return kept


def _contrasts(session: Session, recording: Recording) -> dict[ContrastKind, Contrast]:
    options, refused = SteeringOptions.of(session.run.experiment), None
    if "refused-complied" in options.wanted_contrasts:
        with progress_bar("judging replies", len(recording.tokenized), "prompts") as progress:
            replies = generate_replies(
                session.model, recording.tokenized, options.reply_tokens, 2 * PACKED_TOKENS, progress=progress
            )
        refused = np.array([session.run.judge(reply) for reply in replies])
    contrasts: dict[ContrastKind, Contrast] = {}
    for kind in options.wanted_contrasts:
        try:
            contrasts[kind] = make_contrast(
                kind, recording.prompts, recording.scores, refused, session.run.experiment.seed
            )
        except UserError as error:
            if kind == options.contrast:
                raise
            say(f"left out of the comparison: {error}")
    return contrasts
