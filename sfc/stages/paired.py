"""Paired references: the prompts of `pairs.csv`, each held against its own partner and not against a mean."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from sfc.ablation.references import Reference, check_covered, paired_reference
from sfc.errors import UserError
from sfc.models.batches import Batch, SlotLayout, make_batches
from sfc.models.loading import Model
from sfc.prompts.pairs import load_pairs
from sfc.run import Run
from sfc.saes.dictionary import Dictionary


class Paired(NamedTuple):
    """The prompts that a circuit explains, with their partners as the reference."""

    reference: Reference
    discovery: list[Batch]
    test: list[Batch]
    prompts: pd.DataFrame
    """columns `prompt`, `category`, `refusal_label`, `dataset_type`, `split`; partners are of the split `reference`"""


def paired_prompts(run: Run, category: str, model: Model, dictionaries: Mapping[str, Dictionary]) -> Paired:
    """The category's pairs: those of the population are explained, the others give the reference.

    Raises:
        UserError: there are too few pairs, or none short enough.
    """
    experiment, population = run.experiment, run.experiment.discovery.population
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
    layout = SlotLayout.of([*explained, *partners])
    tokens = experiment.activations.batch_tokens

    def batches(chosen: np.ndarray) -> list[Batch]:
        plain = make_batches([explained[i] for i in chosen], layout, tokens, model.device)
        tables = torch.from_numpy(chosen).to(model.device)
        return [batch.with_tables(tables[batch.prompts], layout) for batch in plain]

    reference = paired_reference(model, dictionaries, make_batches(partners, layout, tokens, model.device), layout)
    discovery, test = (batches(of_split[split]) for split in ("discovery", "test"))
    check_covered(reference, [*discovery, *test])
    kept = pairs[fits]
    frames = [
        pd.DataFrame({"prompt": kept[population], "refusal_label": population == "toxic", "split": kept["split"]}),
        pd.DataFrame({"prompt": kept[partner], "refusal_label": partner == "toxic", "split": "reference"}),
    ]
    prompts = pd.concat(frames).assign(category=category, dataset_type="pair")
    return Paired(reference, discovery, test, prompts)
