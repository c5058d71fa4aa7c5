"""An edit that lowers over-refusal: chosen on discovery prompts, and measured on test prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Int

from sfc.circuits.baselines import tables_of
from sfc.circuits.faithfulness import Ablations, matching_strata, prepared, random_circuits, top_circuits
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.data.render import TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import PACKED_TOKENS, make_batches
from sfc.models.engine import NO_EDIT, Edits, PreparedPrompts
from sfc.session import Session
from sfc.stats import judged_rate
from sfc.studies.repair.choose import best_size, mean_effects, qualified, shares_refused
from sfc.studies.repair.edits import (
    FeatureAblation,
    Projections,
    Subspaces,
    projected_weights,
    save_repair,
    save_subspaces,
    written_subspaces,
)
from sfc.studies.repair.inputs import RepairInputs, repair_inputs
from sfc.studies.repair.options import HOOK, KINDS, WEIGHTS, RepairOptions
from sfc.studies.study import Made, write_tables

_EXPORTS = {HOOK: "repair.safetensors", WEIGHTS: "weights.safetensors"}
_LISTED = 500  # features in the table
_MOST_DIFFERENT = 0.01  # nats between changed weights and the hook that they stand for


class Settings(NamedTuple):
    """Edits of one kind, and what is said of each."""

    kind: str
    sizes: Sequence[int]
    draws: Sequence[int]
    """of random features; -1 for the chosen ones"""
    edits: Edits

    def about(self) -> list[dict[str, Any]]:
        """The columns that tell them apart, for each."""
        return [
            {"kind": self.kind, "size": size, "draw": draw} for size, draw in zip(self.sizes, self.draws, strict=True)
        ]


UNEDITED = Settings("none", [0], [-1], NO_EDIT)


def measure(session: Session, folder: Path) -> Made:
    """Score, choose, measure beside chance, and export.

    Raises:
        UserError: there are too few prompts, or no feature qualifies.
    """
    experiment, clock, options = session.run.experiment, session.clock, RepairOptions.of(session.run.experiment)
    inputs = repair_inputs(session)
    clock.lap("prepare")
    problem, nodes = inputs.problem, inputs.problem.ablation.nodes
    on_hard, on_toxic = (mean_effects(problem, inputs.scored[kind]) for kind in ("hard", "toxic"))
    ranking = qualified(on_hard, on_toxic, nodes.is_error, options.toxic_share)
    if not len(ranking):
        raise UserError("no feature qualifies: raise --set repair.toxic_share=…")
    sizes = sorted({min(size, len(ranking)) for size in options.sizes})
    clock.lap("effects")
    best = top_circuits(ranking, sizes, nodes.n_nodes)
    settings = [Settings(kind, sizes, [-1] * len(sizes), make(inputs, best)) for kind, make in _EDITS.items()]
    tried = _tried(inputs, [UNEDITED, *settings], options.refused_above)
    chosen = {kind: best_size(tried[tried["kind"].isin([kind, "none"])], options.most_lost) for kind in _EDITS}
    clock.lap("choice")
    by_chance = _random_settings(inputs, best, sizes, options.random_draws, experiment.seed)
    replies, losses = _measured(session, inputs, [UNEDITED, *settings, *by_chance])
    rates = _rates(replies).merge(losses, on=["kind", "size", "draw"])
    clock.lap("test prompts")
    features = _features(inputs, on_hard, on_toxic, ranking)
    if chosen[HOOK]:
        hook = _hook(inputs, ranking[: chosen[HOOK]], session.run.saes.folder.name)
        save_repair(hook, folder / _EXPORTS[HOOK])
    difference = None
    if chosen[WEIGHTS]:
        difference = _export_weights(inputs, _subspaces(inputs, ranking[: chosen[WEIGHTS]]), folder / _EXPORTS[WEIGHTS])
    clock.lap("export")
    files = write_tables(folder, {"features": features, "tried": tried, "rates": rates, "replies": replies})
    result = {
        "preset": experiment.name,
        "category": session.run.group(options.category),
        "n_features": int((~nodes.is_error).sum()),
        "n_qualified": len(ranking),
        "n_scored": {kind: runs.n_prompts for kind, runs in inputs.scored.items()},
        "n_tried": {kind: runs.n_prompts for kind, runs in inputs.tried.items()},
        "toxic_share": options.toxic_share,
        "most_lost": options.most_lost,
        "unedited": _point(rates, "none", 0),
        "chosen": {kind: _point(rates, kind, size) if size else None for kind, size in chosen.items()},
        "weights_difference": difference,
    }
    return Made(result, files | {kind: file for kind, file in _EXPORTS.items() if (folder / file).exists()})


def _hook(inputs: RepairInputs, chosen: Int[np.ndarray, " chosen"], dictionaries: str) -> FeatureAblation:
    ablation = inputs.problem.ablation
    return FeatureAblation.of(
        torch.from_numpy(chosen.copy()), ablation.nodes, tables_of(ablation.baseline), dictionaries
    )


def _subspaces(inputs: RepairInputs, chosen: Int[np.ndarray, " chosen"]) -> Subspaces:
    ablation, by_site = inputs.problem.ablation, {}
    starts = np.cumsum([0, *ablation.nodes.sizes[:-1]])
    for node in chosen:
        number = ablation.nodes.site_numbers[node]
        by_site.setdefault(ablation.nodes.sites[number], []).append(int(node - starts[number]))
    return written_subspaces(by_site, ablation.dictionaries)


Masks = Bool[np.ndarray, "edits nodes"]
"""the features of each edit"""


def _hooks(inputs: RepairInputs, features: Masks) -> Edits:
    return Ablations(inputs.problem.ablation, ~features)


def _projections(inputs: RepairInputs, features: Masks) -> Edits:
    """The projections that changed weights would do: what many edits can be tried by."""
    return Projections([_subspaces(inputs, np.flatnonzero(mask)) for mask in features])


_EDITS: Mapping[str, Callable[[RepairInputs, np.ndarray], Edits]] = {HOOK: _hooks, WEIGHTS: _projections}


def _random_settings(
    inputs: RepairInputs, best: Masks, sizes: Sequence[int], n_draws: int, seed: int
) -> list[Settings]:
    """For each kind and size, edits by as many features of the same sites and ranges of firing rates."""
    strata = matching_strata(inputs.problem.ablation.nodes, inputs.problem.firing_rates)
    drawn = random_circuits(best, strata, n_draws, seed)
    masks = rearrange(drawn, "draws sizes nodes -> (sizes draws) nodes")
    draws = list(range(n_draws)) * len(sizes)
    return [
        Settings(kind, np.repeat(sizes, n_draws).tolist(), draws, make(inputs, masks)) for kind, make in _EDITS.items()
    ]


def _tried(inputs: RepairInputs, settings: Sequence[Settings], above: float) -> pd.DataFrame:
    """Scores of the discovery prompts that features were not scored on, under every edit: a row per kind and size."""
    model, score = inputs.problem.model, inputs.problem.score
    prompts = {kind: prepared(model, runs) for kind, runs in inputs.tried.items()}
    rows = []
    with progress_bar("trying sizes", _n_runs(settings, prompts), "runs") as progress:
        for each in settings:
            scores = {kind: engine.scores(some, score, each.edits, progress) for kind, some in prompts.items()}
            rows += [
                {"kind": each.kind, "size": size, **shares_refused({kind: s[i] for kind, s in scores.items()}, above)}
                for i, size in enumerate(each.sizes)
            ]
    return pd.DataFrame(rows)


def _n_runs(settings: Sequence[Settings], prompts: Mapping[str, PreparedPrompts]) -> int:
    return sum(len(each.edits) for each in settings) * sum(some.n_prompts for some in prompts.values())


def _measured(
    session: Session, inputs: RepairInputs, settings: Sequence[Settings]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per edit and test prompt, with score and reply; and per edit the cross-entropy of ordinary replies."""
    model, score, judge = session.model, session.metric, session.run.judge
    reply_tokens = RepairOptions.of(session.run.experiment).reply_tokens

    def prompts(sequences: Sequence[TokenizedPrompt]) -> PreparedPrompts:
        return PreparedPrompts.of(model, make_batches(sequences, inputs.layout, PACKED_TOKENS, model.device))

    tested = {group: prompts(corpus.sequences) for group, corpus in inputs.test.items()}
    ordinary = prompts(inputs.ordinary)
    tables, losses = [], []
    with progress_bar("test prompts", _n_runs(settings, {**tested, "ordinary": ordinary}), "runs") as progress:
        for each in settings:
            replied = {
                group: engine.replies(some, score, each.edits, reply_tokens, progress) for group, some in tested.items()
            }
            given = engine.losses(ordinary, each.edits, progress).losses.mean(1)
            for i, about in enumerate(each.about()):
                losses.append({**about, "loss": float(given[i])})
                for group, of in replied.items():
                    table = inputs.test[group].table[["id", "prompt", "category", "dataset_type"]]
                    refused = [judge(text) for text in of.texts[i]]
                    of_group = {"group": group, "score": of.scores[i], "refused": refused, "reply": of.texts[i]}
                    tables.append(table.assign(**about, **of_group))
    table = pd.DataFrame(losses)
    return pd.concat(tables, ignore_index=True), table.assign(loss_rise=table["loss"] / table["loss"].iloc[0] - 1)


