"""Stage: the refusal direction and a linear probe at every layer, on one category's prompts or on all."""

import time
from typing import Any

import numpy as np
import pandas as pd

from sfc.core.artifacts import Artifact, write_csv
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar
from sfc.data.balance import balance
from sfc.data.schema import ALL
from sfc.models.batches import SlotLayout, make_batches
from sfc.models.loading import choose_device, load_model
from sfc.run import Run
from sfc.studies.collect import short_enough
from sfc.studies.probe.measure import SHUFFLES, last_residuals, n_folds, probe_table
from sfc.studies.probe.page import write_probe_page

FILES = {"page": "probe.html", "layers": "layers.csv"}


def make_probe(run: Run, artifact: Artifact, category: str, rebuild: bool = False) -> None:
    """Run the prompts once, measure every layer, and write table and page.

    Raises:
        UserError: the category lacks prompts.
    """
    began = time.perf_counter()
    experiment = run.experiment
    wanted = None if category == ALL else category
    balanced, _ = balance(run.prompts.frame, wanted, experiment.prompts.hard_share, experiment.seed)
    with artifact.being_made(rebuild) as folder:
        model = load_model(experiment.model, choose_device(run.device))
        prompts, tokenized = short_enough(model.tokenize, balanced, experiment.prompts.max_tokens)
        _check_sides(prompts)
        layout, budget = SlotLayout.of(tokenized), experiment.activations.batch_tokens
        with progress_bar("running", len(prompts), "prompts") as progress:
            residuals = last_residuals(model, make_batches(tokenized, layout, budget, model.device), progress)
        toxic = prompts["refusal_label"].to_numpy(dtype=bool)
        layers = probe_table(residuals, toxic, prompts["split"].tolist(), experiment.seed)
        write_csv(folder / FILES["layers"], layers, digits=6)
        counts = prompts["split"].value_counts()
        result = {
            "preset": experiment.name,
            "category": category,
            "n_prompts": len(prompts),
            "n_discovery": int(counts["discovery"]),
            "n_test": int(counts["test"]),
            "n_folds": n_folds(toxic),
            "n_shuffles": SHUFFLES,
            "layers": _records(layers),
        }
        write_probe_page(folder / FILES["page"], layers, result)
        artifact.finish(result=result, files=FILES, seconds=round(time.perf_counter() - began, 2))


def _check_sides(prompts: pd.DataFrame) -> None:
    for split in ("discovery", "test"):
        toxic = prompts.loc[prompts["split"] == split, "refusal_label"]
        for side, count in (("toxic", toxic.sum()), ("safe", (~toxic.astype(bool)).sum())):
            if count < 2:
                raise UserError(f"a direction needs two {side} {split} prompts that are short enough, not {count}")


def _records(layers: pd.DataFrame) -> list[dict[Any, Any]]:
    """The rows for JSON, to four decimals; what is missing is None."""
    return layers.round(4).astype(object).where(layers.notna(), None).replace({np.nan: None}).to_dict("records")
