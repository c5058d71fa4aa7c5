"""The task that a category of the data set sets: what makes the model refuse its prompts?"""

from collections.abc import Mapping

import pandas as pd

from sfc.ablation.references import mean_reference, zero_reference
from sfc.config import ReferenceChoice
from sfc.models.batches import Batch, SlotLayout, make_batches
from sfc.models.loading import Model
from sfc.models.score import RefusalScore, auroc, score_prompts
from sfc.progress import say
from sfc.prompts.balance import balance
from sfc.prompts.schema import ALL
from sfc.run import Run
from sfc.saes.dictionary import Dictionary
from sfc.stages.base import against_base
from sfc.stages.corpus import short_enough
from sfc.stages.paired import paired_prompts
from sfc.stages.task import Task

LOW_AUROC = 0.8
_REFERENCE_LABELS: dict[ReferenceChoice, list[bool]] = {
    "safe-mean": [False],
    "toxic-mean": [True],
    "balanced-mean": [False, True],
    "complied-mean": [],
    "base": [],
    "zero": [],
    "paired": [],
}
"""which prompts of the reference split are averaged, by their expected label"""


def refusal_task(run: Run, category: str, model: Model, dictionaries: Mapping[str, Dictionary]) -> Task:
    """The prompts of one category, or of `ALL`, against the reference that the configuration names.

    Raises:
        UserError: the category lacks prompts.
    """
    experiment, config = run.experiment, run.experiment.discovery
    frame = run.prompts.frame
    if config.contrast == "toxic-hard":
        frame = frame[frame["dataset_type"] != "safe_80k"]
    of = None if category == ALL else category
    balanced, report = balance(frame, of, experiment.prompts.hard_share, experiment.seed)
    for line in report.lines():
        say(f"prompts of {line}")
    everyone, _ = balance(frame, None, experiment.prompts.hard_share, experiment.seed)
    population = config.population == "toxic"
    labels = _REFERENCE_LABELS[config.reference_choice]
    in_reference = (everyone["split"] == "reference") & everyone["refusal_label"].isin(labels)

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
    facts = {"prompts": used, "contrast": config.contrast, "balance": [row._asdict() for row in report.rows]}
    hard = ", its safe prompts being hard ones" if config.contrast == "toxic-hard" else ""
    say(f"reference: {config.reference_choice}{hard}")
    if config.reference_choice == "paired":
        paired = paired_prompts(run, category, model, dictionaries)
        reference, to_explain = paired.reference, [paired.discovery, paired.test]
        facts["prompts"] = pd.concat([used[discovery], paired.prompts])
    elif config.reference_choice == "base":
        reference, to_explain = against_base(run, model, dictionaries, to_explain, layout)
    elif config.reference_choice == "zero":
        reference = zero_reference(dictionaries, layout)
    else:
        reference = mean_reference(model, dictionaries, batches(in_reference), layout)
    score = RefusalScore.of(model)
    facts["score_auroc"] = _score_separation(model, score, batches(discovery), used[discovery])
    return Task(score, reference, to_explain[0], to_explain[1], used[discovery], config.population, facts)


def _score_separation(model: Model, score: RefusalScore, batches: list[Batch], prompts: pd.DataFrame) -> float | None:
    """AUROC of the score between toxic and safe discovery prompts; low values are warned of."""
    separation = auroc(score_prompts(model, score, batches), prompts["refusal_label"].to_numpy(dtype=bool))
    if separation is not None and separation < LOW_AUROC:
        say(
            f"warning: the refusal score tells toxic from safe prompts with AUROC {separation:.2f} only (below"
            f" {LOW_AUROC}); this model may hardly refuse, or model.refusal_tokens may not be how it opens a refusal"
        )
    return None if separation is None else round(separation, 4)
