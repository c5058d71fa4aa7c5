"""Which heads and MLPs write a direction, and which SAE features lie along it.

The residual stream at a site is the sum of what everything before it wrote, so its component along u is the sum of the
parts' components. Between toxic and safe prompts, constant parts (biases, and the embedding of a template's token)
cancel, and the differences of heads and MLPs sum to the difference at the site. What a part writes may be an answer to
what others wrote before it: the table therefore has for the strongest parts also what is lost when each is ablated.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import repeat
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control
from torch import Tensor

from sfc.core.errors import UserError
from sfc.core.sites import kind_of, layer_of, short_site, site_of
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch
from sfc.models.edits import Replacement, Replacements
from sfc.models.engine import packed_runs, prepare_suffixes
from sfc.models.interventions import Intervention, recorder
from sfc.models.loading import Model
from sfc.models.positions import steered_tokens
from sfc.models.running import CachedResidual, last_logits
from sfc.models.score import Score
from sfc.saes.dictionary import Dictionary
from sfc.stats import welch
from sfc.studies.logits.measure import MOST_ERROR
from sfc.studies.steer.directions import Vector
from sfc.studies.steer.learning import last_tokens


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
    score: Score,
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
    _, seen = last_tokens(model, score, prompts, [*dict.fromkeys(part.site for part in parts), site], -token)
    outputs = {name: activation[:, token] for name, activation in seen.items()}
    written = _written(model, parts, outputs, u)
    at_site = (outputs[site].double() @ u).numpy()
    difference = at_site[toxic].mean() - at_site[~toxic].mean()
    differences = written[toxic].mean(0) - written[~toxic].mean(0)
    if not abs(differences.sum() - difference) <= MOST_ERROR[model.dtype] * np.abs(differences).sum():
        raise UserError(
            f"what writes the direction cannot be said for {model.config.source!r}: the parts' outputs do not sum to"
            " the residual stream; perhaps its blocks norm or scale what they write"
        )
    table = pd.DataFrame(parts).rename(columns={"name": "component"}).astype({"head": "Int64"})
    table = table.assign(
        toxic=written[toxic].mean(0),
        safe=written[~toxic].mean(0),
        difference=differences,
        share=differences / difference,
        q_value=false_discovery_control(welch(written[toxic], written[~toxic])),
    )
    table = table.sort_values("share", key=lambda values: -values.abs(), kind="stable")
    strongest = [parts[i] for i in table.index[:n_ablated]]
    safe_means = {name: values[torch.from_numpy(~toxic)].mean(0) for name, values in outputs.items()}
    of_toxic = [prompt for prompt, one in zip(prompts, toxic, strict=True) if one]
    lost, changes = _ablated(model, score, of_toxic, strongest, safe_means, site, token, u)
    table.loc[table.index[:n_ablated], "lost_share"] = lost / difference
    table.loc[table.index[:n_ablated], "score_change"] = changes
    return table.drop(columns="site").reset_index(drop=True)


def _written(model: Model, parts: Sequence[Part], outputs: Mapping[str, Tensor], u: Vector) -> np.ndarray:
    """What each part writes along u [prompts, parts], in float64."""
    columns: list[Tensor] = []
    for part in parts:
        output = outputs[part.site].double()
        if part.head is not None:
            w_o = model.bridge.blocks[part.layer].attn.W_O[part.head].double().cpu()
            columns.append(output[:, _of_head(part.head, len(w_o))] @ (w_o @ u))
        else:
            columns.append(output @ u)
    return torch.stack(columns, dim=1).numpy()


def _of_head(head: int, d_head: int) -> slice:
    return slice(head * d_head, (head + 1) * d_head)


@torch.no_grad()
def _ablated(
    model: Model,
    score: Score,
    prompts: Sequence[TokenizedPrompt],
    parts: Sequence[Part],
    means: Mapping[str, Float[Tensor, " width"]],
    site: str,
    token: int,
    u: Vector,
) -> tuple[Float[np.ndarray, " parts"], Float[np.ndarray, " parts"]]:
    """How much of the component at the site is lost without each part, and the change of the score: means.

    A part is ablated by setting what it writes at the token to its mean.
    """
    n_heads = model.bridge.cfg.n_heads

    def measure(
        batch: Batch, start: CachedResidual | None, acting: Mapping[str, Intervention]
    ) -> tuple[Tensor, Tensor]:
        """The component, and the score."""
        seen: dict[str, Tensor] = {}
        of_run = score(last_logits(model, batch, {**acting, site: recorder(seen, site)}, start), batch)
        return seen[site][:, token].double() @ u.to(model.device), of_run

    outputs = [
        Replacement(
            [part.site],
            slice(None) if part.head is None else _of_head(part.head, len(means[part.site]) // n_heads),
        )
        for part in parts
    ]
    here = torch.arange(token, 0, device=model.device)[None] == token
    edits = Replacements(outputs, here, {name: mean.to(model.device, model.dtype) for name, mean in means.items()})
    lost, changes = np.zeros((len(parts), len(prompts))), np.zeros((len(parts), len(prompts)))
    for one in prepare_suffixes(model, prompts, partial(steered_tokens, f"last-{-token}")).each():
        before = measure(one.batches[0], None, {})
        for run in packed_runs(one, edits):
            after = measure(run.batch, run.start, run.acting.in_prompt)
            component, of_run = (
                repeat(plain, "prompts -> (edits prompts)", edits=len(run.members)) for plain in before
            )
            run.fill(lost, component - after[0])
            run.fill(changes, after[1] - of_run)
    return lost.mean(1), changes.mean(1)


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
