"""Conditional steering: the dial is turned only for prompts in whose text an SAE feature fires.

The condition is one of prompts, not of tokens: what is steered is mostly the template after the prompt, and what
decides is the user's text. It holds where the feature exceeds a threshold at any content token (0: where it is active).
It is read at or before the steered site, so that steering cannot change it. A prompt is then answered either as the
unconditional dial has it or as the model is, and the rows of a sweep hold both.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from sfc.behaviors.behavior import HARD
from sfc.circuits.spaces import sites_of
from sfc.core.errors import UserError
from sfc.core.sites import in_order, short_site
from sfc.data.render import TokenizedPrompt
from sfc.data.schema import looked_up
from sfc.models.batches import PACKED_TOKENS, TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.running import activations_at
from sfc.saes.dictionary import Dictionary
from sfc.session import Session
from sfc.stats import judged_rate
from sfc.studies.steer import BEST, SteeringOptions, named_feature
from sfc.studies.steer.directions import Candidate, check_feature
from sfc.studies.steer.learning import Learned

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
TOXIC = "toxic"


class Condition(NamedTuple):
    """A feature, and the value that it must exceed at some token of a prompt's text."""

    site: str
    feature: int
    threshold: float

    @property
    def name(self) -> str:
        """The feature as it stands in node names."""
        return f"{short_site(self.site)}/F{self.feature}"


@torch.no_grad()
def largest_values(
    model: Model, dictionaries: Mapping[str, Dictionary], prompts: Sequence[TokenizedPrompt]
) -> dict[str, Float[np.ndarray, "prompts d_sae"]]:
    """By site, the largest value of each feature at the content tokens of each prompt; the first token does not count.

    Args:
        dictionaries: in the order in which the model passes their sites.
    """
    layout = TemplateLayout.of(prompts)
    largest = {site: np.zeros((len(prompts), each.d_sae), dtype=np.float32) for site, each in dictionaries.items()}
    for batch in make_batches(prompts, layout, PACKED_TOKENS, model.device):
        seen = activations_at(model, batch, sites_of(dictionaries))
        content = (batch.template_positions == layout.n_prefix) & batch.touchable
        row = torch.arange(len(content), device=content.device)[:, None].expand_as(content)[content]
        for site, dictionary in dictionaries.items():
            values = dictionary.encode(seen[dictionary.reads][content].float())
            of_batch = values.new_zeros(len(content), dictionary.d_sae)
            of_batch.scatter_reduce_(0, row[:, None].expand_as(values), values, "amax")
            largest[site][batch.prompts.cpu().numpy()] = of_batch.cpu().numpy()
    return largest


def named_condition(session: Session) -> Condition | None:
    """The feature that `steering.when` names; None where it names none.

    Raises:
        UserError: there is no such feature.
    """
    options = SteeringOptions.of(session.run.experiment)
    if options.when in (None, BEST):
        return None
    site, feature = named_feature(str(options.when), session.run.experiment.activations.sites)
    check_feature(session.dictionaries[site], feature)
    return Condition(site, feature, options.when_above)


def found_condition(session: Session, learned: Learned, chosen: Candidate) -> Condition:
    """The feature, at or before the chosen site, that tells the recorded discovery prompts apart best."""
    sites = session.run.experiment.activations.sites
    before = [site for site in sites if in_order([site, chosen.site])[0] == site]
    dictionaries = {site: session.dictionaries[site] for site in before}
    values = largest_values(session.model, dictionaries, learned.recording.tokenized)
    return best_condition(values, learned.recording.prompts["refusal_label"].to_numpy(dtype=bool))


