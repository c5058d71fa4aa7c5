"""An edit that lowers over-refusal: chosen on discovery prompts, and measured on test prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Bool, Int

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline, tables_of
from sfc.circuits.faithfulness import Ablations, matching_strata, prepared, random_circuits, top_circuits
from sfc.circuits.methods import attribution
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.data.render import TokenizedPrompt
from sfc.data.schema import ALL, keyed_ranks
from sfc.models import engine
from sfc.models.batches import PACKED_TOKENS, TemplateLayout, make_batches
from sfc.models.engine import NO_EDIT, Edits, PreparedPrompts
from sfc.models.generation import with_replies
from sfc.models.score import score_prompts
from sfc.session import Session
from sfc.stats import judged_rates
from sfc.studies.collect.fill import Corpus, short_enough
from sfc.studies.discover.problem import with_store_index
from sfc.studies.repair import HOOK, KINDS, WEIGHTS, Repair, RepairOptions
from sfc.studies.repair.edits import (
    FeatureAblation,
    Projections,
    Subspaces,
    best_size,
    projected_weights,
    qualified,
    save_repair,
    save_subspaces,
    shares_refused,
    written_subspaces,
)
from sfc.studies.study import Made, write_tables

_FEWEST = 2


class RepairInputs(NamedTuple):
    """Prompts and what is known of them."""

    problem: Problem
    scored: Mapping[str, PromptRuns]
    """`hard` and `toxic`: refused discovery prompts that features are scored on"""
    tried: Mapping[str, PromptRuns]
    """the same, whether refused or not: those that sizes are tried on"""
    test: Mapping[str, Corpus]
    """by group"""
    ordinary: list[TokenizedPrompt]
    """safe test prompts with the base model's replies"""

    @property
    def layout(self) -> TemplateLayout:
        """The template positions that all these prompts have."""
        return self.problem.ablation.baseline.layout


def repair_inputs(session: Session) -> RepairInputs:
    """Tokenize and score the prompts; compute the baselines.

    Raises:
        UserError: prompts of a kind are missing, or too few of them are refused.
    """
    run, model, score, dictionaries = session.run, session.model, session.metric, session.dictionaries
    experiment, options, seed = run.experiment, RepairOptions.of(run.experiment), run.experiment.seed
    category, frame = run.group(options.category), run.prompts.frame
    ours = frame if category == ALL else frame[frame["category"] == category]
    place = keyed_ranks(ours, ["dataset_type", "split"], f"repair {seed}")
    everyone = run.balanced()
    everywhere = frame[(frame["split"] == "test") & (frame["dataset_type"] == KINDS["safe"])]
    wanted = {
        "discovery": ours[(ours["split"] == "discovery") & (place < options.prompts)],
        "test": ours[(ours["split"] == "test") & (place < options.test_prompts)],
        "reference": everyone[(everyone["split"] == "reference") & ~everyone["refusal_label"]],
        "ordinary": everywhere[keyed_ranks(everywhere, ["split"], f"ordinary {seed}") < options.ordinary_prompts],
    }
    corpora = {name: short_enough(model.tokenize, rows, experiment.prompts.max_tokens) for name, rows in wanted.items()}
    layout = TemplateLayout.of([prompt for corpus in corpora.values() for prompt in corpus.sequences])

    def runs(prompts: list[TokenizedPrompt]) -> PromptRuns:
        batches = make_batches(prompts, layout, experiment.activations.batch_tokens, model.device)
        return PromptRuns.of(model, batches, next(iter(dictionaries)))

    reference_batches = runs(corpora["reference"].sequences).batches
    baseline = mean_baseline(model, dictionaries, reference_batches, layout)
    discovery = {kind: _of_kind(corpora["discovery"], kind) for kind in ("hard", "toxic")}
    scored, tried = {}, {}
    for kind, corpus in discovery.items():
        first_half = keyed_ranks(corpus.table, ["dataset_type"], f"half {seed}").to_numpy() % 2 == 0
        chosen = [prompt for prompt, first in zip(corpus.sequences, first_half, strict=True) if first]
        tried[kind] = runs([prompt for prompt, first in zip(corpus.sequences, first_half, strict=True) if not first])
        refused = score_prompts(model, score, runs(chosen).batches) > options.refused_above
        if refused.sum() < _FEWEST:
            raise UserError(
                f"{refused.sum()} of {len(chosen)} {kind} discovery prompts are {run.behavior.words.acted} (score above"
                f" {options.refused_above}), too few to repair: take --category all, or lower repair.refused_above"
            )
        scored[kind] = runs([prompt for prompt, one in zip(chosen, refused, strict=True) if one])
    problem = Problem(
        model=model,
        score=score,
        ablation=Ablation(Nodes.of_spaces(dictionaries), dictionaries, baseline, "node"),
        runs=scored["hard"],
        store=session.store,
        prompts=with_store_index(run, pd.concat([corpus.table for corpus in discovery.values()])),
        experiment=experiment,
    )
    ordinary = with_replies(
        session.without_adapter, corpora["ordinary"].sequences, options.ordinary_tokens, PACKED_TOKENS
    )
    return RepairInputs(problem, scored, tried, {kind: _of_kind(corpora["test"], kind) for kind in KINDS}, ordinary)


