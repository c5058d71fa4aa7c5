"""Directions in the residual stream, in float64, and the dial that is turned along them.

Directions are learned from two sides, come from dictionaries, or are those of a finished run.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from sfc.core.artifacts import MANIFEST, read_json
from sfc.core.errors import UserError
from sfc.core.sites import short_site, site_from_short
from sfc.models import engine
from sfc.models.edits import Steering, SteeringEdit, residual_sites
from sfc.models.engine import NO_EDIT, PreparedPrompts, Progress, Replies
from sfc.models.loading import Model
from sfc.models.score import Score
from sfc.models.sources import model_identity
from sfc.run import Run
from sfc.saes.dictionary import Dictionary
from sfc.saes.format import load_dictionary, read_tensors
from sfc.saes.store import Store
from sfc.session import Session
from sfc.studies.steer import SteeringOptions, intent_of, named_feature
from sfc.studies.study import Finished

Vector = Float[Tensor, " d_model"]


def difference_of_means(rows: Float[Tensor, "prompts d_model"], positive: Bool[np.ndarray, " prompts"]) -> Vector:
    """Mean of the positive rows minus mean of the others (Arditi et al. 2024).

    Raises:
        ValueError: one side is empty.
    """
    if positive.all() or not positive.any():
        raise ValueError("a contrast needs prompts on both sides")
    chosen = torch.from_numpy(np.asarray(positive, dtype=bool))
    return rows[chosen].double().mean(0) - rows[~chosen].double().mean(0)


def probe_direction(rows: Float[Tensor, "prompts d_model"], positive: Bool[np.ndarray, " prompts"]) -> Vector:
    """The direction along which a logistic regression's log-odds grow, scaled as the difference of means along it.

    The columns are standardised for the fit, so that the penalty, `|w|^2 / 2` on a sum of losses, weighs all alike. The
    length is the difference of the sides' mean components, which makes raw amounts comparable.

    Raises:
        ValueError: one side is empty.
    """
    difference = difference_of_means(rows, positive)
    values, signs = rows.double().numpy(), np.where(positive, 1.0, -1.0)
    spread = values.std(0) + 1e-12
    standard = (values - values.mean(0)) / spread

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        margins = signs * (standard @ weights + bias)
        pull = -signs * expit(-margins)
        gradient = np.append(standard.T @ pull + weights, pull.sum())
        return float(np.logaddexp(0, -margins).sum() + weights @ weights / 2), gradient

    fitted = minimize(loss, np.zeros(values.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weights = torch.from_numpy(fitted.x[:-1] / spread)
    unit = weights / weights.norm()
    return unit * (difference @ unit)


def feature_direction(dictionary: Dictionary, feature: int) -> Vector:
    """What one unit of a feature writes: its row of the decoder.

    Raises:
        UserError: the dictionary has no such feature.
    """
    check_feature(dictionary, feature)
    return dictionary.W_dec[feature].detach().double().cpu()


def check_feature(dictionary: Dictionary, feature: int) -> None:
    """Raise a `UserError` if the dictionary has no such feature."""
    if not 0 <= feature < dictionary.d_sae:
        raise UserError(f"no feature F{feature} at {short_site(dictionary.site)}: it has F0 to F{dictionary.d_sae - 1}")


def circuit_directions(circuit: nx.DiGraph, dictionaries: Mapping[str, Dictionary]) -> dict[str, Vector]:
    """For each site, all features of a circuit together: the sum of their decoder rows, weighted by their effects.

    A feature of positive effect, which raises the score, counts with its direction, one of negative effect against it.
    Error nodes have no direction.

    Raises:
        UserError: these dictionaries lack a feature, or the circuit has no features.
    """
    sums: dict[str, Vector] = {}
    for name, node in circuit.nodes(data=True):
        if node["kind"] != "feature":
            continue
        if node["site"] not in dictionaries:
            raise UserError(f"the circuit's node {name} is at {node['site']}, where there is no dictionary")
        row = feature_direction(dictionaries[node["site"]], int(name.rpartition("/F")[2]))
        sums[node["site"]] = sums.get(node["site"], torch.zeros_like(row)) + node["effect"] * row
    if not sums:
        raise UserError("the circuit has no features, so it has no direction")
    return sums


def in_span(vector: Vector, others: Sequence[Vector]) -> Vector:
    """The part of a direction that lies in the span of others, by orthogonal projection."""
    if not others:
        return torch.zeros_like(vector)
    columns = torch.stack([other / other.norm() for other in others], dim=1)
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = left[:, singular > 1e-9 * singular[0]]  # of directions that say the same, one counts
    return basis @ (basis.T @ vector)


def span_share(vector: Vector, others: Sequence[Vector]) -> float:
    """How much of a direction's squared length lies in the span of others, between 0 and 1."""
    return float(in_span(vector, others).square().sum() / vector.square().sum())


def cosine(first: Vector, second: Vector) -> float:
    """Cosine of the angle between two directions."""
    return float(first @ second / (first.norm() * second.norm()))


def random_directions(n: int, d_model: int, seed: int) -> list[Vector]:
    """Directions drawn evenly from the unit sphere."""
    drawn = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d_model)))
    return list(drawn / drawn.norm(dim=1, keepdim=True))


_BLOCK_ROWS = 8192


