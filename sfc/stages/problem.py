"""The question that circuits are found and judged by: model, dictionaries, prompts and references of one category."""

from typing import Any

import pandas as pd

from sfc.ablation.ablate import Ablation
from sfc.ablation.nodes import Nodes
from sfc.ablation.references import mean_reference, zero_reference
from sfc.activations.store import Store
from sfc.circuits.problem import Problem, PromptRuns
from sfc.config import ReferenceChoice
from sfc.models.batches import Batch, SlotLayout, make_batches
from sfc.models.loading import Model, choose_device, load_model
from sfc.models.score import RefusalScore, auroc, score_prompts
from sfc.pipeline import Run
from sfc.progress import say
from sfc.prompts.balance import balance
from sfc.prompts.topics import listed_topics
from sfc.stages.collect import PROMPTS_FILE
from sfc.stages.corpus import short_enough
from sfc.stages.paired import paired_prompts
from sfc.stages.train import load_dictionaries

LOW_AUROC = 0.8
_REFERENCE_LABELS: dict[ReferenceChoice, list[bool]] = {
    "safe-mean": [False],
    "toxic-mean": [True],
    "balanced-mean": [False, True],
    "zero": [],
    "paired": [],
}
"""which prompts of the reference split are averaged, by their expected label"""


def prepare_problem(run: Run, category: str) -> tuple[Problem, PromptRuns, dict[str, Any]]:
    """Everything discovery and evaluation need: the problem on discovery prompts, the runs of the test prompts, and the
    facts for the manifest: `prompts` (a frame), `balance`, `score_auroc`.

    Raises:
        UserError: the category lacks prompts, or an artifact it needs is corrupt.
    """
    experiment, config = run.experiment, run.experiment.discovery
    frame = run.prompts.frame
    balanced, report = balance(frame, category, experiment.prompts.hard_share, experiment.seed)
    for line in report.lines():
        say(f"prompts of {line}")
    everyone, _ = balance(frame, None, experiment.prompts.hard_share, experiment.seed)
    population = config.population == "toxic"
    labels = _REFERENCE_LABELS[config.reference_choice]
    in_reference = (everyone["split"] == "reference") & everyone["refusal_label"].isin(labels)

    model = load_model(experiment.model, choose_device(run.device))
    dictionaries = load_dictionaries(run.saes.folder, experiment.activations.sites, model.device)
    used = pd.concat([balanced[balanced["split"] != "reference"], everyone[in_reference]])
    used, tokenized = short_enough(model.tokenize, used, experiment.prompts.max_tokens)
    layout = SlotLayout.of(tokenized)

    def batches(wanted: pd.Series) -> list[Batch]:
        chosen = [prompt for prompt, want in zip(tokenized, wanted, strict=True) if want]
        return make_batches(chosen, layout, experiment.activations.batch_tokens, model.device)

    explained = used["refusal_label"] == population
    discovery, test = used["split"] == "discovery", used["split"] == "test"
    in_reference = used["split"] == "reference"
    to_explain = [batches(discovery & explained), batches(test & explained)]
    facts = {"prompts": used, "balance": [row._asdict() for row in report.rows]}
    say(f"reference: {config.reference_choice}")
    if config.reference_choice == "paired":
        paired = paired_prompts(run, category, model, dictionaries)
        reference, to_explain = paired.reference, [paired.discovery, paired.test]
        facts["prompts"] = pd.concat([used[discovery], paired.prompts])
    elif config.reference_choice == "zero":
        reference = zero_reference(dictionaries, layout)
    else:
        reference = mean_reference(model, dictionaries, batches(in_reference), layout)
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()})
    score = RefusalScore.of(model)
    first = nodes.sites[0]
    problem = Problem(
        model=model,
        score=score,
        ablation=Ablation(nodes, dictionaries, reference, experiment.evaluation.error_mode),
        runs=PromptRuns.of(model, to_explain[0], first),
        store=Store(run.store.folder),
        prompts=_with_store_index(run, used[discovery]),
        config=config,
    )
    facts["score_auroc"] = _score_separation(model, score, batches(discovery), used[discovery])
    return problem, PromptRuns.of(model, to_explain[1], first), facts


def _score_separation(model: Model, score: RefusalScore, batches: list[Batch], prompts: pd.DataFrame) -> float | None:
    """AUROC of the score between toxic and safe discovery prompts; low values are warned of."""
    separation = auroc(score_prompts(model, score, batches), prompts["refusal_label"].to_numpy(dtype=bool))
    if separation is not None and separation < LOW_AUROC:
        say(
            f"warning: the refusal score tells toxic from safe prompts with AUROC {separation:.2f} only (below"
            f" {LOW_AUROC}); this model may hardly refuse, or model.refusal_tokens may not be how it opens a refusal"
        )
    return None if separation is None else round(separation, 4)


def _with_store_index(run: Run, prompts: pd.DataFrame) -> pd.DataFrame:
    stored = pd.read_csv(run.store.folder / PROMPTS_FILE, keep_default_na=False)
    index = dict(zip(stored["prompt"], stored["store_index"], strict=True))
    topics = listed_topics(run.data_folder, prompts["original_source"].tolist())
    listed = {} if topics is None else {"topic": topics}
    return prompts.assign(store_index=prompts["prompt"].map(index), **listed).reset_index(drop=True)
