"""Direct logit attribution of the test prompts of one category, or of all."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from sfc.core.artifacts import write_csv
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.data.prepare import balance
from sfc.data.schema import ALL
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.score import LogOdds, auroc
from sfc.session import Session
from sfc.stats import bootstrap_means
from sfc.studies.collect.fill import short_enough
from sfc.studies.logits.attribution import LogitAttribution, attribute_logits, by_layer, logit_difference_of
from sfc.studies.logits.roles import COMPLIANCE, GUARDRAIL, component_table, group_table, strongest
from sfc.studies.study import Made

_LISTED_HEADS = 10


def measure(session: Session, category: str, folder: Path) -> Made:
    """Attribute, classify the heads, and write the tables.

    Raises:
        UserError: the category lacks prompts, the score does not compare tokens, or the model is not the sum of its
            parts' outputs.
    """
    experiment, model, seed = session.run.experiment, session.model, session.run.experiment.seed
    score, words = session.metric, session.run.behavior.words
    if not isinstance(score, LogOdds):
        raise UserError(
            f"attribute-logits splits a difference of logits, and the score of behavior {experiment.behavior!r} does"
            " not compare tokens"
        )
    difference = logit_difference_of(model, score, [] if len(score.against) else _harmless(session))
    balanced, _ = balance(
        session.run.prompts.frame, None if category == ALL else category, experiment.prompts.hard_share, seed
    )
    prompts, batches = _batches(session, balanced[balanced["split"] == "test"])
    toxic = prompts["refusal_label"].to_numpy(dtype=bool)
    if toxic.all() or not toxic.any():
        side = words.negative if toxic.all() else words.positive
        raise UserError(f"all {side} test prompts are longer than prompts.max_tokens")
    with progress_bar("attributing", len(prompts), "prompts") as progress:
        attribution = attribute_logits(model, score, difference, batches, progress)
    say(f"the contributions sum to the logit difference but for {attribution.error:.1e} of their absolute values")
    prompts = prompts.assign(
        label=np.where(toxic, "toxic", "safe"),
        logit_difference=attribution.logit_difference,
        score=attribution.score,
    )
    components = component_table(attribution, toxic, seed)
    tables = {
        "components": components,
        "layers": component_table(by_layer(attribution), toxic, seed),
        "groups": group_table(attribution, prompts, seed),
        "prompts": prompts[["id", "prompt", "category", "label", "logit_difference", "score"]],
    }
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table, digits=6)
    return Made(
        {
            "preset": experiment.name,
            "category": category,
            "tokens": difference.tokens(model),
            **_figures(attribution, toxic, seed),
            **_heads(components),
        }
    )


def _harmless(session: Session) -> list[Batch]:
    """The harmless prompts of the reference split, of all categories."""
    experiment = session.run.experiment
    everyone, _ = balance(session.run.prompts.frame, None, experiment.prompts.hard_share, experiment.seed)
    frame = everyone[(everyone["split"] == "reference") & ~everyone["refusal_label"]]
    if frame.empty:
        raise UserError("the reference split is empty: raise prompts.reference, or name model.against_tokens")
    return _batches(session, frame)[1]


def _batches(session: Session, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[Batch]]:
    experiment, model = session.run.experiment, session.model
    corpus = short_enough(model.tokenize, frame, experiment.prompts.max_tokens)
    layout, budget = TemplateLayout.of(corpus.sequences), experiment.activations.batch_tokens
    return corpus.table, make_batches(corpus.sequences, layout, budget, model.device)


def _figures(attribution: LogitAttribution, toxic: Bool[np.ndarray, " prompts"], seed: int) -> dict[str, Any]:
    """The logit difference itself: its means, whether it tells toxic from safe, whether it follows the score."""
    sides = {"toxic": attribution.logit_difference[toxic], "safe": attribution.logit_difference[~toxic]}
    means = {side: bootstrap_means(values[:, None], seed) for side, values in sides.items()}
    correlation = np.corrcoef(attribution.logit_difference, attribution.score)[0, 1]
    return {
        "n_toxic": int(toxic.sum()),
        "n_safe": int((~toxic).sum()),
        "logit_difference": {
            side: {name: round(float(end[0]), 4) for name, end in interval._asdict().items()}
            for side, interval in means.items()
        },
        "reconstruction_error": attribution.error,
        "auroc": _rounded(auroc(attribution.logit_difference, toxic)),
        "score_correlation": _rounded(correlation),
    }


def _heads(components: pd.DataFrame) -> dict[str, Any]:
    """The heads that tell toxic from safe prompts best, and the names of all guardrail and compliance heads."""
    heads = strongest(components[components["kind"] == "head"])
    columns = ["component", "role", "toxic_mean", "toxic_low", "toxic_high", "safe_mean", "difference", "q_value"]
    names = {role: heads.loc[heads["role"] == role, "component"].tolist() for role in (GUARDRAIL, COMPLIANCE)}
    return {"n_heads": len(heads), **names, "heads": heads[columns].head(_LISTED_HEADS).to_dict("records")}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)
