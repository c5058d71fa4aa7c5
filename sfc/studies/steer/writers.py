"""Which heads and MLPs write a direction, and which SAE features lie along it.

The residual stream at a site is the sum of what everything before it wrote, so its component along u is the sum of the
parts' components. Between toxic and safe prompts, constant parts (biases, and the embedding of a template's token)
cancel, and the differences of heads and MLPs sum to the difference at the site. What a part writes may be an answer to
what others wrote before it: the table therefore has for the strongest parts also what is lost when each is ablated.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control, ttest_ind
from torch import Tensor

from sfc.core.errors import UserError
from sfc.core.sites import kind_of, layer_of, short_site, site_of
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import PACKED_TOKENS
from sfc.models.interventions import Intervention, recorder
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.models.tails import Tails, make_tails
from sfc.saes.dictionary import Dictionary
from sfc.studies.logits.attribution import MOST_ERROR
from sfc.studies.steer.directions import Vector


class Part(NamedTuple):
    """A head or an MLP."""

    name: str
    kind: str
    layer: int
    head: int | None
    site: str
    """where its output passes"""


def parts_before(model: Model, site: str) -> list[Part]:
    """The heads and MLPs that write before a site of the residual stream, in their order."""
    last, kind, n_heads = layer_of(site), kind_of(site), model.bridge.cfg.n_heads
    parts: list[Part] = []
    for layer in range(last + 1):
        if layer < last or kind != "resid_pre":
            z = site_of("hook_z", layer)
            parts += [Part(f"head.{layer}.{head}", "head", layer, head, z) for head in range(n_heads)]
        if layer < last or kind == "resid_post":
            parts.append(Part(f"mlp.{layer}", "mlp", layer, None, site_of("mlp_out", layer)))
    return parts


@torch.no_grad()
def writers_table(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    toxic: Bool[np.ndarray, " prompts"],
    site: str,
    token: int,
    direction: Vector,
    n_ablated: int,
) -> pd.DataFrame:
    """One row per head and MLP before the site, the strongest writers first; components in units of activation.

    Columns: `component`, `kind`, `layer`, `head`; `toxic` and `safe`, the mean component along the direction of what it
    writes at the token; `difference`; `share` of the difference at the site, so that all shares sum to 1; `q_value` of
    a difference (Welch's t-test, Benjamini and Hochberg); and for the `n_ablated` strongest, with its output on toxic
    prompts at this token set to its mean on safe ones, `lost_share`, the share of the difference at the site that is
    gone, and `score_change` in nats.

    Args:
        token: counted from the end of the prompts.

    Raises:
        UserError: the blocks of this model do not simply add what they write.
    """
    parts, u = parts_before(model, site), direction / direction.norm()
    batches = list(_tails(model, prompts, token))
    seen = [_record(model, tails, [*dict.fromkeys(part.site for part in parts), site]) for _, tails in batches]
    order = np.concatenate([rows for rows, _ in batches])
    outputs = {name: torch.cat([run[name][:, token] for run in seen]) for name in seen[0]}
    written = _written(model, parts, outputs, u)
    at_site, is_toxic = (outputs[site].double() @ u.to(model.device)).cpu().numpy(), toxic[order]
    difference = at_site[is_toxic].mean() - at_site[~is_toxic].mean()
    differences = written[is_toxic].mean(0) - written[~is_toxic].mean(0)
    if not abs(differences.sum() - difference) <= MOST_ERROR[model.dtype] * np.abs(differences).sum():
        raise UserError(
            f"what writes the direction cannot be said for {model.config.source!r}: the parts' outputs do not sum to"
            " the residual stream; perhaps its blocks norm or scale what they write"
        )
    p_values = np.nan_to_num(np.asarray(ttest_ind(written[is_toxic], written[~is_toxic], equal_var=False)[1]), nan=1.0)
    table = pd.DataFrame(parts).rename(columns={"name": "component"}).astype({"head": "Int64"})
    table = table.assign(
        toxic=written[is_toxic].mean(0),
        safe=written[~is_toxic].mean(0),
        difference=differences,
        share=differences / difference,
        q_value=false_discovery_control(p_values),
    )
    table = table.sort_values("share", key=lambda values: -values.abs(), kind="stable")
    safe_means = {name: values[torch.from_numpy(~is_toxic)].float().mean(0) for name, values in outputs.items()}
    strongest = [parts[i] for i in table.index[:n_ablated]]
    ablated = [_ablated(model, batches, toxic, part, safe_means[part.site], site, token, u) for part in strongest]
    table.loc[table.index[:n_ablated], "lost_share"] = [lost / difference for lost, _ in ablated]
    table.loc[table.index[:n_ablated], "score_change"] = [change for _, change in ablated]
    return table.drop(columns="site").reset_index(drop=True)


def _tails(model: Model, prompts: Sequence[TokenizedPrompt], token: int) -> Iterator[tuple[np.ndarray, Tails]]:
    """The last tokens of the prompts, from `token` on, a batch at a time, and which prompts are in it."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    rows = max(1, PACKED_TOKENS // len(prompts[order[-1]].ids))
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        yield np.array(batch), make_tails(model, [prompts[i] for i in batch], -token)


def _record(model: Model, tails: Tails, sites: Sequence[str]) -> dict[str, Float[Tensor, "batch pos width"]]:
    seen: dict[str, Tensor] = {}
    last_logits(model, tails, {name: recorder(seen, name) for name in sites})
    return {name: activation.flatten(2) for name, activation in seen.items()}


def _written(model: Model, parts: Sequence[Part], outputs: Mapping[str, Tensor], u: Vector) -> np.ndarray:
    """What each part writes along u [prompts, parts], in float64."""
    columns: list[Tensor] = []
    u = u.to(model.device)
    for part in parts:
        output = outputs[part.site].double()
        if part.head is not None:
            w_o = model.bridge.blocks[part.layer].attn.W_O[part.head].double()
            columns.append(output[:, _of_head(part.head, len(w_o))] @ (w_o @ u))
        else:
            columns.append(output @ u)
    return torch.stack(columns, dim=1).cpu().numpy()


def _of_head(head: int, d_head: int) -> slice:
    return slice(head * d_head, (head + 1) * d_head)


def _ablated(
    model: Model,
    batches: Sequence[tuple[np.ndarray, Tails]],
    toxic: Bool[np.ndarray, " prompts"],
    part: Part,
    mean: Float[Tensor, " width"],
    site: str,
    token: int,
    u: Vector,
) -> tuple[float, float]:
    """On toxic prompts, how much of the component at the site is lost without a part, and the change of the score."""
    score, lost, changes = RefusalScore.of(model), [], []
    width = len(mean) // model.bridge.cfg.n_heads
    wanted = slice(None) if part.head is None else _of_head(part.head, width)

    def ablate(activation: Tensor) -> Tensor:
        flat = activation.flatten(2).clone()
        flat[:, token, wanted] = mean[wanted].to(flat.dtype)
        return flat.view_as(activation)

    for rows, tails in batches:
        of_toxic = tails.select(torch.from_numpy(np.flatnonzero(toxic[rows])).to(model.device))
        if len(of_toxic.lengths) == 0:
            continue
        figures = []
        for interventions in ({}, {part.site: ablate}):
            seen: dict[str, Tensor] = {}
            both: dict[str, Intervention] = {**interventions, site: recorder(seen, site)}
            of_run = score(last_logits(model, of_toxic, both))
            figures.append((seen[site][:, token].double() @ u.to(model.device), of_run))
        (before, score_before), (after, score_after) = figures
        lost += (before - after).tolist()
        changes += (score_after - score_before).tolist()
    return float(np.mean(lost)), float(np.mean(changes))


def feature_cosines(direction: Vector, dictionaries: Mapping[str, Dictionary]) -> pd.DataFrame:
    """The cosine of a direction with what every feature writes, the largest |cosine| first.

    Columns: `feature` (`resid_post.21/F12`), `site`, `layer`, `cosine`.
    """
    tables = []
    for site, dictionary in dictionaries.items():
        rows = dictionary.W_dec.detach().double().cpu()
        cosines = (rows @ direction) / (rows.norm(dim=1) * direction.norm()).clamp_min(1e-12)
        names = [f"{short_site(site)}/F{i}" for i in range(len(rows))]
        tables.append(
            pd.DataFrame({"feature": names, "site": site, "layer": layer_of(site), "cosine": cosines.numpy()})
        )
    table = pd.concat(tables, ignore_index=True)
    return table.sort_values("cosine", key=lambda values: -values.abs(), kind="stable", ignore_index=True)
