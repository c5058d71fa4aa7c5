"""The question that circuits are found and judged by: model, node spaces, prompts and baseline of one task.

A behavior may set a task of its own. Others have two sides: prompts of one are explained, and the baseline is a mean
over those of the other, their partners in `pairs.csv`, those that the model answered, or the same prompts in the base
model. Against counterfactuals, prompts of both sides are explained.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from sfc.behaviors.behavior import HARD, NEGATIVE, POSITIVE, Words
from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import BaselineTables, check_covered, mean_baseline, paired_baseline, zero_baseline
from sfc.circuits.counterfactuals import Counterfactuals, Pairs
from sfc.circuits.nodes import NODES, Nodes, Sources
from sfc.circuits.options import BaselineChoice, DiscoveryOptions, EvaluationOptions
from sfc.circuits.problem import Problem, PromptRuns, Task
from sfc.circuits.spaces import NodeSpace, checked
from sfc.core.errors import UserError
from sfc.core.progress import say
from sfc.data.counterfactual import counterfactual_pairs
from sfc.data.pairs import load_pairs
from sfc.data.prepare import balance
from sfc.data.schema import ALL, looked_up, with_ids
from sfc.data.similarity import listed_topics
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.score import DirectedScore, auroc, score_prompts
from sfc.run import Run
from sfc.saes.store import read_prompts
from sfc.session import Session
from sfc.studies.behaviour import judged
from sfc.studies.collect.fill import short_enough
from sfc.studies.discover.base import against_base


class Paired(NamedTuple):
    """The prompts that a circuit explains, with their partners as the baseline."""

    baseline: BaselineTables
    discovery: list[Batch]
    test: list[Batch]
    prompts: pd.DataFrame
    """columns `id`, `prompt`, `category`, `refusal_label`, `dataset_type`, `split` (partners: `reference`)"""


def paired_prompts(session: Session, category: str, spaces: Mapping[str, NodeSpace]) -> Paired:
    """The category's pairs: those of the population are explained, the others give the baseline.

    Raises:
        UserError: there are too few pairs, or none short enough.
    """
    run, model = session.run, session.model
    experiment, population = run.experiment, DiscoveryOptions.of(run.experiment).population
    if not run.behavior.reads_data_set:
        raise UserError(f"behavior {run.behavior.name!r} has no pairs of prompts: leave discovery.baseline=paired out")
    pairs = load_pairs(run.data_folder, category, experiment.prompts, experiment.seed)
    partner = "safe" if population == "toxic" else "toxic"
    explained, partners = model.tokenize(pairs[population].tolist()), model.tokenize(pairs[partner].tolist())
    fits = [
        max(len(a.ids), len(b.ids)) <= experiment.prompts.max_tokens for a, b in zip(explained, partners, strict=True)
    ]
    numbers = np.flatnonzero(fits)
    of_split = {split: numbers[pairs["split"].to_numpy()[numbers] == split] for split in ("discovery", "test")}
    if not all(len(chosen) for chosen in of_split.values()):
        raise UserError("no pair of some split is short enough: raise --set prompts.max_tokens=…")
    layout = TemplateLayout.of([*explained, *partners])
    tokens = experiment.activations.batch_tokens

    def batches(chosen: np.ndarray) -> list[Batch]:
        plain = make_batches([explained[i] for i in chosen], layout, tokens, model.device)
        tables = torch.from_numpy(chosen).to(model.device)
        return [batch.with_tables(tables[batch.prompts], layout) for batch in plain]

    baseline = paired_baseline(model, spaces, make_batches(partners, layout, tokens, model.device), layout)
    discovery, test = (batches(of_split[split]) for split in ("discovery", "test"))
    check_covered(baseline, [*discovery, *test])
    kept = pairs[fits]
    frames = [
        pd.DataFrame({"prompt": kept[population], "refusal_label": population == "toxic", "split": kept["split"]}),
        pd.DataFrame({"prompt": kept[partner], "refusal_label": partner == "toxic", "split": "reference"}),
    ]
    prompts = with_ids(pd.concat(frames).assign(category=category, dataset_type="pair"))
    return Paired(baseline, discovery, test, prompts)


class AgainstCounterfactuals(NamedTuple):
    """Prompts of both sides, each with equally long ones of the other."""

    baseline: Counterfactuals
    score: DirectedScore
    discovery: list[Batch]
    test: list[Batch]
    prompts: pd.DataFrame
    """all prompts that are in a pair"""
    pair_table: pd.DataFrame
    """see `Problem`"""
    counts: dict[str, dict[str, int]]
    """by split: see `CounterfactualPairs`"""


def against_counterfactuals(
    session: Session, explained: pd.DataFrame, candidates: pd.DataFrame, spaces: Mapping[str, NodeSpace]
) -> AgainstCounterfactuals:
    """Pair the discovery and test prompts that are explained with counterfactuals among all candidates.

    Raises:
        UserError: in a split no prompt of one of the sides finds a counterfactual.
    """
    run, model = session.run, session.model
    experiment, tokens = run.experiment, run.experiment.activations.batch_tokens
    both = pd.concat([explained, candidates])
    both = both[both["split"].isin(["discovery", "test"])].drop_duplicates("id")
    table, tokenized = short_enough(model.tokenize, both, experiment.prompts.max_tokens)
    table = table.reset_index(drop=True)
    described = table.assign(
        positive=table["refusal_label"].astype(bool),
        length=[len(prompt.ids) for prompt in tokenized],
        first_token=[int(prompt.ids[0]) for prompt in tokenized],
    )
    per_prompt = DiscoveryOptions.of(experiment).pairs_per_prompt
    found = counterfactual_pairs(described, table["id"].isin(explained["id"]), per_prompt, experiment.seed)
    for line in found.lines(run.behavior.words.positive, run.behavior.words.negative):
        say(line)
    columns = (torch.from_numpy(found.table[name].to_numpy(copy=True)) for name in Pairs._fields)
    pairs = Pairs(*(values.to(model.device) for values in columns))
    baseline = Counterfactuals.of(model, spaces, tokenized, pairs, TemplateLayout.of(tokenized), tokens)
    discovery, test = (
        baseline.batches(
            tokenized, torch.from_numpy((found.table["split"] == split).to_numpy(copy=True)).to(model.device), tokens
        )
        for split in ("discovery", "test")
    )
    used = table.loc[sorted({*found.table["prompt"], *found.table["counterfactual"]})]
    kinds = table["dataset_type"].map(run.behavior.words.kinds)
    pair_table = pd.DataFrame(
        {
            "id": table["id"].loc[found.table["prompt"]].to_numpy(),
            "counterfactual": table["id"].loc[found.table["counterfactual"]].to_numpy(),
            "kind": kinds.loc[found.table["prompt"]].to_numpy(),
        }
    )
    score = DirectedScore(session.metric, pairs.direction)
    return AgainstCounterfactuals(baseline, score, discovery, test, used, pair_table, found.counts)


LOW_AUROC = 0.8
_REFERENCE_LABELS: dict[BaselineChoice, list[bool]] = {
    "safe-mean": [False],
    "toxic-mean": [True],
    "balanced-mean": [False, True],
    "complied-mean": [],
    "base": [],
    "zero": [],
    "paired": [],
    "counterfactual": [False],  # for the figures by means beside it
}
"""which prompts of the reference split are averaged, by their expected label"""


def sides_task(session: Session, category: str, spaces: Mapping[str, NodeSpace]) -> Task:
    """The prompts of one category, or of `ALL`, against the baseline that the configuration names.

    Raises:
        UserError: the category lacks prompts.
    """
    run, model = session.run, session.model
    experiment, config = run.experiment, DiscoveryOptions.of(run.experiment)
    frame = run.prompts.frame
    if config.contrast == "toxic-hard":
        frame = frame[frame["dataset_type"] != NEGATIVE]
    of = None if category == ALL else category
    balanced, report = balance(frame, of, experiment.prompts.hard_share, experiment.seed)
    words = run.behavior.words
    for line in report.lines(words.kinds):
        say(f"prompts of {line}")
    everyone = _everyone(run)
    population = config.population == "toxic"
    labels = _REFERENCE_LABELS[config.baseline_choice]
    in_reference = (everyone["split"] == "reference") & everyone["refusal_label"].isin(labels)

    used = pd.concat([balanced[balanced["split"] != "reference"], everyone[in_reference]])
    used, tokenized = short_enough(model.tokenize, used, experiment.prompts.max_tokens)
    layout = TemplateLayout.of(tokenized)

    def batches(wanted: pd.Series) -> list[Batch]:
        chosen = [prompt for prompt, want in zip(tokenized, wanted, strict=True) if want]
        return make_batches(chosen, layout, experiment.activations.batch_tokens, model.device)

    explained = used["refusal_label"] == population
    discovery, test = used["split"] == "discovery", used["split"] == "test"
    to_explain = [batches(discovery & explained), batches(test & explained)]
    facts = {"prompts": used, "contrast": config.contrast, "balance": [row._asdict() for row in report.rows]}
    explained_side, task_score, pair_table = words.said(config.population), session.metric, None
    hard = f", its {words.negative} prompts being hard ones" if config.contrast == "toxic-hard" else ""
    say(f"baseline: {words.said(config.baseline_choice)}{hard}")
    if config.baseline_choice == "paired":
        paired = paired_prompts(session, category, spaces)
        baseline, to_explain = paired.baseline, [paired.discovery, paired.test]
        facts["prompts"] = pd.concat([used[discovery], paired.prompts])
    elif config.baseline_choice == "counterfactual":
        paired = against_counterfactuals(session, used, everyone, spaces)
        baseline, to_explain = paired.baseline, [paired.discovery, paired.test]
        facts |= {"prompts": pd.concat([used, paired.prompts]).drop_duplicates("id"), "counterfactuals": paired.counts}
        explained_side, task_score = f"{words.positive} and {words.negative}", paired.score
        pair_table = paired.pair_table
    elif config.baseline_choice == "base":
        baseline, to_explain = against_base(session, spaces, to_explain, layout)
    elif config.baseline_choice == "zero":
        baseline = zero_baseline(spaces, layout)
    else:
        baseline = mean_baseline(model, spaces, batches(used["split"] == "reference"), layout)
    score = session.metric
    separation = auroc(score_prompts(model, score, batches(discovery)), used["refusal_label"][discovery].to_numpy(bool))
    facts["score_auroc"] = None if separation is None else round(separation, 4)
    _warn_of_low(separation, words)
    return Task(task_score, baseline, to_explain[0], to_explain[1], used[discovery], explained_side, facts, pair_table)


def usual_means(session: Session, spaces: Mapping[str, NodeSpace]) -> BaselineTables:
    """The means over the negative prompts of the reference split, of all categories.

    Raises:
        UserError: they do not cover every position of the template.
    """
    model, experiment = session.model, session.run.experiment
    everyone = _everyone(session.run)
    chosen = everyone[(everyone["split"] == "reference") & ~everyone["refusal_label"].astype(bool)]
    _, tokenized = short_enough(model.tokenize, chosen, experiment.prompts.max_tokens)
    layout = TemplateLayout.of(tokenized)
    batches = make_batches(tokenized, layout, experiment.activations.batch_tokens, model.device)
    return mean_baseline(model, spaces, batches, layout)


def _everyone(run: Run) -> pd.DataFrame:
    """The prompts of all categories, balanced, on the sides that the contrast has."""
    experiment, frame = run.experiment, run.prompts.frame
    if DiscoveryOptions.of(experiment).contrast == "toxic-hard":
        frame = frame[frame["dataset_type"] != NEGATIVE]
    return balance(frame, None, experiment.prompts.hard_share, experiment.seed)[0]


def _warn_of_low(separation: float | None, words: Words) -> None:
    if separation is not None and separation < LOW_AUROC:
        say(
            f"warning: the {words.score} tells {words.positive} from {words.negative} prompts with AUROC"
            f" {separation:.2f} only (below {LOW_AUROC}); this model may hardly show the behavior, or the score's"
            " tokens may not be how it opens such replies"
        )


FEWEST = {"discovery": 8, "reference": 4, "test": 4}
"""prompts that each split must have of the sides that it is used for"""


def judged_task(session: Session, category: str, spaces: Mapping[str, NodeSpace]) -> Task:
    """The prompts of one kind and category, or of `ALL`, whose replies show the behavior, against others of the kind.

    The kind is the positive one, or `hard` where the population is the negative side. Sides are judged replies, never
    labels: where the baseline is a mean, it is that of the others; against counterfactuals, both are explained.

    Raises:
        UserError: a side has too few prompts in some split.
    """
    run, model = session.run, session.model
    experiment, config = run.experiment, DiscoveryOptions.of(run.experiment)
    kind = POSITIVE if config.population == "toxic" else HARD
    words = run.behavior.words
    called = words.kinds[kind]
    frame = run.prompts.frame
    frame = frame[(frame["dataset_type"] == kind) & (frame["category"].eq(category) | (category == ALL))]
    if frame.empty:
        raise UserError(f"there are no {called} prompts of {words.group} {category!r} in the data")
    corpus = short_enough(model.tokenize, frame, experiment.prompts.max_tokens)
    prompts = judged(session, corpus.table, kind, category)
    _check_sides(prompts, called, category, words)
    layout = TemplateLayout.of(corpus.sequences)

    def batches(wanted: Bool[np.ndarray, " prompts"]) -> list[Batch]:
        chosen = [corpus.sequences[i] for i in np.flatnonzero(wanted)]
        return make_batches(chosen, layout, experiment.activations.batch_tokens, model.device)

    refused = prompts["refused"].to_numpy(dtype=bool)
    discovery, reference, test = (prompts["split"].eq(split).to_numpy() for split in ("discovery", "reference", "test"))
    score = session.metric
    # The two sides of this task are the judged ones.
    sides = prompts.assign(refusal_label=prompts["refused"].astype(bool))
    separation = auroc(score_prompts(model, score, batches(discovery)), refused[discovery])
    facts = {
        "prompts": prompts,
        "contrast": "refused-complied",
        "score_auroc": None if separation is None else round(separation, 4),
    }
    if config.baseline_choice == "counterfactual":
        paired = against_counterfactuals(session, sides, sides, spaces)
        facts |= {"counterfactuals": paired.counts}
        explained = f"{words.acted} and not {words.acted} {called}"
        return Task(paired.score, paired.baseline, paired.discovery, paired.test, sides[discovery], explained, facts)
    return Task(
        score=score,
        baseline=mean_baseline(model, spaces, batches(reference & ~refused), layout),
        discovery=batches(discovery & refused),
        test=batches(test & refused),
        labelled=sides[discovery],
        population=f"{words.acted} {called}",
        facts=facts,
    )


def _check_sides(prompts: pd.DataFrame, kind: str, category: str, words: Words) -> None:
    """Say to how many prompts of each split the reply shows the behavior or not; too few of either are an error."""
    refused = {split: prompts.loc[prompts["split"] == split, "refused"] for split in FEWEST}
    sides = {split: (int(of_split.sum()), int((~of_split).sum())) for split, of_split in refused.items()}
    told = ", ".join(f"{yes} and {no} in {split}" for split, (yes, no) in sides.items())
    say(f"{kind} prompts of {category}, {words.acted} and not {words.acted}: {told}")
    # Those that show it in the reference split and those that do not in the test split are not used.
    used = {"discovery": min(sides["discovery"]), "reference": sides["reference"][1], "test": sides["test"][0]}
    if any(used[split] < fewest for split, fewest in FEWEST.items()):
        raise UserError(
            f"contrast refused-complied: of the {kind} prompts of {category}, {words.acted} and not {words.acted} are"
            f" {told}; needed are {FEWEST['discovery']} of both in discovery, {FEWEST['reference']} not {words.acted}"
            f" in reference and {FEWEST['test']} {words.acted} in test: take --category all, or --population"
            f" {'safe (hard prompts)' if kind == words.positive else 'toxic'}"
        )


def prepare_problem(session: Session, category: str) -> tuple[Problem, PromptRuns, dict[str, Any]]:
    """Everything discovery and evaluation need: the problem on discovery prompts, the runs of the test prompts, and the
    facts for the manifest: `prompts` (a frame), `population`, `score_auroc`, and what else the task has to say.

    Raises:
        UserError: the task lacks prompts, or an artifact it needs is damaged.
    """
    run, model = session.run, session.model
    config, activations = DiscoveryOptions.of(run.experiment), run.experiment.activations
    kind = NODES[config.nodes]
    saes = session.dictionaries if kind.needs_saes else {}
    sources = Sources(model, activations.sites, activations.layers, saes, session.store)
    spaces = checked(kind.spaces(sources), model)
    own = run.behavior.task(run.experiment, category, model, spaces)
    by_replies = config.contrast == "refused-complied"
    task = own or (judged_task if by_replies else sides_task)(session, category, spaces)
    nodes = Nodes.of_spaces(spaces)
    first = nodes.sites[0]
    problem = Problem(
        model=model,
        score=task.score,
        ablation=Ablation(nodes, spaces, task.baseline, EvaluationOptions.of(run.experiment).error_mode),
        runs=PromptRuns.of(model, task.discovery, first),
        store=session.store,
        prompts=with_store_index(run, task.labelled),
        experiment=run.experiment,
        judge=run.behavior.judge(),
        pair_table=task.pair_table,
    )
    if own is None and not by_replies and category != ALL and config.baseline_choice == "counterfactual":
        problem = replace(problem, pooled=cache(partial(_about_all, session, problem)))
    return problem, PromptRuns.of(model, task.test, first), {**task.facts, "population": task.population}


def prepared_once(session: Session, category: str) -> tuple[Problem, PromptRuns, dict[str, Any]]:
    """`prepare_problem`, once for all studies of the session: a circuit and its nulls are asked the same question."""
    if category not in session.prepared:
        session.prepared[category] = prepare_problem(session, category)
    problem, test_runs, facts = session.prepared[category]
    return problem, test_runs, dict(facts)


def _about_all(session: Session, problem: Problem) -> Problem:
    """The problem on the discovery prompts of all categories, against counterfactuals."""
    say("pairs of all categories, to learn from beside its own")
    everyone = _everyone(session.run)
    explained = everyone[everyone["split"] == "discovery"]
    paired = against_counterfactuals(session, explained, explained, problem.ablation.dictionaries)
    return replace(
        problem,
        score=paired.score,
        ablation=replace(problem.ablation, baseline=paired.baseline),
        runs=PromptRuns.of(problem.model, paired.discovery, problem.ablation.nodes.sites[0]),
        prompts=with_store_index(session.run, paired.prompts),
        pair_table=paired.pair_table,
        pooled=None,
    )


def with_store_index(run: Run, prompts: pd.DataFrame) -> pd.DataFrame:
    """The prompts with their numbers in the store and, where the data set lists them, their topics."""
    stored = read_prompts(run.store.folder).reset_index()
    prompts = prompts.assign(store_index=looked_up(prompts["id"], stored, "store_index")).reset_index(drop=True)
    if not run.behavior.reads_data_set or "original_source" not in prompts:
        return prompts
    topics = listed_topics(run.data_folder, prompts["original_source"].tolist())
    return prompts if topics is None else prompts.assign(topic=topics)
