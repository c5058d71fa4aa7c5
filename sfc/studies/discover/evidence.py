"""What circuits are judged by: test prompts of both sides, under counterfactual and under mean ablation.

A circuit that scores high whatever it is asked passes on one side. Under counterfactual ablation the pairs of the test
split judge it, under mean ablation all test prompts of its group. What each figure means says `sfc.circuits.proof`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from sfc.behaviors.behavior import HARD, NEGATIVE, Words
from sfc.circuits.baselines import BaselineTables
from sfc.circuits.counterfactuals import Counterfactuals
from sfc.circuits.faithfulness import (
    FEWEST_DRAWS,
    Ablations,
    choose_size,
    evaluation_curve,
    faithfulness_of_sizes,
    prepared,
    top_circuits,
)
from sfc.circuits.options import EvaluationOptions, PromptContrast
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.proof import figures_by_size, pair_figures, pair_numbers, pair_scores, says, side_figures, side_scores
from sfc.core.progress import progress_bar, say
from sfc.data.schema import ALL
from sfc.models.batches import make_batches
from sfc.models.engine import next_token_kl
from sfc.session import Session
from sfc.stats import reported
from sfc.studies.collect.fill import short_enough
from sfc.studies.discover.problem import usual_means
from sfc.studies.nulls import beside

_FIGURES = (
    "recovered_toxic", "recovered_safe", "agreement", "kl_recovered_toxic", "kl_recovered_safe",
    "gap_kept", "separation", "separation_model", "prompt_free",
)  # fmt: skip
_SIDES = ("toxic", "safe")
FIGURES = tuple(f"{name}{end}" for name in _FIGURES for end in ("", "_low", "_high"))
"""the figures of a circuit, with the ends of their intervals"""


class ByMeans(NamedTuple):
    """The problem under mean ablation, and the test prompts of both sides."""

    problem: Problem
    runs: PromptRuns
    prompts: pd.DataFrame
    """a row per prompt of the runs: `id`, `kind` (what prompts like it are called), `positive`"""

    @property
    def explained(self) -> PromptRuns:
        """The test prompts that mean ablation is about: those of the population."""
        positive = self.prompts["positive"].to_numpy()
        return self.runs.subset(np.flatnonzero(positive == self.problem.config.explains_positives))


class Evidence(NamedTuple):
    """Everything that a circuit is judged by."""

    problem: Problem
    runs: PromptRuns
    """its test prompts, or pairs"""
    means: ByMeans | None
    """None where the task has no two sides that could be averaged"""

    @classmethod
    def of(cls, session: Session, problem: Problem, test_runs: PromptRuns) -> "Evidence":
        """Contrasts within one side, and pairs whose scores are their own, have no sides to average."""
        config = problem.config
        has_sides = session.run.behavior.has_own_saes and config.contrast in ("toxic-safe", "toxic-hard")
        if not has_sides or config.baseline_choice == "paired":
            return cls(problem, test_runs, None)
        return cls(problem, test_runs, _by_means(session, problem))

    @property
    def published(self) -> tuple[Problem, PromptRuns]:
        """What faithfulness and completeness are measured on: by means where the task has them."""
        return (self.means.problem, self.means.explained) if self.means else (self.problem, self.runs)

    @property
    def answered(self) -> tuple[tuple[Problem, PromptRuns], pd.DataFrame]:
        """Which prompts are answered, under which ablation, and a row for each: `id` and `kind`."""
        rows = rows_of_pairs(self.problem, self.runs)
        if rows is not None:
            return (self.problem, self.runs), rows
        if self.means is not None:
            return (self.means.problem, self.means.runs), self.means.prompts
        alike = pd.DataFrame({"id": range(self.runs.n_prompts), "kind": "explained"})
        return (self.problem, self.runs), alike


class Judged(NamedTuple):
    """What is known of a circuit from prompts of both sides."""

    figures: dict[str, float | None]
    """`FIGURES`; None where one does not exist"""
    scores: pd.DataFrame
    """a row per test pair, or prompt: `id`, `kind`, and the scores of `model` and `circuit`"""


def judge(evidence: Evidence, circuits: Bool[np.ndarray, "circuits nodes"], seed: int) -> list[Judged]:
    """Judge each of the circuits by all that there is."""
    problem, runs, means = evidence
    config = EvaluationOptions.of(problem.experiment)
    measured: list[dict[str, float | None]] = [{} for _ in circuits]
    tables = [pd.DataFrame(columns=["id", "kind", "model", "circuit"])] * len(circuits)
    if means is not None and means.prompts["positive"].nunique() == 2:
        total = (2 * len(circuits) + 1) * means.runs.n_prompts
        with progress_bar("prompts of both sides", total, "runs") as progress:
            sides = side_scores(means.problem, means.runs, means.prompts["positive"].to_numpy(), circuits, progress)
        tables = [means.prompts[["id", "kind"]].assign(model=s.model, circuit=s.circuit) for s in sides]
        for figures, scores in zip(measured, sides, strict=True):
            figures |= side_figures(scores, config.min_denominator, seed)
    if isinstance(problem.ablation.baseline, Counterfactuals):
        with progress_bar("pairs of both sides", (len(circuits) + 1) * runs.n_prompts, "runs") as progress:
            pairs = pair_scores(problem.model, problem.score, problem.ablation, runs, circuits, progress)
        rows = rows_of_pairs(problem, runs)
        assert rows is not None
        tables = [rows.assign(model=s.model, circuit=s.circuit) for s in pairs]
        for figures, scores in zip(measured, pairs, strict=True):
            figures |= pair_figures(scores, config.min_denominator, seed)
    return [
        Judged({name: reported(figures.get(name)) for name in FIGURES}, table)
        for figures, table in zip(measured, tables, strict=True)
    ]


def chosen_size(
    problem: Problem, ranking: Int[np.ndarray, " ranked"], sizes: Sequence[int]
) -> tuple[int, Float[np.ndarray, " sizes"]]:
    """The size of the circuit that is reported, and the figure of every size by which it is chosen.

    On the discovery split: the least of agreement and recovered shares; by means, faithfulness.
    """
    config, runs = EvaluationOptions.of(problem.experiment), problem.runs
    with progress_bar("choosing a size", (len(sizes) + 1) * runs.n_prompts, "runs") as progress:
        if isinstance(problem.ablation.baseline, Counterfactuals):
            figures = figures_by_size(problem, ranking, sizes, config.min_denominator, progress)
            figure = figures.min(axis=1, skipna=False).to_numpy(dtype=float)
        else:
            by_size = faithfulness_of_sizes(problem, runs, ranking, sizes, config.min_denominator, progress)
            figure = np.array(by_size, dtype=float)
    if np.isnan(figure).all():
        say("warning: F(M) - F(0) is too small to divide by; nothing is restored that could be measured")
    size = choose_size(np.array(sizes), figure, config.target)
    reached = figure[list(sizes).index(size)]
    if not reached >= config.target:
        say(f"no size reaches {config.target} on discovery prompts: {size:,} nodes reach {reached:.2f}")
    return size, figure


def judged_curve(
    evidence: Evidence,
    ranking: Int[np.ndarray, " ranked"],
    sizes: Sequence[int],
    reported: int,
    nulls: pd.DataFrame | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the best nodes are worth on test prompts, for each size; and `Judged.scores` of the reported size.

    The curve has the columns of `evaluation_curve`, those of `FIGURES` that were measured, and the agreement of null
    dictionaries where there are any.
    """
    problem, runs = evidence.published
    config, seed = EvaluationOptions.of(problem.experiment), problem.experiment.seed
    # Random circuits are as many as it takes, of each size at least these.
    total = (1 + (3 + 2 * min(FEWEST_DRAWS, config.random_draws)) * len(sizes)) * runs.n_prompts
    with progress_bar("evaluating", total, "runs") as progress:
        curve = evaluation_curve(problem, runs, ranking, sizes, config, seed, progress)
    judged = judge(evidence, top_circuits(ranking, sizes, problem.ablation.nodes.n_nodes), seed)
    figures = pd.DataFrame([each.figures for each in judged]).astype(float).dropna(axis=1, how="all")
    compared = pd.DataFrame(
        [{name: value for name, value in beside(nulls, size, None).items() if name != "p_value"} for size in sizes]
    )
    curve = pd.concat([curve, figures, compared.astype(float).dropna(axis=1, how="all")], axis=1)
    return curve, judged[list(sizes).index(reported)].scores


