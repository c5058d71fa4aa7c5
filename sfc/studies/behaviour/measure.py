"""What a model does with prompts: scores, greedy replies, verdicts on them, and their rates per group.

Each batch is written when it is answered, so that several processes can share them and none is answered twice.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sfc.core.artifacts import write_csv
from sfc.core.progress import progress_bar
from sfc.core.ranks import is_leader
from sfc.core.work import Work
from sfc.data.read import LABELS, UNLABELLED
from sfc.models.batches import TemplateLayout, make_batches, similar_lengths
from sfc.models.generation import generate_replies
from sfc.models.loading import Model
from sfc.models.score import Score, auroc, score_prompts
from sfc.models.work import cache_bytes, replied, scored, shapes_of
from sfc.session import Session
from sfc.stats import judged_rates
from sfc.studies.behaviour import Behaviour, asked
from sfc.studies.collect.fill import short_enough
from sfc.studies.sketch import Sketch
from sfc.studies.study import PARTS, Made, made_in_parts

REPLY_TOKENS, BATCH_TOKENS = 24, 2048


class JudgedReplies(NamedTuple):
    """What a model did with a set of prompts."""

    replies: pd.DataFrame
    """one row per prompt: `id`, `prompt`, `category`, `label`, `score` (nats), `refused`, `reply`"""
    groups: pd.DataFrame
    """one row per category and label: `category`, `label`, `n`, `refusals`, `rate`, `low`, `high` (Wilson, 95 %)"""
    auroc: float | None
    """of the score against the judged replies; None where all or none show the behavior"""


def measure(study: Behaviour, session: Session, folder: Path) -> Made:
    """Answer and judge the prompts that the options choose (see `measure_behaviour`), and write both tables."""
    measured = measure_behaviour(session.model, asked(session.run), session.metric, session.run.judge, folder / PARTS)
    if not is_leader():
        return Made({})
    write_csv(folder / study.files["replies"], measured.replies, digits=5)
    write_csv(folder / study.files["groups"], measured.groups, digits=5)
    groups = measured.groups.to_dict("records")
    return Made({"preset": session.run.experiment.name, "auroc": measured.auroc, "groups": groups})


def measure_behaviour(
    model: Model,
    prompts: pd.DataFrame,
    score: Score,
    judge: Callable[[str], bool],
    folder: Path,
    reply_tokens: int = REPLY_TOKENS,
) -> JudgedReplies:
    """Score, answer and judge each prompt of a frame with columns `id`, `prompt`, `category` and `label`.

    A refusal shows in its first words: `reply_tokens` need not let the reply end. Prompts for which the model has no
    positions are left out, which is said. What is in the folder already is not answered again.

    Raises:
        UserError: that is all of them.
    """
    longest = None if model.n_positions is None else model.n_positions - reply_tokens
    prompts, tokenized = short_enough(model.tokenize, prompts, longest)
    layout = TemplateLayout.of(tokenized)
    groups = {f"{i:06d}": group for i, group in enumerate(similar_lengths(tokenized, BATCH_TOKENS, reply_tokens))}

    def answered(part: str) -> dict[str, Any]:
        some = [tokenized[row] for row in groups[part]]
        scores = score_prompts(model, score, make_batches(some, layout, BATCH_TOKENS, model.device))
        return {"scores": scores.tolist(), "replies": generate_replies(model, some, reply_tokens, BATCH_TOKENS)}

    with progress_bar("replies", len(groups), "batches") as progress:
        parts = made_in_parts(folder, list(groups), answered, progress)
    scores, texts = np.empty(len(tokenized)), [""] * len(tokenized)
    for part, group in groups.items():
        scores[group] = parts[part]["scores"]
        for row, reply in zip(group, parts[part]["replies"], strict=True):
            texts[row] = reply
    refused = [judge(text) for text in texts]
    replies = prompts[["id", "prompt", "category", "label"]].assign(score=scores, refused=refused, reply=texts)
    return JudgedReplies(replies, refusal_rates(replies), auroc(scores, replies["refused"].to_numpy(dtype=bool)))


def refusal_rates(replies: pd.DataFrame) -> pd.DataFrame:
    """Judged replies per category and label, sorted by category and then from toxic to safe, with Wilson intervals."""
    order = [*LABELS, UNLABELLED]
    return (
        judged_rates(replies, ["category", "label"])
        .sort_values(
            ["category", "label"], key=lambda column: column.map(order.index) if column.name == "label" else column
        )
        .reset_index(drop=True)
    )


def work(study: Behaviour, sketch: Sketch) -> list[Work]:
    """The steps of `sfc behaviour`: a score and a short reply for every prompt.

    Raises:
        UserError: there are no such prompts.
    """
    sizes, prompts = sketch.sizes, sketch.short_enough(asked(sketch.run)).sequences
    groups = shapes_of(prompts, BATCH_TOKENS, REPLY_TOKENS)
    amounts = scored(groups, sizes.n_layers) + replied(groups, 1, REPLY_TOKENS, sizes.n_layers, BATCH_TOKENS)
    rows = max((shape.rows for shape in groups), default=0)
    in_use = cache_bytes(sizes, BATCH_TOKENS) + sketch.in_use(BATCH_TOKENS) + sizes.logits(rows)
    return [sketch.loading(), Work(f"answer {len(prompts):,} prompts", amounts, sizes.weights + in_use)]
