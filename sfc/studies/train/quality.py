"""Measure the dictionaries of a run on rows that were kept from their training, and draw what was measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sfc.core.artifacts import json_records, write_csv
from sfc.core.progress import progress_bar
from sfc.data.schema import keyed_numbers
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.score import Score
from sfc.run import Run
from sfc.saes.quality import ALL, quality_by_role
from sfc.saes.splice import CleanRuns, run_clean, splicing_quality
from sfc.session import Session
from sfc.studies.collect.fill import circuit_prompts
from sfc.studies.train.rows import TrainingRows

QUALITY_FILE, DENSITY_FILE = "quality.csv", "density.csv"
_SPLICED_PROMPTS = 32


def write_quality(session: Session, rows: TrainingRows, folder: Path) -> list[dict[str, Any]]:
    """Measure the run's dictionaries; write `quality.csv` and `density.csv`.

    `quality.csv` has a row for all held-out rows of each site and one for each role among them; what splicing the
    dictionary in costs the model is in the row of all. `density.csv` has a row for each feature of each site, with the
    share of rows in which it is active, a column each for all rows and each role.

    Returns:
        The rows of `quality.csv`; what is not measurable is None.
    """
    run, model, score, dictionaries = session.run, session.model, session.metric, session.dictionaries
    clean = _run_some(run, model, score, _prompts_not_trained_on(run, rows, model), list(dictionaries))
    figures, rates = [], {}
    with progress_bar("measuring", len(dictionaries), "SAEs") as progress:
        for site, dictionary in dictionaries.items():
            by_role = quality_by_role(dictionary, rows.held_out(site))
            spliced = splicing_quality(model, score, dictionary, clean)._asdict()
            figures += [
                {"site": site, "role": role, **measured.quality._asdict(), **(spliced if role == ALL else {})}
                for role, measured in by_role.items()
            ]
            rates[site] = pd.DataFrame({role: m.firing_rate.cpu().numpy() for role, m in by_role.items()})
            progress(1)
    quality, density = pd.DataFrame(figures), pd.concat(rates, names=["site", "feature"]).reset_index()
    for file, frame in ((QUALITY_FILE, quality), (DENSITY_FILE, density)):
        write_csv(folder / file, frame, digits=6)
    return json_records(quality, digits=6)


def _run_some(run: Run, model: Model, score: Score, prompts: pd.Series, sites: list[str]) -> CleanRuns:
    """Run some of the prompts, chosen by hash and so from all categories, as they are."""
    order = np.argsort(keyed_numbers(prompts, f"spliced {run.experiment.seed}"), kind="stable")
    tokenized = model.tokenize(prompts.iloc[order[:_SPLICED_PROMPTS]].tolist())
    batches = make_batches(
        tokenized, TemplateLayout.of(tokenized), run.experiment.activations.batch_tokens, model.device
    )
    return run_clean(model, score, batches, sites)


def _prompts_not_trained_on(run: Run, rows: TrainingRows, model: Model) -> pd.Series:
    """The held-out prompts; all prompts of the store where the dictionaries are trained on ordinary texts."""
    if run.experiment.corpus.source in ("prompts", "replies"):
        return rows.table.loc[rows.table["held_out"], "prompt"]
    return circuit_prompts(run, model.tokenize).table["prompt"]
