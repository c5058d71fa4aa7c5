"""Stage: direct logit attribution of one category's test prompts, or of all."""

import time
from typing import Any

import numpy as np
import pandas as pd

from sfc.core.artifacts import Artifact, write_csv
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.data.balance import balance
from sfc.data.schema import ALL
from sfc.models.batches import Batch, SlotLayout, make_batches
from sfc.models.loading import Model, choose_device, load_model
from sfc.models.score import auroc
from sfc.run import Run
from sfc.stats import bootstrap_means
from sfc.studies.collect.fill import short_enough
from sfc.studies.logits.attribution import LogitAttribution, attribute_logits, by_layer, refusal_logit_difference
from sfc.studies.logits.page import write_logits_page
from sfc.studies.logits.roles import COMPLIANCE, GUARDRAIL, component_table, group_table, strongest_heads

FILES = {"page": "logits.html", "components": "components.csv", "groups": "groups.csv", "prompts": "prompts.csv"}
_LISTED_HEADS = 10


def make_logit_attribution(run: Run, artifact: Artifact, category: str, rebuild: bool = False) -> None:
    """Attribute, classify the heads, and write tables, page and figures.

    Raises:
        UserError: the category lacks prompts, or the model is not the sum of its parts' outputs.
    """
    began = time.perf_counter()
    experiment = run.experiment
    wanted = None if category == ALL else category
    balanced, _ = balance(run.prompts.frame, wanted, experiment.prompts.hard_share, experiment.seed)
    with artifact.being_made(rebuild) as folder:
        model = load_model(experiment.model, choose_device(run.device))
        difference = refusal_logit_difference(model, _harmless(run, model))
        prompts, batches = _batches(run, model, balanced[balanced["split"] == "test"])
        toxic = prompts["refusal_label"].to_numpy(dtype=bool)
        if toxic.all() or not toxic.any():
            raise UserError(f"all {'safe' if toxic.all() else 'toxic'} test prompts are longer than prompts.max_tokens")
        with progress_bar("attributing", len(prompts), "prompts") as progress:
            attribution = attribute_logits(model, difference, batches, progress)
        prompts = prompts.assign(
            label=np.where(toxic, "toxic", "safe"),
            logit_difference=attribution.logit_difference,
            score=attribution.score,
        )
        components = component_table(attribution, toxic, experiment.seed)
        tables = {
            "components": components,
            "groups": group_table(attribution, prompts, experiment.seed),
            "prompts": prompts[["id", "prompt", "category", "label", "logit_difference", "score"]],
        }
        for name, table in tables.items():
            write_csv(folder / FILES[name], table, digits=6)
        result = {
            "preset": experiment.name,
            "category": category,
            "tokens": difference.tokens(model),
            **_figures(attribution, toxic, experiment.seed),
            **_heads(components),
        }
        layers = component_table(by_layer(attribution), toxic, experiment.seed)
        write_logits_page(folder / FILES["page"], components, layers, result)
        artifact.finish(result=result, files=FILES, seconds=round(time.perf_counter() - began, 2))


def _harmless(run: Run, model: Model) -> list[Batch]:
    """Safe prompts of the reference split, of all categories; none where the configuration names what it needs."""
    if model.config.against_tokens:
        return []
    everyone, _ = balance(run.prompts.frame, None, run.experiment.prompts.hard_share, run.experiment.seed)
    frame = everyone[(everyone["split"] == "reference") & ~everyone["refusal_label"]]
    if frame.empty:
        raise UserError("the reference split is empty: raise prompts.reference, or name model.against_tokens")
    return _batches(run, model, frame)[1]


def _batches(run: Run, model: Model, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[Batch]]:
    corpus = short_enough(model.tokenize, frame, run.experiment.prompts.max_tokens)
    layout, budget = SlotLayout.of(corpus.sequences), run.experiment.activations.batch_tokens
    return corpus.table, make_batches(corpus.sequences, layout, budget, model.device)


def _figures(attribution: LogitAttribution, toxic: np.ndarray, seed: int) -> dict[str, Any]:
    """The logit difference itself: its means, whether it tells toxic from safe, whether it follows the score."""
    sides = {"toxic": attribution.logit_difference[toxic], "safe": attribution.logit_difference[~toxic]}
    means = {side: bootstrap_means(values[:, None], seed) for side, values in sides.items()}
    correlation = np.corrcoef(attribution.logit_difference, attribution.score)[0, 1]
    say(f"the contributions sum to the logit difference but for {attribution.error:.1e} of their absolute values")
    return {
        "n_toxic": int(toxic.sum()),
        "n_safe": int((~toxic).sum()),
        "logit_difference": {
            side: dict(zip(("mean", "low", "high"), (round(float(end[0]), 4) for end in interval), strict=True))
            for side, interval in means.items()
        },
        "reconstruction_error": attribution.error,
        "auroc": _rounded(auroc(attribution.logit_difference, toxic)),
        "score_correlation": _rounded(correlation),
    }


def _heads(components: pd.DataFrame) -> dict[str, Any]:
    """The heads that tell toxic from safe prompts best, and the names of all guardrail and compliance heads."""
    heads = strongest_heads(components)
    columns = ["component", "role", "toxic_mean", "toxic_low", "toxic_high", "safe_mean", "difference", "q_value"]
    names = {role: heads.loc[heads["role"] == role, "component"].tolist() for role in (GUARDRAIL, COMPLIANCE)}
    return {"n_heads": len(heads), **names, "heads": heads[columns].head(_LISTED_HEADS).to_dict("records")}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)
