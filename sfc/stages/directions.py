"""Directions to steer along: of features, and those that finished `sfc steer` runs have chosen."""

import json
from pathlib import Path

from safetensors.torch import load_file

from sfc.activations.store import Store
from sfc.artifacts import MANIFEST, read_json
from sfc.errors import UserError
from sfc.models.identity import model_identity
from sfc.run import Run
from sfc.sites import site_from_short
from sfc.stages.train import load_dictionaries
from sfc.steering.directions import Vector, feature_direction
from sfc.steering.edits import Edit, Steering

_BLOCK_ROWS = 8192


def steer(run: Run, direction: str, alpha: float) -> Steering:
    """Adding a direction to the residual stream, for `Probe.score_of` and `Probe.reply`.

    Args:
        direction: a feature, `resid_post.21/F463`, whose decoder direction is added at the tokens of
            `steering.positions`; or the folder of a finished `sfc steer`, `steering-toxic-safe-add-dc34b362`, whose
            chosen direction is added where it was learned and swept.
        alpha: how much, in units of the mean norm of the residual stream at the site: over the store's tokens for a
            feature, and as `sfc steer` measured it for a direction of its own. Negative steers away.

    Raises:
        UserError: there is no such direction, or of a feature no store to measure the norm on.
    """
    if direction in finished_directions(run):
        folder = run.root / "circuits" / run.experiment.name / direction
        result, vectors = read_json(folder / "result.json"), load_file(folder / "vectors.safetensors")
        edit = Edit("add", (site_from_short(result["site"]),), vectors["chosen"], alpha * result["norm"])
        return Steering(edit, result["positions"], result["during_reply"])
    if "/F" not in direction:
        known = ", ".join(finished_directions(run)) or "none"
        raise UserError(
            f"no direction {direction!r}: name a feature, or a finished `sfc steer` of this model ({known})"
        )
    site, vector = direction_of_feature(run, direction)
    config = run.experiment.steering
    amount = alpha * _mean_norm(run.store.folder, site)
    return Steering(Edit("add", (site,), vector, amount), config.positions, config.during_reply)


def finished_directions(run: Run) -> list[str]:
    """The folders of finished `sfc steer` runs of the experiment's model, by name."""
    model = json.loads(json.dumps(model_identity(run.experiment.model)))
    manifests = sorted((run.root / "circuits" / run.experiment.name).glob(f"steering-*/{MANIFEST}"))
    return [path.parent.name for path in manifests if read_json(path)["inputs"]["model"] == model]


def direction_of_feature(run: Run, name: str) -> tuple[str, Vector]:
    """The site of a feature such as `resid_post.21/F463`, and its decoder direction.

    Raises:
        UserError: there is no such feature.
    """
    short, _, feature = name.partition("/F")
    sites = run.experiment.activations.sites
    if not feature.isdecimal() or site_from_short(short) not in sites:
        raise UserError(f"no dictionary at {short}: there are SAEs at {', '.join(sites)}")
    site = site_from_short(short)
    return site, feature_direction(load_dictionaries(run.saes.folder, [site])[site], int(feature))


def _mean_norm(folder: Path, site: str) -> float:
    """Over all tokens of a store."""
    store = Store(folder)
    total = sum(float(store.read(site, *block).norm(dim=1).sum()) for block in store.blocks(_BLOCK_ROWS))
    return total / store.n_tokens
