"""One run of the prompts that directions are learned from, recorded at all sites that matter.

Which direction to steer along: candidates tried on prompts that they were not learned from.

As Arditi et al. 2024, a good refusal direction induces refusal on safe prompts when the dial is turned up, removes it
from toxic ones when it is turned down, and turning it down hardly changes what comes after safe prompts. They turn it
down by projecting the direction out, and so does `project-out`; `add` and `clamp` subtract. Candidates that fail a
requirement are rejected, with the reason; of the others the one is chosen whose dial has the widest swing: induced -
removed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.core.errors import UserError
from sfc.core.sites import kind_of, layer_of
from sfc.data.render import TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import PACKED_TOKENS, similar_lengths
from sfc.models.edits import Steering, SteeringEdit, residual_sites
from sfc.models.engine import NO_EDIT, PreparedPrompts, Progress
from sfc.models.interventions import recorder
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.models.tails import make_tails
from sfc.studies.steer.directions import Vector, cosine
from sfc.studies.steer.options import SteeringOptions


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


def record(
    model: Model,
    prompts: pd.DataFrame,
    tokenized: Sequence[TokenizedPrompt],
    sites: Sequence[str],
    n_tokens: int,
    progress: Callable[[int], object] = lambda prompts: None,
) -> Recording:
    """Run the prompts once and keep the last `n_tokens` tokens at each site.

    Args:
        progress: called with the number of prompts done since the last call.

    Raises:
        UserError: the model has no such site.
    """
    scores, activations = last_tokens(model, tokenized, sites, n_tokens, progress)
    return Recording(prompts.reset_index(drop=True), list(tokenized), scores, activations)


@torch.no_grad()
def last_tokens(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    sites: Sequence[str],
    n_tokens: int,
    progress: Callable[[int], object] = lambda prompts: None,
) -> tuple[Float[np.ndarray, " prompts"], dict[str, Float[Tensor, "prompts token width"]]]:
    """Refusal scores of the prompts, and activations at their last tokens by site, in float32, on the CPU.

    Args:
        progress: called with the number of prompts done since the last call.

    Raises:
        UserError: the model has no such site.
    """
    model.check_sites(sites)
    score = RefusalScore.of(model)
    scores = np.empty(len(prompts))
    kept = {site: torch.empty(len(prompts), n_tokens, model.width(site)) for site in sites}
    for group in similar_lengths(prompts, PACKED_TOKENS):
        seen: dict[str, Tensor] = {}
        tails = make_tails(model, [prompts[i] for i in group], n_tokens)
        logits = last_logits(model, tails, {site: recorder(seen, site) for site in sites})
        scores[group] = score(logits).cpu().numpy()
        for site, activation in seen.items():
            kept[site][group] = activation.float().cpu()
        progress(len(group))
    return scores, kept


class Candidate(NamedTuple):
    """A direction at a site."""

    site: str
    token: int | None
    """where its activations were read, counted from the end; None where it was not learned from activations"""
    vector: Vector
    by_fold: list[Vector]
    """for each fold, the direction learned without it"""
    norm: float
    """mean norm of the residual stream at the site: the unit of `alpha`"""

    def amount(self, alpha: float, config: SteeringOptions) -> float:
        """An alpha in the activation's own units; for `project-out` it is a share as it is."""
        if config.edit == "project-out":
            return alpha
        return alpha * (self.norm if config.units == "norm" else float(self.vector.norm()))


class Fold(NamedTuple):
    """Prompts that a direction was not learned from."""

    safe: PreparedPrompts
    toxic: PreparedPrompts