def _rates(replies: pd.DataFrame) -> pd.DataFrame:
    """Judged replies per edit and group, with Wilson intervals of 95 %; `draw` is -1 for the chosen features."""
    by, rows = ["kind", "size", "draw", "group"], []
    for key, part in replies.groupby(by, sort=False):
        about = dict(zip(by, key, strict=True))  # pyright: ignore[reportArgumentType]
        rows.append({**about, **judged_rate(part["refused"]), "score": part["score"].mean()})
    return pd.DataFrame(rows)


def _features(inputs: RepairInputs, on_hard: np.ndarray, on_toxic: np.ndarray, ranking: np.ndarray) -> pd.DataFrame:
    """The features with the largest effects on hard prompts, qualified or not: effects in nats, place, firing rate."""
    nodes = inputs.problem.ablation.nodes
    features = np.flatnonzero(~nodes.is_error)
    listed = features[np.argsort(-np.abs(on_hard[features]), kind="stable")][:_LISTED]
    listed = np.union1d(listed, ranking[:_LISTED])
    place = {int(node): number for number, node in enumerate(ranking, start=1)}
    table = pd.DataFrame(
        {
            "feature": [nodes.name(int(node)) for node in listed],
            "hard": on_hard[listed],
            "toxic": on_toxic[listed],
            "place": pd.array([place.get(int(node)) for node in listed], dtype="Int64"),
            "firing_rate": inputs.problem.firing_rates[listed],
        }
    )
    return table.sort_values("hard", ascending=False, kind="stable", ignore_index=True)


