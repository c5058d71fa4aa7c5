"""A task: what a circuit is to explain. Refusing the prompts of a category is one, a file of pairs sets another."""

from typing import Any, NamedTuple

import pandas as pd

from sfc.circuits.baselines import Reference
from sfc.models.batches import Batch
from sfc.models.score import Score


class Task(NamedTuple):
    """Everything that discovery and evaluation must be told beside the model and its dictionaries."""

    score: Score
    reference: Reference
    discovery: list[Batch]
    """the prompts that the circuit explains"""
    test: list[Batch]
    labelled: pd.DataFrame
    """all discovery prompts, those explained and others: columns `prompt`, `refusal_label`"""
    population: str
    """what the prompts explained are called"""
    facts: dict[str, Any]
    """for the manifest: `prompts` (a frame), `score_auroc`, and what else there is to say"""