def candidate_table(
    candidates: Sequence[Candidate], folds: Sequence[Fold], config: SteeringOptions, progress: Progress
) -> pd.DataFrame:
    """What each candidate does, in the order of the candidates, by the edit that the dial will use.

    Columns: `site`, `kind`, `layer`, `token`; `length`, of the direction in units of the residual norm;
    `agreement`, the mean cosine between the folds' directions; `induced`, the mean score of safe prompts with the dial
    turned up; `removed`, that of toxic prompts with it turned down; `kl` under the same of the next token after safe
    prompts that are about to be answered (of others, turning down shall change it); `rejected`, the reason or blank.

    Args:
        progress: called with the number of runs done since the last call: `3 * candidates * prompts per side`.
    """
    score = RefusalScore.of(folds[0].safe.model)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("induced", "removed", "kl")}
    answered = plain_scores([fold.safe for fold in folds], score) < 0
    for number, (safe, toxic) in enumerate(folds):
        up, down = (
            steering([_tried(safe.model, each, number, config, up) for each in candidates], config)
            for up in (True, False)
        )
        columns["induced"].append(engine.scores(safe, score, up, progress))
        columns["removed"].append(engine.scores(toxic, score, down, progress))
        columns["kl"].append(engine.next_token_kl(safe, down, progress))
    joined = {name: np.concatenate(parts, axis=1) for name, parts in columns.items()}
    figures = {name: values[:, answered if name == "kl" else slice(None)].mean(1) for name, values in joined.items()}
    facts = [
        {
            "site": candidate.site,
            "kind": kind_of(candidate.site),
            "layer": layer_of(candidate.site),
            "token": candidate.token,
            "length": float(candidate.vector.norm()) / candidate.norm,
            "agreement": _agreement(candidate.by_fold),
        }
        for candidate in candidates
    ]
    table = pd.DataFrame(facts).assign(**figures)
    n_layers = folds[0].safe.model.n_layers
    return table.assign(rejected=[_reason(row, n_layers, config) for row in table.to_dict("records")])


def _tried(model: Model, candidate: Candidate, fold: int, config: SteeringOptions, up: bool) -> SteeringEdit:
    """The edit that turns a candidate's dial up or down; up is an addition also where down is a projection."""
    vector, sites = candidate.by_fold[fold], (candidate.site,)
    if config.edit == "project-out" and not up:
        return SteeringEdit("project-out", residual_sites(model) if config.everywhere else sites, vector, 1.0)
    amount = config.tried_alpha * candidate.norm
    return SteeringEdit("clamp" if config.edit == "clamp" else "add", sites, vector, amount if up else -amount)


def steering(edits: Sequence[SteeringEdit], config: SteeringOptions) -> Steering:
    """Edits at the tokens that the configuration names, which are those that prompts are prepared for."""
    return Steering(edits, config.positions, config.during_reply)


def plain_scores(prompts: Sequence[PreparedPrompts], score: RefusalScore) -> Float[np.ndarray, " prompts"]:
    """Scores of all these prompts in the model as it is."""
    return np.concatenate([engine.scores(some, score, NO_EDIT)[0] for some in prompts])


def plain_means(folds: Sequence[Fold]) -> dict[str, float]:
    """Mean scores of the folds' prompts as they are, per side."""
    score = RefusalScore.of(folds[0].safe.model)
    sides = {"safe": [fold.safe for fold in folds], "toxic": [fold.toxic for fold in folds]}
    return {side: float(plain_scores(prompts, score).mean()) for side, prompts in sides.items()}


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The candidates that are not rejected, the best first.

    Raises:
        UserError: all are rejected.
    """
    swing = table["induced"] - table["removed"]
    kept = table.assign(swing=swing)[table["rejected"] == ""].sort_values("swing", ascending=False, kind="stable")
    if kept.empty:
        reasons = table["rejected"].str.split(" (", regex=False).str[0].value_counts()
        raise UserError(
            f"no direction passes, of {len(table)}: {'; '.join(f'{n} {why}' for why, n in reasons.items())}; loosen"
            " --set steering.min_induced=…, steering.max_kl=… or steering.latest=…, or learn from more prompts"
        )
    return kept


def best_per_layer(kept: pd.DataFrame, n_layers: int) -> list[int]:
    """The best candidate of each of the layers with the best ones, by index, in the order of the layers."""
    best = kept.drop_duplicates("layer").head(n_layers)
    return [int(i) for i in best.sort_values("layer").index]


def _agreement(vectors: Sequence[Vector]) -> float:
    pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :]]
    return float(np.mean([cosine(a, b) for a, b in pairs]))


def _reason(row: dict, n_layers: int, config: SteeringOptions) -> str:
    if row["layer"] >= config.latest * n_layers:
        return f"acts too late (layer {row['layer']} of {n_layers})"
    if not row["induced"] > config.min_induced:
        return f"induces no refusal (mean score {row['induced']:.2f})"
    if not row["kl"] <= config.max_kl:
        return f"changes safe prompts (KL {row['kl']:.3f})"
    return ""