def _of_kind(corpus: Corpus, kind: str) -> Corpus:
    rows = np.flatnonzero(corpus.table["dataset_type"] == KINDS[kind])
    if len(rows) < _FEWEST:
        raise UserError(f"a repair needs {kind} prompts, and there are {len(rows)} in a split: take --category all")
    return Corpus(corpus.table.iloc[rows].reset_index(drop=True), [corpus.sequences[row] for row in rows])


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


def measure(study: Repair, session: Session, folder: Path) -> Made:
    """Score, choose, measure beside chance, and export.

    Raises:
        UserError: there are too few prompts, or no feature qualifies.
    """
    experiment, clock, options = session.run.experiment, session.clock, study.of(session.run)
    inputs = repair_inputs(session)
    clock.lap("prepare")
    problem, nodes = inputs.problem, inputs.problem.ablation.nodes
    on_hard, on_toxic = (
        attribution.rank(replace(problem, runs=inputs.scored[kind])).effect for kind in ("hard", "toxic")
    )
    ranking = qualified(on_hard, on_toxic, nodes.is_feature, options.toxic_share)
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
    by = ["kind", "size", "draw", "group"]  # the draw is -1 for the chosen features
    rates = judged_rates(replies, by).assign(score=replies.groupby(by, sort=False)["score"].mean().to_numpy())
    rates = rates.merge(losses, on=by[:3])
    clock.lap("test prompts")
    features = _features(inputs, on_hard, on_toxic, ranking)
    if chosen[HOOK]:
        means, dictionaries = tables_of(problem.ablation.baseline), session.run.saes.folder.name
        hook = FeatureAblation.of(ranking[: chosen[HOOK]], nodes, means, dictionaries)
        save_repair(hook, folder / _EXPORTS[HOOK])
    difference = None
    if chosen[WEIGHTS]:
        difference = _export_weights(inputs, _subspaces(inputs, ranking[: chosen[WEIGHTS]]), folder / _EXPORTS[WEIGHTS])
    clock.lap("export")
    files = write_tables(folder, {"features": features, "tried": tried, "rates": rates, "replies": replies})
    result = {
        "preset": experiment.name,
        "category": session.run.group(options.category),
        "n_features": int(nodes.is_feature.sum()),
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


def _subspaces(inputs: RepairInputs, chosen: Int[np.ndarray, " chosen"]) -> Subspaces:
    ablation = inputs.problem.ablation
    return written_subspaces(ablation.nodes.by_site(chosen), ablation.dictionaries)


Masks = Bool[np.ndarray, "edits nodes"]
"""the features of each edit"""


_EDITS: Mapping[str, Callable[[RepairInputs, Masks], Edits]] = {
    HOOK: lambda inputs, features: Ablations(inputs.problem.ablation, ~features),
    # The projections that changed weights would do: what many edits can be tried by.
    WEIGHTS: lambda inputs, features: Projections([_subspaces(inputs, np.flatnonzero(mask)) for mask in features]),
}


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


def _features(inputs: RepairInputs, on_hard: np.ndarray, on_toxic: np.ndarray, ranking: np.ndarray) -> pd.DataFrame:
    """The features with the largest effects on hard prompts, qualified or not: effects in nats, place, firing rate."""
    nodes = inputs.problem.ablation.nodes
    features = np.flatnonzero(nodes.is_feature)
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
