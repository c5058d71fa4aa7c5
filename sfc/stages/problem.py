"""The question that circuits are found and judged by: model, dictionaries, prompts and references of one task."""

from typing import Any

import pandas as pd

from sfc.ablation.ablate import Ablation
from sfc.ablation.components import component_spaces
from sfc.ablation.nodes import Nodes
from sfc.activations.store import Store
from sfc.circuits.problem import Problem, PromptRuns
from sfc.models.loading import choose_device, load_model
from sfc.prompts.topics import listed_topics
from sfc.run import Run
from sfc.stages.behaviour_task import behaviour_task
from sfc.stages.collect import PROMPTS_FILE
from sfc.stages.pairs_task import pairs_task
from sfc.stages.refusal_task import refusal_task
from sfc.stages.train import load_dictionaries


def prepare_problem(run: Run, category: str) -> tuple[Problem, PromptRuns, dict[str, Any]]:
    """Everything discovery and evaluation need: the problem on discovery prompts, the runs of the test prompts, and the
    facts for the manifest: `prompts` (a frame), `population`, `score_auroc`, and what else the task has to say.

    Raises:
        UserError: the task lacks prompts, or an artifact it needs is corrupt.
    """
    experiment = run.experiment
    model = load_model(experiment.model, choose_device(run.device))
    kind, error_mode = experiment.discovery.nodes, experiment.evaluation.error_mode
    if kind == "features":
        dictionaries = load_dictionaries(run.saes.folder, experiment.activations.sites, model.device)
    else:
        dictionaries, error_mode = component_spaces(model, kind, experiment.activations.layers), "node"  # no errors
    if run.pairs:
        task = pairs_task(run, run.pairs, model, dictionaries)
    elif experiment.discovery.contrast == "refused-complied":
        task = behaviour_task(run, category, model, dictionaries)
    else:
        task = refusal_task(run, category, model, dictionaries)
    nodes = Nodes.of_spaces(dictionaries)
    first = nodes.sites[0]
    problem = Problem(
        model=model,
        score=task.score,
        ablation=Ablation(nodes, dictionaries, task.reference, error_mode),
        runs=PromptRuns.of(model, task.discovery, first),
        store=Store(run.store.folder),
        prompts=with_store_index(run, task.labelled),
        config=experiment.discovery,
    )
    return problem, PromptRuns.of(model, task.test, first), {**task.facts, "population": task.population}


def with_store_index(run: Run, prompts: pd.DataFrame) -> pd.DataFrame:
    """The prompts with their numbers in the store and, where the data set lists them, their topics."""
    stored = pd.read_csv(run.store.folder / PROMPTS_FILE, keep_default_na=False)
    index = dict(zip(stored["prompt"], stored["store_index"], strict=True))
    topics = None if run.pairs else listed_topics(run.data_folder, prompts["original_source"].tolist())
    listed = {} if topics is None else {"topic": topics}
    return prompts.assign(store_index=prompts["prompt"].map(index), **listed).reset_index(drop=True)
