"""Stage: an edit that lowers over-refusal.

Features and their number are chosen on discovery prompts, and what the edits do is measured on test prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from sfc.circuits.faithfulness import matching_strata, random_circuits
from sfc.core.artifacts import Artifact, write_csv, write_json
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.models.judge import is_refusal
from sfc.models.loading import choose_device, load_model
from sfc.run import Run
from sfc.stats import wilson
from sfc.studies.discover.discover import Clock
from sfc.studies.repair.choose import best_size, mean_effects, qualified, shares_refused
from sfc.studies.repair.edits import (
    NO_EDIT,
    Edit,
    Repair,
    Subspaces,
    edited_replies,
    edited_scores,
    project_weights,
    projecting,
    reply_losses,
    save_repair,
    save_subspaces,
    written_subspaces,
)
from sfc.studies.repair.inputs import KINDS, RepairInputs, repair_inputs
from sfc.studies.repair.options import RepairOptions
from sfc.studies.repair.page import write_repair_page

FILES = {
    "page": "repair.html",
    "features": "features.csv",
    "tried": "tried.csv",
    "rates": "rates.csv",
    "replies": "replies.csv",
    "hook": "repair.safetensors",
    "weights": "weights.safetensors",
    "result": "result.json",
}
HOOK, WEIGHTS = "hook", "weights"
_LISTED = 500  # features in the table
_MOST_DIFFERENT = 0.01  # nats between changed weights and the hook that they stand for


class Setting(NamedTuple):
    """One edit, and what is said of it."""

    kind: str
    size: int
    draw: int | None
    """of random features; None for the chosen ones"""
    edit: Edit


def make_repair(run: Run, artifact: Artifact, category: str, rebuild: bool = False) -> None:
    """Score, choose, measure beside chance, export, and write all of it with a page.

    Raises:
        UserError: there are too few prompts, or no feature qualifies.
    """
    clock, config = Clock(), RepairOptions.of(run.experiment)
    model = load_model(run.experiment.model, choose_device(run.device))
    with artifact.being_made(rebuild) as folder:
        inputs = repair_inputs(run, model, category)
        clock.lap("prepare")
        problem, nodes = inputs.problem, inputs.problem.ablation.nodes
        on_hard, on_toxic = (mean_effects(problem, inputs.scored[kind]) for kind in ("hard", "toxic"))
        ranking = qualified(on_hard, on_toxic, nodes.is_error, config.toxic_share)
        if not len(ranking):
            raise UserError("no feature qualifies: raise --set repair.toxic_share=…")
        sizes = sorted({min(size, len(ranking)) for size in config.sizes})
        clock.lap("effects")
        settings = [
            Setting(kind, size, None, make(run, inputs, ranking[:size]))
            for kind, make in _EDITS.items()
            for size in sizes
        ]
        tried = _tried(inputs, settings, config.refused_above)
        chosen = {kind: best_size(_with_plain(tried, kind), config.most_lost) for kind in _EDITS}
        clock.lap("choice")
        by_chance = _random_settings(run, inputs, ranking, sizes)
        replies, losses = _measured(inputs, [Setting("none", 0, None, NO_EDIT), *settings, *by_chance], config)
        rates = _rates(replies).merge(losses, on=["kind", "size", "draw"])
        clock.lap("test prompts")
        features = _features(inputs, on_hard, on_toxic, ranking)
        if chosen[HOOK]:
            save_repair(_hook(run, inputs, ranking[: chosen[HOOK]]), folder / FILES["hook"])
        difference = None
        if chosen[WEIGHTS]:
            difference = _export_weights(inputs, _subspaces(inputs, ranking[: chosen[WEIGHTS]]), folder)
        clock.lap("export")
        tables = {"features": features, "tried": tried, "rates": rates}
        for name, table in {**tables, "replies": replies}.items():
            write_csv(folder / FILES[name], table.round(6))
        result = {
            "preset": run.experiment.name,
            "category": category,
            "n_features": int((~nodes.is_error).sum()),
            "n_qualified": len(ranking),
            "n_scored": {kind: runs.n_prompts for kind, runs in inputs.scored.items()},
            "n_tried": {kind: runs.n_prompts for kind, runs in inputs.tried.items()},
            "toxic_share": config.toxic_share,
            "most_lost": config.most_lost,
            "unedited": _point(rates, "none", 0),
            "chosen": {kind: _point(rates, kind, size) if size else None for kind, size in chosen.items()},
            "weights_difference": difference,
        }
        write_repair_page(folder / FILES["page"], tables, result)
        clock.lap("drawing")
        files = {name: file for name, file in FILES.items() if (folder / file).exists() or name == "result"}
        result |= {"files": files, "seconds": clock.laps}
        write_json(folder / FILES["result"], result)
        artifact.finish(result=result)


def _hook(run: Run, inputs: RepairInputs, chosen: Int[np.ndarray, " chosen"]) -> Repair:
    ablation = inputs.problem.ablation
    return Repair.of(torch.from_numpy(chosen.copy()), ablation.nodes, ablation.reference, run.saes.folder.name)


def _hook_edit(run: Run, inputs: RepairInputs, chosen: Int[np.ndarray, " chosen"]) -> Edit:
    repair, dictionaries = _hook(run, inputs, chosen), inputs.problem.ablation.dictionaries
    return Edit(lambda batch: repair.interventions(dictionaries, batch), {})


def _subspaces(inputs: RepairInputs, chosen: Int[np.ndarray, " chosen"]) -> Subspaces:
    ablation, by_site = inputs.problem.ablation, {}
    starts = np.cumsum([0, *ablation.nodes.sizes[:-1]])
    for node in chosen:
        number = ablation.nodes.site_numbers[node]
        by_site.setdefault(ablation.nodes.sites[number], []).append(int(node - starts[number]))
    return written_subspaces(by_site, ablation.dictionaries)


def _weights_edit(_run: Run, inputs: RepairInputs, chosen: Int[np.ndarray, " chosen"]) -> Edit:
    """The projection that changed weights would do, as a hook: what many edits can be tried by."""
    act = projecting(_subspaces(inputs, chosen))
    return Edit(lambda _: act, act)


_EDITS: Mapping[str, Callable[[Run, RepairInputs, np.ndarray], Edit]] = {HOOK: _hook_edit, WEIGHTS: _weights_edit}


def _random_settings(run: Run, inputs: RepairInputs, ranking: np.ndarray, sizes: Sequence[int]) -> list[Setting]:
    """For each kind and size, edits by as many features of the same sites and ranges of firing rates."""
    problem, config = inputs.problem, RepairOptions.of(run.experiment)
    masks = np.zeros((len(sizes), problem.ablation.nodes.n_nodes), dtype=bool)
    for row, size in enumerate(sizes):
        masks[row, ranking[:size]] = True
    strata = matching_strata(problem.ablation.nodes, problem.firing_rates)
    drawn = random_circuits(masks, strata, config.random_draws, run.experiment.seed)
    return [
        Setting(kind, size, draw, make(run, inputs, np.flatnonzero(drawn[draw, row])))
        for kind, make in _EDITS.items()
        for row, size in enumerate(sizes)
        for draw in range(config.random_draws)
    ]


def _tried(inputs: RepairInputs, settings: Sequence[Setting], above: float) -> pd.DataFrame:
    """Scores of the discovery prompts that features were not scored on, under every edit: a row per kind and size."""
    model, score = inputs.problem.model, inputs.problem.score
    rows = []
    with progress_bar("trying sizes", len(settings) + 1, "edits") as progress:
        for setting in (Setting("none", 0, None, NO_EDIT), *settings):
            scores = {kind: edited_scores(model, score, runs, setting.edit) for kind, runs in inputs.tried.items()}
            rows.append({"kind": setting.kind, "size": setting.size, **shares_refused(scores, above)})
            progress(1)
    return pd.DataFrame(rows)


def _with_plain(tried: pd.DataFrame, kind: str) -> pd.DataFrame:
    return tried[tried["kind"].isin([kind, "none"])]


def _measured(
    inputs: RepairInputs, settings: Sequence[Setting], config: RepairOptions
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per edit and test prompt, with score and reply; and per edit the cross-entropy of ordinary replies."""
    model, score, layout = inputs.problem.model, inputs.problem.score, inputs.layout
    tables, losses = [], []
    with progress_bar("test prompts", len(settings), "edits") as progress:
        for kind, size, draw, edit in settings:
            about = {"kind": kind, "size": size, "draw": -1 if draw is None else draw}
            for group, corpus in inputs.test.items():
                replied = edited_replies(model, score, corpus.sequences, layout, edit, config.reply_tokens)
                prompts = corpus.table[["id", "prompt", "category", "dataset_type"]]
                refused = [is_refusal(text) for text in replied.texts]
                of_group = {"group": group, "score": replied.scores, "refused": refused, "reply": replied.texts}
                tables.append(prompts.assign(**about, **of_group))
            losses.append({**about, "loss": float(reply_losses(model, inputs.ordinary, layout, edit).mean())})
            progress(1)
    table = pd.DataFrame(losses)
    return pd.concat(tables, ignore_index=True), table.assign(loss_rise=table["loss"] / table["loss"].iloc[0] - 1)