def all_features(evidence: Evidence) -> dict[str, float | None]:
    """What all features together restore without the errors, in the direction in which they restore less: the limit.

    Returns:
        `all_features_recovered` with the ends of its interval; None without counterfactuals, and without features.
    """
    names = [f"all_features_recovered{end}" for end in ("", "_low", "_high")]
    nodes, baseline = evidence.problem.ablation.nodes, evidence.problem.ablation.baseline
    if not isinstance(baseline, Counterfactuals) or nodes.is_error.sum() in (0, nodes.n_nodes):
        return dict.fromkeys(names)
    [judged] = judge(evidence._replace(means=None), ~nodes.is_error[None], evidence.problem.experiment.seed)
    directions = [[judged.figures[f"recovered_{side}{end}"] for end in ("", "_low", "_high")] for side in _SIDES]
    measured = [direction for direction in directions if direction[0] is not None]
    return dict(zip(names, min(measured), strict=True)) if len(measured) == 2 else dict.fromkeys(names)


def kl_without(evidence: Evidence, circuit: Bool[np.ndarray, " nodes"]) -> float | None:
    """What ablating the circuit does to prompts of the negative side: mean KL(M to M\\C) of the next token, in nats.

    By means; None where the task has none.
    """
    if evidence.means is None or evidence.means.prompts["positive"].all():
        return None
    problem, runs, prompts = evidence.means
    harmless = runs.subset(np.flatnonzero(~prompts["positive"].to_numpy()))
    without = Ablations(problem.ablation, ~circuit[None])
    return reported(next_token_kl(prepared(problem.model, harmless), without).mean())