def both_dials(
    session: Session, learned: Learned, condition: Condition, rows: Mapping[str, pd.DataFrame]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What both dials do on each set of prompts.

    Args:
        rows: by the name of the set, of a sweep along the chosen direction, with a column `group`.

    Returns:
        As `conditional_table`, with a column `data`; and figures for the result.
    """
    model, dictionary = session.model, {condition.site: session.dictionaries[condition.site]}

    def holds(texts: list[str]) -> np.ndarray:
        values = largest_values(model, dictionary, model.tokenize(texts))[condition.site]
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
        "holds_on_discovery": {
            "toxic": round(float(on_discovery[toxic].mean()), 4),
            "safe": round(float(on_discovery[~toxic].mean()), 4),
        },
        "matched": at_equal,
    }
    return pd.concat(tables, ignore_index=True), facts


def grouped(rows: pd.DataFrame, of_hard: pd.DataFrame) -> pd.DataFrame:
    """Rows of the test prompts by group: toxic, safe without the hard ones, and hard ones from a sweep of their own."""
    easy = rows[rows["dataset_type"] != HARD]
    by_label = easy.assign(group=np.where(easy["label"] == TOXIC, TOXIC, "safe"))
    return pd.concat([by_label, of_hard.assign(group="hard")], ignore_index=True)


def best_condition(
    values: Mapping[str, Float[np.ndarray, "prompts d_sae"]], toxic: Bool[np.ndarray, " prompts"]
) -> Condition:
    """The feature and threshold that tell toxic from other prompts best.

    Best is the largest share of toxic prompts on which the condition holds less that of the others (Youden's J).

    Args:
        values: by site, as `largest_values` gives them.

    Raises:
        UserError: no feature fires on any prompt.
    """
    best, condition = -np.inf, None
    for site, of_site in values.items():
        order = np.argsort(-of_site, axis=0, kind="stable")
        falling = np.take_along_axis(of_site, order, axis=0)
        # Row n: the n + 1 prompts with the largest values pass.
        passed = toxic[order].cumsum(0) / toxic.sum() - (~toxic)[order].cumsum(0) / (~toxic).sum()
        following = np.concatenate([falling[1:], np.zeros_like(falling[:1])])
        passed[falling <= following] = -np.inf  # no threshold lies between equal values
        row, feature = np.unravel_index(passed.argmax(), passed.shape)
        if passed[row, feature] > best:
            threshold = float(falling[row, feature] + following[row, feature]) / 2 if following[row, feature] else 0.0
            best, condition = passed[row, feature], Condition(site, int(feature), threshold)
    if condition is None:
        raise UserError("no feature fires on any of the prompts that a condition is chosen on; name one with --when")
    return condition


def conditional_table(rows: pd.DataFrame, holds: Bool[np.ndarray, " rows"]) -> pd.DataFrame:
    """Judged replies by both dials per alpha and group of prompts, with Wilson intervals of 95 %.

    Columns: `dial`, `alpha`, `group`, `steered` (prompts), `n`, `refusals`, `rate`, `low`, `high`.

    Args:
        rows: of a sweep along one direction at one site, with a column `group`.
        holds: whether the condition holds for a row's prompt.
    """
    lines = []
    for dial, steered in ((UNCONDITIONAL, np.ones_like(holds)), (CONDITIONAL, holds)):
        refused = np.where(steered, rows["refused"], rows["unsteered_refused"])
        of_dial = rows.assign(refused=refused, steered=steered)
        for (alpha, group), part in of_dial.groupby(["alpha", "group"], sort=False):  # pyright: ignore
            line = {"dial": dial, "alpha": alpha, "group": group, "steered": int(part["steered"].sum())}
            lines.append(line | judged_rate(part["refused"]))
    return pd.DataFrame(lines)


def matched(table: pd.DataFrame) -> pd.DataFrame:
    """What both dials refuse of other prompts where they refuse equally many toxic ones.

    A row per share of toxic prompts that either dial refuses at some alpha. Columns: `toxic`, that share, and for each
    other group `GROUP_conditional` and `GROUP_unconditional`, refused shares, interpolated between neighbouring alphas;
    None where a dial never reaches the share, and where it does so more than once the lowest.

    Args:
        table: as `conditional_table` makes it.
    """
    paths = {
        dial: part.pivot(index="alpha", columns="group", values="rate").sort_index()
        for dial, part in table.groupby("dial", sort=False)
    }
    targets = sorted({float(share) for path in paths.values() for share in path[TOXIC]})
    others = [group for group in table["group"].unique() if group != TOXIC]
    return (
        pd.DataFrame(
            [
                {"toxic": target}
                | {
                    f"{group}_{dial}": _lowest_at(path[TOXIC].to_numpy(), path[group].to_numpy(), target)
                    for group in others
                    for dial, path in paths.items()
                }
                for target in targets
            ]
        )
        .astype(object)
        .where(lambda frame: frame.notna(), None)
    )


def _lowest_at(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], target: float) -> float | None:
    """The lowest y at which the path through the points, joined in their order, has x equal to the target."""
    at_points = y[np.isclose(x, target)].tolist()
    crossings = [
        float(y[i] + (y[i + 1] - y[i]) * (target - x[i]) / (x[i + 1] - x[i]))
        for i in range(len(x) - 1)
        if (x[i] - target) * (x[i + 1] - target) < 0
    ]
    return min([*at_points, *crossings], default=None)
