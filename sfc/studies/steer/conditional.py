"""Conditional steering: the dial is turned only for prompts in whose text an SAE feature fires.

The condition is one of prompts, not of tokens: what is steered is mostly the template after the prompt, and what
decides is the user's text. It holds where the feature exceeds a threshold at any content token (0: where it is active).
It is read at or before the steered site, so that steering cannot change it. A prompt is then answered either as the
unconditional dial has it or as the model is, and the rows of a sweep hold both.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.core.errors import UserError
from sfc.core.sites import short_site
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import PACKED_TOKENS, SlotLayout, make_batches
from sfc.models.interventions import recorder
from sfc.models.loading import Model
from sfc.models.running import run_to
from sfc.saes.dictionary import Dictionary
from sfc.stats import wilson

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
    layout = SlotLayout.of(prompts)
    largest = {site: np.zeros((len(prompts), each.d_sae), dtype=np.float32) for site, each in dictionaries.items()}
    for batch in make_batches(prompts, layout, PACKED_TOKENS, model.device):
        seen: dict[str, Tensor] = {}
        run_to(model, batch, {site: recorder(seen, site) for site in dictionaries}, list(dictionaries)[-1])
        content = (batch.slots == layout.n_prefix) & batch.touchable
        row = torch.arange(len(content), device=content.device)[:, None].expand_as(content)[content]
        for site, dictionary in dictionaries.items():
            values = dictionary.encode(seen[site][content].float())
            of_batch = values.new_zeros(len(content), dictionary.d_sae)
            of_batch.scatter_reduce_(0, row[:, None].expand_as(values), values, "amax")
            largest[site][batch.prompts.cpu().numpy()] = of_batch.cpu().numpy()
    return largest


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
    """Refusals by both dials per alpha and group of prompts, with Wilson intervals of 95 %.

    Columns: `dial`, `alpha`, `group`, `n`, `steered` (prompts), `refusals`, `rate`, `low`, `high`.

    Args:
        rows: of a sweep along one direction at one site, with a column `group`.
        holds: whether the condition holds for a row's prompt.
    """
    lines = []
    for dial, steered in ((UNCONDITIONAL, np.ones_like(holds)), (CONDITIONAL, holds)):
        refused = np.where(steered, rows["refused"], rows["unsteered_refused"])
        of_dial = rows.assign(refused=refused, steered=steered)
        for (alpha, group), part in of_dial.groupby(["alpha", "group"], sort=False):  # pyright: ignore
            n, refusals = len(part), int(part["refused"].sum())
            line = {"dial": dial, "alpha": alpha, "group": group, "n": n, "steered": int(part["steered"].sum())}
            lines.append(line | {"refusals": refusals, "rate": refusals / n} | wilson(refusals, n)._asdict())
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