def rows_of_pairs(problem: Problem, runs: PromptRuns) -> pd.DataFrame | None:
    """The rows of `problem.pair_table` in the order of the runs; None without counterfactuals."""
    if problem.pair_table is None:
        return None
    return problem.pair_table.iloc[pair_numbers(runs)].reset_index(drop=True)


def told(result: Mapping[str, Any], target: float, contrast: PromptContrast, words: Words) -> str | None:
    """The sentence about a circuit; see `sfc.circuits.proof.says`."""
    positive, negative = {
        "toxic-hard": (words.positive, HARD),
        "refused-complied": (words.acted, f"not {words.acted}"),
    }.get(contrast, (words.positive, words.negative))
    replies = {kind: (n["model"], n["circuit"], n["n"]) for kind, n in result["refused"].items()}
    told = says(result, replies, positive, negative, words.acts)
    short = "" if result["reached_target"] else f"; no size reaches {target:g} on discovery prompts"
    return f"{told}{short}" if told else None


def _by_means(session: Session, problem: Problem) -> ByMeans:
    """All test prompts of the group that are short enough, and the problem with means for a baseline."""
    run, model, own = session.run, session.model, problem.ablation.baseline
    group, frame = run.group(problem.config.category), run.prompts.frame
    wanted = frame[(frame["split"] == "test") & (frame["category"].eq(group) | (group == ALL))]
    if problem.config.contrast == "toxic-hard":
        wanted = wanted[wanted["dataset_type"] != NEGATIVE]
    table, sequences = short_enough(model.tokenize, wanted, run.experiment.prompts.max_tokens)
    prompts = pd.DataFrame(
        {
            "id": table["id"].to_numpy(),
            "kind": table["dataset_type"].map(run.behavior.words.kinds).to_numpy(),
            "positive": table["refusal_label"].to_numpy(dtype=bool),
        }
    )
    means = own if isinstance(own, BaselineTables) else usual_means(session, problem.ablation.dictionaries)
    batches = make_batches(sequences, own.layout, run.experiment.activations.batch_tokens, model.device)
    runs = PromptRuns.of(model, batches, problem.ablation.nodes.sites[0])
    ablation = replace(problem.ablation, baseline=means)
    return ByMeans(replace(problem, score=session.metric, ablation=ablation, pair_table=None), runs, prompts)
