"""The conditional dial of a steering run: which condition, and what it refuses beside the unconditional one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sfc.core.errors import UserError
from sfc.core.sites import in_order, site_from_short
from sfc.data.schema import looked_up
from sfc.models.loading import Model
from sfc.pipeline_study import BEST
from sfc.run import Run
from sfc.saes.format import load_dictionaries
from sfc.studies.steer.conditional import TOXIC, Condition, best_condition, conditional_table, largest_values, matched
from sfc.studies.steer.inputs import Learned
from sfc.studies.steer.options import SteeringOptions
from sfc.studies.steer.select import Candidate


class Conditioned(NamedTuple):
    """What both dials do."""

    table: pd.DataFrame
    """as `sfc.studies.steer.conditional.conditional_table`, with a first column `data`"""
    facts: dict[str, Any]
    """for the result"""


def named_condition(run: Run) -> Condition | None:
    """The feature that `steering.when` names; None where it names none.

    Raises:
        UserError: there is no such feature.
    """
    config, sites = SteeringOptions.of(run.experiment), run.experiment.activations.sites
    if config.when in (None, BEST):
        return None
    short, _, feature = str(config.when).partition("/F")
    site = site_from_short(short)
    if site not in sites:
        raise UserError(f"no dictionary at {short}: there are SAEs at {', '.join(sites)}")
    n_features = load_dictionaries(run.saes.folder, [site])[site].d_sae
    if int(feature) >= n_features:
        raise UserError(f"no feature F{feature} at {short}: it has F0 to F{n_features - 1}")
    return Condition(site, int(feature), config.when_above)


def found_condition(run: Run, model: Model, learned: Learned, chosen: Candidate) -> Condition:
    """The feature, at or before the chosen site, that tells the recorded discovery prompts apart best."""
    before = [site for site in run.experiment.activations.sites if in_order([site, chosen.site])[0] == site]
    dictionaries = load_dictionaries(run.saes.folder, before, model.device)
    values = largest_values(model, dictionaries, learned.recording.tokenized)
    return best_condition(values, learned.recording.prompts["refusal_label"].to_numpy(dtype=bool))


def conditioned(
    run: Run, model: Model, learned: Learned, condition: Condition, rows: Mapping[str, pd.DataFrame]
) -> Conditioned:
    """Both dials on each set of prompts.

    Args:
        rows: by the name of the set, of a sweep along the chosen direction, with a column `group`.
    """
    dictionaries = load_dictionaries(run.saes.folder, [condition.site], model.device)

    def holds(texts: list[str]) -> np.ndarray:
        values = largest_values(model, dictionaries, model.tokenize(texts))[condition.site]
        return values[:, condition.feature] > condition.threshold

    tables, at_equal = [], {}
    for data, of_data in rows.items():
        prompts = of_data.drop_duplicates("id")
        prompts = prompts.assign(holds=holds(prompts["prompt"].tolist()))
        table = conditional_table(of_data, looked_up(of_data["id"], prompts, "holds"))
        tables.append(table.assign(data=data))
        at_equal[data] = [
            {name: None if share is None else round(share, 4) for name, share in row.items()}
            for row in matched(table).to_dict("records")
        ]
    toxic = learned.recording.prompts["refusal_label"].to_numpy(dtype=bool)
    on_discovery = holds(learned.recording.prompts["prompt"].tolist())
    facts = {
        "feature": condition.name,
        "above": round(condition.threshold, 4),
        "holds_on_discovery": {"toxic": _share(on_discovery[toxic]), "safe": _share(on_discovery[~toxic])},
        "matched": at_equal,
    }
    return Conditioned(pd.concat(tables, ignore_index=True), facts)


def grouped(rows: pd.DataFrame, of_hard: pd.DataFrame) -> pd.DataFrame:
    """Rows of the test prompts by group: toxic, safe without the hard ones, and hard ones from a sweep of their own."""
    easy = rows[rows["dataset_type"] != "hard"]
    by_label = easy.assign(group=np.where(easy["label"] == TOXIC, TOXIC, "safe"))
    return pd.concat([by_label, of_hard.assign(group="hard")], ignore_index=True)


def _share(holds: np.ndarray) -> float:
    return round(float(holds.mean()), 4)
