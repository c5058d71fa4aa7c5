"""The model against the one that it was trained from, on the same prompts: what training changed, node by node.

Both are read by the same dictionaries, those of the trained model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float

from sfc.circuits.baselines import BaselineTables, baseline_in_tables, tables_of
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.methods import attribution
from sfc.circuits.options import base_model
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.spaces import NodeSpace
from sfc.core.errors import UserError
from sfc.core.progress import say
from sfc.models.batches import Batch, TemplateLayout
from sfc.models.loading import Model
from sfc.session import Session

BASE_FILE = "base.csv"
TIMES = 5.0
"""a feature that fires on so many times more prompts in one of the models appears or vanishes"""


def against_base(
    session: Session,
    spaces: Mapping[str, NodeSpace],
    parts: Sequence[list[Batch]],
    layout: TemplateLayout,
) -> tuple[BaselineTables, list[list[Batch]]]:
    """What the base model has at every node on each of these prompts, as their baseline, and batches that point to it.

    Raises:
        UserError: the base model is of other sizes, or reads the tokens differently.
    """
    base = load_base(session)
    with_tables, n_before = [], 0
    for part in parts:
        with_tables.append([batch.with_tables(batch.prompts + n_before, layout) for batch in part])
        n_before += sum(len(batch.prompts) for batch in part)
    say(f"baseline: the same prompts in the base model, {base.config.source}")
    return baseline_in_tables(base, spaces, list(chain(*with_tables)), layout), with_tables


def load_base(session: Session) -> Model:
    """The model that the session's model was trained from.

    Raises:
        UserError: it is of other sizes, or reads the tokens differently.
    """
    model, base = session.model, session.load(base_model(session.run.experiment))
    if (base.n_layers, base.d_model) != (model.n_layers, model.d_model):
        raise UserError(
            f"discovery.base: {base.config.source} has {base.n_layers} layers of width {base.d_model}, the model"
            f" {model.n_layers} of {model.d_model}: it was not trained from it"
        )
    if base.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise UserError(f"discovery.base: {base.config.source} has another vocabulary than the model")
    return base


def base_changes(
    session: Session, problem: Problem, test_runs: PromptRuns, members: Sequence[int]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What the circuit's nodes were before training, and what they do when they are put into the base model.

    Args:
        problem: of the contrast `model-base`.

    Returns:
        a table with a row per node: `effect`, on the model, of taking the base's value (first order; positive: the
        score falls), `effect_in_base`, on the base, of taking the model's (positive: the score rises), the shares of
        discovery prompts on which it `fires` and `fired` in the base, and `change`; and figures on test prompts:
        `f_base`, and the base's score with the circuit's and with all nodes' values of the model.
    """
    nodes, dictionaries = problem.ablation.nodes, problem.ablation.dictionaries
    before = tables_of(problem.ablation.baseline)
    layout = before.layout
    batches = [*problem.runs.batches, *test_runs.batches]
    now = baseline_in_tables(problem.model, dictionaries, batches, layout)
    base = load_base(session)
    first = nodes.sites[0]
    swapped = replace(
        problem,
        model=base,
        ablation=replace(problem.ablation, baseline=now),
        runs=PromptRuns.of(base, problem.runs.batches, first),
    )
    tables = torch.cat([batch.tables(layout) for batch in problem.runs.batches])
    fires, fired = (_shares(problem, baseline, tables)[list(members)] for baseline in (now, before))
    table = pd.DataFrame(
        {
            "node": [nodes.name(node) for node in members],
            "effect": attribution.rank(problem).effect[list(members)],
            # Ablated nodes of the base take the model's values, so what is lost by it is minus what is gained.
            "effect_in_base": -attribution.rank(swapped).effect[list(members)],
            "fires": fires,
            "fired": fired,
            "change": [_change(*shares) for shares in zip(fires, fired, strict=True)],
        }
    )
    in_base = PromptRuns.of(base, test_runs.batches, first)
    keep = np.zeros((2, nodes.n_nodes), dtype=bool)
    keep[0] = ~np.isin(np.arange(nodes.n_nodes), members)
    with_circuit, with_all = ablated_scores(base, problem.score, swapped.ablation, in_base, keep).mean(1)
    figures = {
        "f_base": float(full_scores(base, problem.score, in_base).mean()),
        "f_base_with_circuit": float(with_circuit),
        "f_base_with_all": float(with_all),
        "changes": table["change"].value_counts().to_dict(),
    }
    return table, figures


def _shares(problem: Problem, baseline: BaselineTables, tables: torch.Tensor) -> Float[np.ndarray, " nodes"]:
    """For each feature, the share of the prompts with these tables on which it fires; NaN for other nodes."""
    layout, parts, shares = baseline.layout, problem.ablation.nodes.parts, []
    # The attention sink, which is never ablated: the first token, where the template has a prefix.
    first = 1 if layout.n_prefix else 0
    for values, of_site in zip(baseline.features.values(), parts, strict=True):
        pattern = "(table position) d_sae -> table position d_sae"
        by_table = rearrange(values, pattern, position=layout.n_template_positions)
        fires = by_table[tables, first:] > 0
        shares += [fires.any(1).double().mean(0).cpu().numpy(), np.full(len(of_site), np.nan)]
    return np.concatenate(shares)


def _change(fires: float, fired: float) -> str:
    if np.isnan(fires):
        return "not a feature"
    if fires > TIMES * fired:
        return "appears"
    return "vanishes" if fired > TIMES * fires else "stays"