def _rates(replies: pd.DataFrame) -> pd.DataFrame:
    """Judged refusals per edit and group, with Wilson intervals of 95 %; `draw` is -1 for the chosen features."""
    rows = []
    for key, part in replies.groupby(["kind", "size", "draw", "group"], sort=False):
        n, refusals = len(part), int(part["refused"].sum())
        about = dict(zip(("kind", "size", "draw", "group"), key, strict=True))  # pyright: ignore[reportArgumentType]
        figures = {"n": n, "refusals": refusals, "rate": refusals / n, **wilson(refusals, n)._asdict()}
        rows.append({**about, **figures, "score": part["score"].mean()})
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


def _export_weights(inputs: RepairInputs, subspaces: Subspaces, folder: Path) -> float | None:
    """Change the weights and write the file, if they do what the hook does: the largest difference of a score, in nats.

    None where the model has no weights that could be changed so. The model is not to be used after this.
    """
    model, score, runs = inputs.problem.model, inputs.problem.score, inputs.tried["hard"]
    act = projecting(subspaces)
    hooked = edited_scores(model, score, runs, Edit(lambda _: act, {}))
    try:
        project_weights(model, subspaces)
    except UserError as error:
        say(f"no weights: {error}")
        return None
    difference = float(np.abs(edited_scores(model, score, runs, NO_EDIT) - hooked).max())
    if difference <= _MOST_DIFFERENT:
        save_subspaces(subspaces, folder / FILES["weights"])
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
