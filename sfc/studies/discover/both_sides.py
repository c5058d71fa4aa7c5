"""What a circuit does to test prompts of both sides: the figures that a circuit which cannot hear the prompt fails."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool

from sfc.circuits.baselines import BaselineTables
from sfc.circuits.counterfactuals import Counterfactuals
from sfc.circuits.options import EvaluationOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.proof import pair_figures, pair_scores, says, side_figures, side_scores
from sfc.core.progress import progress_bar
from sfc.data.schema import ALL
from sfc.models.batches import make_batches
from sfc.session import Session
from sfc.studies.collect.fill import short_enough

_FIGURES = (
    "recovered_toxic", "recovered_safe", "agreement", "kl_recovered_toxic", "kl_recovered_safe",
    "gap_kept", "separation", "separation_model", "prompt_free",
)  # fmt: skip
_KEYS = [f"{name}{end}" for name in _FIGURES for end in ("", "_low", "_high")]


class BothSides(NamedTuple):
    """What is known of a circuit from prompts of both sides."""

    figures: dict[str, Any]
    """see `sfc.circuits.proof`; None where a figure does not exist, and `says`, the sentence"""
    scores: pd.DataFrame
    """a row per test prompt, or pair: `id`, `kind`, and the scores of `model` and `circuit`"""


def judge_both_sides(
    session: Session, problem: Problem, test_runs: PromptRuns, circuit: Bool[np.ndarray, " nodes"]
) -> BothSides:
    """Judge a circuit on the test prompts of both sides, by the ablation that it was found by.

    Under counterfactual ablation these are the pairs of the test split, under mean ablation all test prompts of its
    group. Contrasts within one side, and pairs whose scores are their own, have no two sides: nothing is measured.
    """
    run, baseline = session.run, problem.ablation.baseline
    config, seed, words = EvaluationOptions.of(run.experiment), run.experiment.seed, run.behavior.words
    has_sides = run.behavior.has_own_saes and problem.config.contrast in ("toxic-safe", "toxic-hard")
    measured: dict[str, float | None] = {}
    table = pd.DataFrame(columns=["id", "kind", "model", "circuit"])
    if isinstance(baseline, Counterfactuals):
        with progress_bar("pairs of both sides", 2 * test_runs.n_prompts, "runs") as progress:
            [pairs] = pair_scores(problem.model, problem.score, problem.ablation, test_runs, circuit[None], progress)
        measured = pair_figures(pairs, config.min_denominator, seed)
        kinds = np.where(pairs.positive, words.positive, words.negative)
        table = pd.DataFrame({"id": pairs.prompt, "kind": kinds, "model": pairs.model, "circuit": pairs.circuit})
    elif isinstance(baseline, BaselineTables) and has_sides and problem.config.baseline_choice != "paired":
        runs, frame = _both(session, problem)
        positive = frame["refusal_label"].to_numpy(dtype=bool)
        if positive.any() and not positive.all():
            with progress_bar("prompts of both sides", 3 * runs.n_prompts, "runs") as progress:
                [sides] = side_scores(problem, runs, positive, circuit[None], progress)
            measured = side_figures(sides, config.min_denominator, seed)
            kinds = frame["dataset_type"].map(words.kinds)
            table = pd.DataFrame({"id": frame["id"], "kind": kinds, "model": sides.model, "circuit": sides.circuit})
    figures: dict[str, Any] = {
        name: None if (value := measured.get(name)) is None else round(float(value), 4) for name in _KEYS
    }
    told = says(measured, None, words.positive, words.negative)
    return BothSides(figures | {"says": told or None}, table)


def _both(session: Session, problem: Problem) -> tuple[PromptRuns, pd.DataFrame]:
    """All test prompts of the group that are short enough, and their table."""
    run, model = session.run, problem.model
    group, frame = run.group(problem.config.category), run.prompts.frame
    wanted = frame[(frame["split"] == "test") & (frame["category"].eq(group) | (group == ALL))]
    corpus = short_enough(model.tokenize, wanted, run.experiment.prompts.max_tokens)
    tokens = run.experiment.activations.batch_tokens
    batches = make_batches(corpus.sequences, problem.ablation.baseline.layout, tokens, model.device)
    return PromptRuns.of(model, batches, problem.ablation.nodes.sites[0]), corpus.table