def _export_weights(inputs: RepairInputs, subspaces: Subspaces, path: Path) -> float | None:
    """Write the file if changed weights do what the hook does: the largest difference of a score, in nats.

    None where the model has no weights that could be changed so.
    """
    model, score, batches = inputs.problem.model, inputs.problem.score, inputs.tried["hard"].batches
    hooked = engine.scores(PreparedPrompts.of(model, batches), score, Projections([subspaces]))
    try:
        with projected_weights(model, subspaces):
            # What was cached before is of other weights.
            changed = engine.scores(PreparedPrompts.of(model, batches), score, NO_EDIT)
    except UserError as error:
        say(f"no weights: {error}")
        return None
    difference = float(np.abs(changed - hooked).max())
    if difference <= _MOST_DIFFERENT:
        save_subspaces(subspaces, path)
    else:
        say(f"no weights: they differ from the hook by {difference:.2f} nats; this model's blocks norm what they write")
    return difference


def _point(rates: pd.DataFrame, kind: str, size: int) -> dict[str, Any]:
    """The figures of one edit on test prompts, and the mean over random ones of its kind and size."""
    of_size = rates[(rates["kind"] == kind) & (rates["size"] == size)]
    own = {row["group"]: row for row in of_size[of_size["draw"] == -1].to_dict("records")}
    chance = of_size[of_size["draw"] >= 0].groupby("group")
    figures: dict[str, Any] = {"size": size, "loss_rise": round(float(own["hard"]["loss_rise"]), 4)}
    for group in KINDS:
        row = own[group]
        figures |= {f"n_{group}": int(row["n"]), group: round(float(row["rate"]), 4)}
        figures |= {f"{group}_{name}": round(float(row[name]), 4) for name in ("low", "high", "score")}
        if chance.ngroups:
            figures[f"random_{group}"] = round(float(chance["rate"].mean()[group]), 4)
    if chance.ngroups:
        figures["random_loss_rise"] = round(float(chance["loss_rise"].mean().iloc[0]), 4)
    return figures