def steer(run: Run, direction: str, alpha: float) -> Steering:
    """Adding a direction to the residual stream, for `PromptSession.score_of` and `PromptSession.reply`.

    Args:
        direction: a feature, `resid_post.21/F463`, whose decoder direction is added at the tokens of
            `steering.positions`; or the folder of a finished `sfc steer`, `steering-toxic-safe-add-dc34b362`, whose
            chosen direction is added where it was learned and swept.
        alpha: how much, in units of the mean norm of the residual stream at the site: over the store's tokens for a
            feature, and as `sfc steer` measured it for a direction of its own. Negative steers away.

    Raises:
        UserError: there is no such direction, or no store on which the norm at a feature's site can be measured.
    """
    if direction in finished_directions(run):
        folder = run.root / "circuits" / run.experiment.name / direction
        result, vectors = Finished(folder).result, read_tensors(folder / "vectors.safetensors")
        edit = SteeringEdit("add", (site_from_short(result["site"]),), vectors["chosen"], alpha * result["norm"])
        return Steering([edit], result["positions"], result["during_reply"])
    if "/F" not in direction:
        known = ", ".join(finished_directions(run)) or "none"
        raise UserError(
            f"no direction {direction!r}: name a feature, or a finished `sfc steer` of this model ({known})"
        )
    site, feature = named_feature(direction, run.experiment.activations.sites)
    vector = feature_direction(load_dictionary(run.saes.folder / site), feature)
    options = SteeringOptions.of(run.experiment)
    amount = alpha * _mean_norm(run.store.folder, site)
    return Steering([SteeringEdit("add", (site,), vector, amount)], options.positions, options.during_reply)


def finished_directions(run: Run) -> list[str]:
    """The folders of finished `sfc steer` runs of the experiment's model, by name."""
    model = json.loads(json.dumps(model_identity(run.experiment.model)))
    manifests = sorted((run.root / "circuits" / run.experiment.name).glob(f"steering-*/{MANIFEST}"))
    return [path.parent.name for path in manifests if read_json(path).get("inputs", {}).get("model") == model]


def _mean_norm(folder: Path, site: str) -> float:
    """Over all tokens of a store."""
    store = Store(folder)
    total = sum(float(store.read(site, *block).norm(dim=1).sum()) for block in store.blocks(_BLOCK_ROWS))
    return total / store.n_tokens


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

    @property
    def length(self) -> float:
        """The direction's length in units of the residual norm."""
        return float(self.vector.norm()) / self.norm

    def amount(self, alpha: float, options: SteeringOptions) -> float:
        """An alpha in the activation's own units; for `project-out` it is a share as it is."""
        if options.edit == "project-out":
            return alpha
        return alpha * (self.norm if options.units == "norm" else float(self.vector.norm()))


class Setting(NamedTuple):
    """A direction at a site, and how far the dial is turned."""

    name: str
    site: str
    token: int | None
    alpha: float
    edit: SteeringEdit

    @property
    def intent(self) -> str:
        """What turning the dial so is for."""
        return intent_of(self.edit.kind, self.alpha)


class Dial(NamedTuple):
    """How a model is steered, and by what its scores and replies are judged."""

    model: Model
    options: SteeringOptions
    score: Score
    judge: Callable[[str], bool]

    @classmethod
    def of(cls, session: Session) -> "Dial":
        """The dial of a run.

        Raises:
            UserError: the model cannot be loaded, or cannot have the score.
        """
        return cls(session.model, SteeringOptions.of(session.run.experiment), session.metric, session.run.judge)

    def sites(self, site: str) -> tuple[str, ...]:
        """Where an edit of the dial's own kind acts for a direction at a site."""
        everywhere = self.options.edit == "project-out" and self.options.everywhere
        return residual_sites(self.model) if everywhere else (site,)

    def setting(
        self, candidate: Candidate, alpha: float, vector: Vector | None = None, name: str = "chosen"
    ) -> Setting:
        """The dial at an alpha; another `vector` takes the place of the candidate's at an equal amount."""
        amount = candidate.amount(alpha, self.options)
        direction = candidate.vector if vector is None else vector
        edit = SteeringEdit(self.options.edit, self.sites(candidate.site), direction, amount)
        return Setting(name, candidate.site, candidate.token, alpha, edit)

    def steering(self, edits: Sequence[SteeringEdit]) -> Steering:
        """Edits at the tokens that the options name, which are those that prompts are prepared for."""
        return Steering(edits, self.options.positions, self.options.during_reply)

    def scores(
        self, prompts: PreparedPrompts, edits: Sequence[SteeringEdit], progress: Progress = lambda _: None
    ) -> Float[np.ndarray, "edits prompts"]:
        """The score of every prompt under every edit, in nats."""
        return engine.scores(prompts, self.score, self.steering(edits), progress)

    def plain_scores(self, prompts: Sequence[PreparedPrompts]) -> Float[np.ndarray, " prompts"]:
        """The scores of all these prompts in the model as it is, in nats."""
        return np.concatenate([engine.scores(some, self.score, NO_EDIT)[0] for some in prompts])

    def judged(self, replies: Replies) -> np.ndarray:
        """Whether each reply shows the behavior [edits, prompts]."""
        return np.array([[self.judge(text) for text in texts] for texts in replies.texts], dtype=bool)
