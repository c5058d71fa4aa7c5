"""What a repair is made from: prompts of each kind and split, the baselines, and the problem that effects are of."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.errors import UserError
from sfc.data.prepare import balance
from sfc.data.render import TokenizedPrompt
from sfc.data.schema import ALL, keyed_ranks
from sfc.models.batches import PACKED_TOKENS, TemplateLayout, make_batches
from sfc.models.generation import with_replies
from sfc.models.score import score_prompts
from sfc.session import Session
from sfc.studies.collect.fill import Corpus, short_enough
from sfc.studies.discover.problem import with_store_index
from sfc.studies.repair.options import KINDS, RepairOptions

_FEWEST = 2


class RepairInputs(NamedTuple):
    """Prompts and what is known of them."""

    problem: Problem
    scored: Mapping[str, PromptRuns]
    """`hard` and `toxic`: refused discovery prompts that features are scored on"""
    tried: Mapping[str, PromptRuns]
    """the same, whether refused or not: those that sizes are tried on"""
    test: Mapping[str, Corpus]
    """by group"""
    ordinary: list[TokenizedPrompt]
    """safe test prompts with the base model's replies"""

    @property
    def layout(self) -> TemplateLayout:
        """The template positions that all these prompts have."""
        return self.problem.ablation.baseline.layout


def repair_inputs(session: Session) -> RepairInputs:
    """Tokenize and score the prompts; compute the baselines.

    Raises:
        UserError: prompts of a kind are missing, or too few of them are refused.
    """
    run, model, score, dictionaries = session.run, session.model, session.metric, session.dictionaries
    experiment, options, seed = run.experiment, RepairOptions.of(run.experiment), run.experiment.seed
    category, frame = run.group(options.category), run.prompts.frame
    ours = frame if category == ALL else frame[frame["category"] == category]
    place = keyed_ranks(ours, ["dataset_type", "split"], f"repair {seed}")
    everyone, _ = balance(frame, None, experiment.prompts.hard_share, seed)
    everywhere = frame[(frame["split"] == "test") & (frame["dataset_type"] == KINDS["safe"])]
    wanted = {
        "discovery": ours[(ours["split"] == "discovery") & (place < options.prompts)],
        "test": ours[(ours["split"] == "test") & (place < options.test_prompts)],
        "reference": everyone[(everyone["split"] == "reference") & ~everyone["refusal_label"]],
        "ordinary": everywhere[keyed_ranks(everywhere, ["split"], f"ordinary {seed}") < options.ordinary_prompts],
    }
    corpora = {name: short_enough(model.tokenize, rows, experiment.prompts.max_tokens) for name, rows in wanted.items()}
    layout = TemplateLayout.of([prompt for corpus in corpora.values() for prompt in corpus.sequences])

    def runs(prompts: list[TokenizedPrompt]) -> PromptRuns:
        batches = make_batches(prompts, layout, experiment.activations.batch_tokens, model.device)
        return PromptRuns.of(model, batches, next(iter(dictionaries)))

    reference_batches = runs(corpora["reference"].sequences).batches
    baseline = mean_baseline(model, dictionaries, reference_batches, layout)
    discovery = {kind: _of_kind(corpora["discovery"], kind) for kind in ("hard", "toxic")}
    scored, tried = {}, {}
    for kind, corpus in discovery.items():
        first_half = keyed_ranks(corpus.table, ["dataset_type"], f"half {seed}").to_numpy() % 2 == 0
        chosen = [prompt for prompt, first in zip(corpus.sequences, first_half, strict=True) if first]
        tried[kind] = runs([prompt for prompt, first in zip(corpus.sequences, first_half, strict=True) if not first])
        refused = score_prompts(model, score, runs(chosen).batches) > options.refused_above
        if refused.sum() < _FEWEST:
            raise UserError(
                f"{refused.sum()} of {len(chosen)} {kind} discovery prompts are {run.behavior.words.acted} (score above"
                f" {options.refused_above}), too few to repair: take --category all, or lower repair.refused_above"
            )
        scored[kind] = runs([prompt for prompt, one in zip(chosen, refused, strict=True) if one])
    problem = Problem(
        model=model,
        score=score,
        ablation=Ablation(Nodes.of_spaces(dictionaries), dictionaries, baseline, "node"),
        runs=scored["hard"],
        store=session.store,
        prompts=with_store_index(run, pd.concat([corpus.table for corpus in discovery.values()])),
        experiment=experiment,
    )
    ordinary = with_replies(
        session.without_adapter, corpora["ordinary"].sequences, options.ordinary_tokens, PACKED_TOKENS
    )
    return RepairInputs(problem, scored, tried, {kind: _of_kind(corpora["test"], kind) for kind in KINDS}, ordinary)


def _of_kind(corpus: Corpus, kind: str) -> Corpus:
    rows = np.flatnonzero(corpus.table["dataset_type"] == KINDS[kind])
    if len(rows) < _FEWEST:
        raise UserError(f"a repair needs {kind} prompts, and there are {len(rows)} in a split: take --category all")
    return Corpus(corpus.table.iloc[rows].reset_index(drop=True), [corpus.sequences[row] for row in rows])
