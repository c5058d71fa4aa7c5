"""Planted cheats: who takes a constant refusal for a circuit?

Beside a circuit of many nodes, each of which carries a little, the model has offsets: features that no prompt makes
fire, but that do where what they read is at its mean. Whoever asks by means of one side alone is offered a circuit of
three nodes that scores high on every prompt.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from planted_circuits import OFFSETS, VOTES
from planted_problems import Planted, plant_circuit
from planted_proofs import Asked

from sfc.circuits.methods import METHODS

PROMPTS = 12
"""per side and split"""
MASK_STEPS = 120
ABOUT = ("method", "asked")
"""the columns that say what a row is of"""
ASKED = {"means": "toxic prompts, means", "pairs": "both sides, counterfactuals"}


def plant_cheat(seed: int, folder: Path) -> Planted:
    """A circuit among distractors and offsets."""
    return plant_circuit(VOTES, np.random.default_rng([seed, *b"cheat"]), folder, OFFSETS, PROMPTS)


def measure(seeds: Sequence[int], methods: Sequence[str]) -> pd.DataFrame:
    """A row for each seed, method and way to ask: how many nodes, precision and recall of them, and all figures.

    Methods that are not causal look at stored values alone, whatever ablation is: they are asked once.
    """
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            planted = plant_cheat(seed, Path(folder))
            problem = planted.problem.with_settings(learned_mask={"steps": MASK_STEPS})
            asked = Asked.of(problem, planted.prompts)
            for by in asked.by:
                for method in (METHODS[name] for name in methods):
                    if by == "means" or method.causal:
                        circuit = asked.smallest(asked.ranking(method.name, by), by)
                        hits = int((circuit & planted.mask).sum())
                        rows.append(
                            {
                                "method": method.name,
                                "asked": ASKED[by],
                                "seed": seed,
                                "nodes": float(circuit.sum()),
                                "precision": hits / int(circuit.sum()),
                                "recall": hits / int(planted.mask.sum()),
                                **asked.figures(circuit),
                            }
                        )
    return pd.DataFrame(rows)
