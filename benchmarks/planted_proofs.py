"""Both ways to ask which nodes decide, and all figures of the proof for whatever circuit either of them finds.

By *means*, of toxic prompts alone, as circuits are published: whatever is ablated has its mean over safe prompts. By
*pairs*, of both sides: it has the value that it has in the run of an equally long prompt of the other side. Errors are
ablated in both: a circuit is made of features.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import harness
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from planted_problems import ACTIVATIONS, Prompts

from sfc.circuits import faithfulness, proof
from sfc.circuits.counterfactuals import Counterfactuals, Pairs
from sfc.circuits.methods import METHODS
from sfc.circuits.problem import Problem, PromptRuns
from sfc.data.counterfactual import counterfactual_pairs
from sfc.models.batches import make_batches
from sfc.models.score import DirectedScore
from sfc.stats import bootstrap_ratio
from sfc.studies.discover.evidence import chosen_size

PAIRS_PER_PROMPT = 3
SIZES = (*range(1, 21), 25, 30, 40, 50, 75, 100, 150, 200, 300)
MIN_DENOMINATOR = 0.5
"""nats: smaller differences are not measurable"""
FIGURES = (
    "faithfulness", "recovered_toxic", "recovered_safe", "agreement", "kl_recovered_toxic", "kl_recovered_safe",
    "gap_kept", "separation", "prompt_free",
)  # fmt: skip
"""of the circuit on test prompts: faithfulness by means, and those of `sfc.circuits.proof`"""

Circuit = Bool[np.ndarray, " nodes"]
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Asked:
    """One problem, asked in both ways, and the test prompts."""

    by: Mapping[str, Problem]
    """`means` and `pairs`"""
    pairs: PromptRuns
    both_sides: PromptRuns
    positive: Bool[np.ndarray, " prompts"]
    """which of the test prompts are toxic"""

    @classmethod
    def of(cls, problem: Problem, prompts: Prompts) -> "Asked":
        """Ask in both ways what `problem` asks by means."""
        model, spaces, layout = problem.model, problem.ablation.dictionaries, problem.ablation.baseline.layout
        sides = [(True, "discovery"), (False, "discovery"), (True, "test"), (False, "test")]
        texts = [prompts.toxic, prompts.safe, prompts.test_toxic, prompts.test_safe]
        tokenized = model.tokenize([text for side in texts for text in side])
        table = pd.DataFrame(
            [side for side, of_side in zip(sides, texts, strict=True) for _ in of_side], columns=["positive", "split"]
        ).assign(
            id=[str(number) for number in range(len(tokenized))],
            category="planted",
            length=[len(prompt.ids) for prompt in tokenized],
            first_token=[int(prompt.ids[0]) for prompt in tokenized],
        )
        found = counterfactual_pairs(table, table["positive"].notna(), PAIRS_PER_PROMPT, seed=0).table
        pairs = Pairs(*(torch.from_numpy(found[name].to_numpy(copy=True)) for name in Pairs._fields))
        baseline = Counterfactuals.of(model, spaces, tokenized, pairs, layout, ACTIVATIONS.batch_tokens)

        def runs_of(split: str) -> PromptRuns:
            chosen = torch.from_numpy((found["split"] == split).to_numpy(copy=True))
            batches = baseline.batches(tokenized, chosen, ACTIVATIONS.batch_tokens)
            return PromptRuns.of(model, batches, problem.ablation.nodes.sites[0])

        by_means = replace(problem, ablation=replace(problem.ablation, error_mode="ablate"))
        by_pairs = replace(
            by_means,
            score=DirectedScore(problem.score, pairs.direction),
            ablation=replace(by_means.ablation, baseline=baseline),
            runs=runs_of("discovery"),
        )
        in_test = np.flatnonzero(table["split"] == "test")
        batches = make_batches([tokenized[i] for i in in_test], layout, ACTIVATIONS.batch_tokens, model.device)
        return cls(
            {"means": by_means, "pairs": by_pairs},
            runs_of("test"),
            PromptRuns.of(model, batches, problem.ablation.nodes.sites[0]),
            table["positive"].to_numpy(dtype=bool)[in_test],
        )

    def ranking(self, method: str, by: str) -> Int[np.ndarray, " ranked"]:
        """The nodes as a method ranks them, best first."""
        return METHODS[method].rank(self.by[by]).ranking

    def smallest(self, ranking: Int[np.ndarray, " ranked"], by: str) -> Circuit:
        """The best nodes, as many as discovery reports: those that reach the target on discovery prompts, if any do."""
        sizes = faithfulness.curve_sizes(SIZES, len(ranking))
        return self.best(ranking, chosen_size(self.by[by], ranking, sizes)[0])

    def best(self, ranking: Int[np.ndarray, " ranked"], size: int) -> Circuit:
        """The best `size` nodes."""
        return faithfulness.top_circuits(ranking, [size], self.by["pairs"].ablation.nodes.n_nodes)[0]

    def figures(self, circuit: Circuit) -> Figures:
        """What the circuit does to test prompts: `FIGURES`, None where one cannot be measured."""
        problem = self.by["pairs"]
        [of_pairs] = proof.pair_scores(problem.model, problem.score, problem.ablation, self.pairs, circuit[None])
        [sides] = proof.side_scores(self.by["means"], self.both_sides, self.positive, circuit[None])
        restored, whole = (values[self.positive] for values in (sides.circuit - sides.empty, sides.model - sides.empty))
        figures: Figures = {
            "faithfulness": bootstrap_ratio(restored, whole, np.arange(len(whole)), 0, MIN_DENOMINATOR).value,
            **proof.pair_figures(of_pairs, MIN_DENOMINATOR, seed=0),
            **proof.side_figures(sides, MIN_DENOMINATOR, seed=0),
        }
        return {name: figures[name] for name in FIGURES}


def means(measured: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """A row for each value of `by`, in the order in which they come: means of all other columns where measurable."""
    return measured.drop(columns="seed").groupby(list(by), sort=False).mean().reset_index()


def table(averaged: pd.DataFrame) -> str:
    """The rows in Markdown, names of figures with spaces, two digits."""
    rows = averaged.astype(object).where(averaged.notna(), None).to_numpy().tolist()
    cells = [[f"{value:.2f}" if isinstance(value, float) else value for value in row] for row in rows]
    return harness.markdown_table([column.replace("_", " ") for column in averaged.columns], cells)


def figures_of(averaged: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """The rows for JSON, rounded."""
    rows = averaged.round(4).astype(object)
    return rows.where(averaged.notna(), None).to_dict("records")
