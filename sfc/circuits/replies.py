"""Behaviour beside scores: do replies still show it under the ablation?"""

import numpy as np
import pandas as pd
from jaxtyping import Bool
from torch import Tensor

from sfc.circuits.faithfulness import Ablations, prepared
from sfc.circuits.problem import Problem, PromptRuns
from sfc.models import engine
from sfc.models.batches import PACKED_TOKENS
from sfc.models.engine import NO_EDIT, Edits
from sfc.stats import wilson

_PACKED_TOKENS = 2 * PACKED_TOKENS  # those of the replies count too
COLUMNS = ("kind", "under", "n", "refused", "rate", "low", "high")
EMPTY, CIRCUIT, WITHOUT = "everything ablated", "circuit", "without"


def judged_replies(
    problem: Problem, runs: PromptRuns, edits: Edits, reply_tokens: int
) -> Bool[np.ndarray, "edits prompts"]:
    """Whether the greedy reply to each prompt shows the behavior, under each edit. The problem has a judge.

    Tokens of the reply are not ablated, since no prompt says what a reply's baseline would be.
    """
    assert problem.judge is not None
    found = engine.replies(
        prepared(problem.model, runs), problem.score, edits, reply_tokens, batch_tokens=_PACKED_TOKENS
    )
    return np.array([[problem.judge(text) for text in of_edit] for of_edit in found.texts])


def replies_by_kind(
    problem: Problem,
    runs: PromptRuns,
    prompts: pd.DataFrame,
    circuit: Bool[np.ndarray, " nodes"],
    most: int,
    reply_tokens: int,
    seed: int,
) -> pd.DataFrame:
    """How many replies show the behavior: in the model, with everything ablated, all but the circuit, and it alone.

    Args:
        prompts: a row per row of the runs: `id` and `kind`. A prompt that is in several pairs is answered in one.
        most: prompts of each kind that are answered, drawn at random.

    Returns:
        `COLUMNS`, a row per kind and ablation, with the 95 % interval of the rate after Wilson; no rows where replies
        are not judged or not wanted.
    """
    if most == 0 or problem.judge is None:
        return pd.DataFrame(columns=list(COLUMNS))
    drawn = prompts.sample(frac=1, random_state=seed).drop_duplicates("id").groupby("kind", sort=False).head(most)
    rows = np.sort(drawn.index.to_numpy())
    some = runs.subset(rows)
    # A subset is numbered in the order of its batches.
    kinds = prompts["kind"].to_numpy()[np.concatenate([_chosen(batch.prompts, rows) for batch in runs.batches])]
    keep = np.stack([np.zeros_like(circuit), circuit, ~circuit])
    by_edit = np.concatenate(
        [
            judged_replies(problem, some, NO_EDIT, reply_tokens),
            judged_replies(problem, some, Ablations(problem.ablation, keep), reply_tokens),
        ]
    )
    table = []
    for kind in dict.fromkeys(kinds):
        for under, refused in zip(("model", EMPTY, CIRCUIT, WITHOUT), by_edit[:, kinds == kind], strict=True):
            count, n = int(refused.sum()), len(refused)
            table.append((kind, under, n, count, count / n, *wilson(count, n)))
    return pd.DataFrame(table, columns=list(COLUMNS))


def _chosen(numbers: Tensor, rows: np.ndarray) -> np.ndarray:
    of_batch = numbers.cpu().numpy()
    return of_batch[np.isin(of_batch, rows)]


def counts_by_kind(replies: pd.DataFrame) -> dict[str, dict[str, int]]:
    """By kind: of how many prompts (`n`) the reply of the `model`, of the `circuit` alone and `without` it shows it."""
    counts: dict[str, dict[str, int]] = {}
    for row in replies.itertuples():
        if row.under != EMPTY:
            counts.setdefault(str(row.kind), {"n": int(row.n)})[str(row.under)] = int(row.refused)  # pyright: ignore
    return counts
