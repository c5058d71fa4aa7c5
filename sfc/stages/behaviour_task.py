"""The task that behaviour sets: among prompts of one label, what makes the model refuse those that it refuses?"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Bool

from sfc.ablation.references import mean_reference
from sfc.errors import UserError
from sfc.models.batches import Batch, SlotLayout, make_batches
from sfc.models.loading import Model
from sfc.models.score import RefusalScore, auroc, score_prompts
from sfc.progress import say
from sfc.prompts.schema import ALL
from sfc.run import Run
from sfc.saes.dictionary import Dictionary
from sfc.stages.corpus import short_enough
from sfc.stages.judged import judged
from sfc.stages.task import Task

FEWEST = {"discovery": 8, "reference": 4, "test": 4}
"""prompts that each split must have of the sides that it is used for"""


def behaviour_task(run: Run, category: str, model: Model, dictionaries: Mapping[str, Dictionary]) -> Task:
    """The refused prompts of one category, or of `ALL`, against the mean of those of the same label that are answered.

    The label is `toxic`, or `hard` where the population is safe. Sides are judged replies, never labels.

    Raises:
        UserError: a side has too few prompts in some split.
    """
    experiment = run.experiment
    kind = "toxic" if experiment.discovery.population == "toxic" else "hard"
    frame = run.prompts.frame
    frame = frame[(frame["dataset_type"] == kind) & (frame["category"].eq(category) | (category == ALL))]
    if frame.empty:
        raise UserError(f"there are no {kind} prompts of category {category!r} in the data")
    corpus = short_enough(model.tokenize, frame, experiment.prompts.max_tokens)
    prompts = judged(run, model, corpus.table, f"{kind}-{category}")
    _check_sides(prompts, kind, category)
    layout = SlotLayout.of(corpus.sequences)

    def batches(wanted: Bool[np.ndarray, " prompts"]) -> list[Batch]:
        chosen = [corpus.sequences[i] for i in np.flatnonzero(wanted)]
        return make_batches(chosen, layout, experiment.activations.batch_tokens, model.device)

    refused = prompts["refused"].to_numpy(dtype=bool)
    discovery, reference, test = (prompts["split"].eq(split).to_numpy() for split in ("discovery", "reference", "test"))
    score, labelled = RefusalScore.of(model), prompts[discovery]
    separation = auroc(score_prompts(model, score, batches(discovery)), refused[discovery])
    return Task(
        score=score,
        reference=mean_reference(model, dictionaries, batches(reference & ~refused), layout),
        discovery=batches(discovery & refused),
        test=batches(test & refused),
        # The two sides of this task are the judged ones.
        labelled=labelled.assign(refusal_label=labelled["refused"]),
        population=f"refused {kind}",
        facts={
            "prompts": prompts,
            "contrast": "refused-complied",
            "score_auroc": None if separation is None else round(separation, 4),
        },
    )


def _check_sides(prompts: pd.DataFrame, kind: str, category: str) -> None:
    """Say how many prompts of each split were refused and answered; too few of either are an error."""
    refused = {split: prompts.loc[prompts["split"] == split, "refused"] for split in FEWEST}
    sides = {split: (int(of_split.sum()), int((~of_split).sum())) for split, of_split in refused.items()}
    told = ", ".join(f"{yes} and {no} in {split}" for split, (yes, no) in sides.items())
    say(f"{kind} prompts of {category}, refused and answered: {told}")
    # Refused ones of the reference split and answered ones of the test split are not used.
    used = {"discovery": min(sides["discovery"]), "reference": sides["reference"][1], "test": sides["test"][0]}
    if any(used[split] < fewest for split, fewest in FEWEST.items()):
        raise UserError(
            f"contrast refused-complied: of the {kind} prompts of {category}, refused and answered are {told}; needed"
            f" are {FEWEST['discovery']} of both in discovery, {FEWEST['reference']} answered in reference and"
            f" {FEWEST['test']} refused in test: take --category all, or --population"
            f" {'safe (hard prompts)' if kind == 'toxic' else 'toxic'}"
        )
