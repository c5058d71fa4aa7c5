"""Measure the dictionaries of a run on rows that were kept from their training, and on what they are for: circuits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sfc.circuits.ablation import Ablation
from sfc.circuits.nodes import Nodes
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.circuits.problem import PromptRuns
from sfc.circuits.proof import pair_figures, pair_scores
from sfc.core.artifacts import json_records, write_csv
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.data.schema import keyed_numbers, keyed_ranks
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.score import Score
from sfc.run import Run
from sfc.saes.dictionary import Dictionary
from sfc.saes.quality import ALL, quality_by_role
from sfc.saes.splice import CleanRuns, run_clean, splicing_quality
from sfc.session import Session
from sfc.studies.discover.problem import against_counterfactuals
from sfc.studies.train.rows import TrainingRows

QUALITY_FILE, DENSITY_FILE = "quality.csv", "density.csv"
IN_SERIES = "in series"
"""the role in the row of `quality.csv` that is of all sites at once"""
_SPLICED_PROMPTS = 32
_RESTORED_PROMPTS = 64
_RESTORED = {
    f"{ours}{end}": f"{name}{end}"
    for ours, name in (("restored_toxic", "recovered_toxic"), ("restored_safe", "recovered_safe"), ("agreement",) * 2)
    for end in ("", "_low", "_high")
}
"""the columns of `quality.csv`, and what `pair_figures` calls them"""


def write_quality(session: Session, rows: TrainingRows, folder: Path) -> list[dict[str, Any]]:
    """Measure the run's dictionaries; write `quality.csv` and `density.csv`.

    `quality.csv` has a row for all held-out rows of each site and one for each role among them; what splicing the
    dictionary in costs the model, and what its features restore (see `restored`), are in the row of all. The last row,
    of role `IN_SERIES`, has what the features of all sites together restore. `density.csv` has a row for each feature
    of each site, with the share of rows in which it is active, a column each for all rows and each role.

    Returns:
        The rows of `quality.csv`; what is not measurable is None.
    """
    run, model, score, dictionaries = session.run, session.model, session.metric, session.dictionaries
    unseen = prompts_not_trained_on(run, rows)
    clean = _run_some(run, model, score, unseen["prompt"], list(dictionaries))
    figures, rates, of_features = [], {}, restored(session, dictionaries, unseen)
    with progress_bar("measuring", len(dictionaries), "SAEs") as progress:
        for site, dictionary in dictionaries.items():
            by_role = quality_by_role(dictionary, rows.held_out(site))
            of_all = splicing_quality(model, score, dictionary, clean)._asdict() | of_features[site]
            figures += [
                {"site": site, "role": role, **measured.quality._asdict(), **(of_all if role == ALL else {})}
                for role, measured in by_role.items()
            ]
            rates[site] = pd.DataFrame({role: m.firing_rate.cpu().numpy() for role, m in by_role.items()})
            progress(1)
    figures.append({"site": ALL, "role": IN_SERIES, **of_features[IN_SERIES]})
    quality, density = (
        pd.DataFrame(figures).astype({"rows": "Int64"}),
        pd.concat(rates, names=["site", "feature"]).reset_index(),
    )
    for file, frame in ((QUALITY_FILE, quality), (DENSITY_FILE, density)):
        write_csv(folder / file, frame, digits=6)
    return json_records(quality, digits=6)


def restored(
    session: Session, dictionaries: Mapping[str, Dictionary], prompts: pd.DataFrame
) -> dict[str, dict[str, float | None]]:
    """What all features together restore under counterfactual ablation, with the errors ablated.

    Measured once with the dictionary of one site alone, site by site, and under `IN_SERIES` with those of all sites.

    Args:
        prompts: some discovery prompts among these, of either side, are paired with an equally long one each.

    Returns:
        For each `restored_toxic`, `restored_safe` and `agreement` (see `sfc.circuits.proof`), with the ends of their
        95 % intervals as `…_low` and `…_high`; None where there is nothing to be measured.
    """
    run, model = session.run.having(DiscoveryOptions, pairs_per_prompt=1), session.model
    groups = {site: {site: dictionary} for site, dictionary in dictionaries.items()} | {IN_SERIES: dictionaries}
    explained = prompts[prompts["split"] == "discovery"]
    few = keyed_ranks(explained, ["refusal_label"], f"restored {run.experiment.seed}") < _RESTORED_PROMPTS
    others = run.prompts.frame[run.prompts.frame["split"] == "discovery"]
    try:
        pairs = against_counterfactuals(session.for_run(run), explained[few], others, dictionaries)
    except UserError as error:
        say(f"what features restore is not measured: {error}")
        return {group: dict.fromkeys(_RESTORED) for group in groups}
    runs = PromptRuns.of(model, pairs.discovery, next(iter(dictionaries)))
    figures, smallest = {}, EvaluationOptions.of(run.experiment).min_denominator
    with progress_bar("what features restore", 2 * len(groups) * runs.n_prompts, "runs") as progress:
        for group, spaces in groups.items():
            nodes = Nodes.of_spaces(spaces)
            ablation = Ablation(nodes, spaces, pairs.baseline.with_spaces(spaces), "ablate")
            everything = np.ones((1, nodes.n_nodes), dtype=bool)
            [scores] = pair_scores(model, pairs.score, ablation, runs, everything, progress)
            measured = pair_figures(scores, smallest, run.experiment.seed)
            figures[group] = {column: measured[name] for column, name in _RESTORED.items()}
    return figures


def _run_some(run: Run, model: Model, score: Score, prompts: pd.Series, sites: list[str]) -> CleanRuns:
    """Run some of the prompts, chosen by hash and so from all categories, as they are."""
    order = np.argsort(keyed_numbers(prompts, f"spliced {run.experiment.seed}"), kind="stable")
    tokenized = model.tokenize(prompts.iloc[order[:_SPLICED_PROMPTS]].tolist())
    batches = make_batches(
        tokenized, TemplateLayout.of(tokenized), run.experiment.activations.batch_tokens, model.device
    )
    return run_clean(model, score, batches, sites)


def prompts_not_trained_on(run: Run, rows: TrainingRows) -> pd.DataFrame:
    """The circuits' prompts, test prompts aside, that were not among the texts trained on."""
    frame = run.prompts.frame
    trained = rows.table.loc[rows.table["trained"], "id"]
    return frame[(frame["split"] != "test") & ~frame["id"].isin(trained)]
