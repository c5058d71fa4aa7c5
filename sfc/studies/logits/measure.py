"""Direct logit attribution: what each part of a model writes into the refusal logit difference.

The refusal score is a log-odds, and not a sum of parts. Its linear relative is: the mean logit of the refusal-opening
tokens minus the mean logit of the tokens with which the model opens its answers when it complies, which are those that
`model.against_tokens` names, else the ones it finds most likely after harmless prompts.

The residual stream at the last position is the sum of what the embedding, each head, each MLP and each bias wrote into
it. With the final norm's scale held at its value in the run, the norm and the unembedding are linear too, so that the
logit difference is the sum of the parts' contributions (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"). With u the direction that the difference reads from the normed residual stream, w the norm's weight and
sigma its scale, a part that wrote x contributes

    x . v / sigma,   v = w u  (RMSNorm),   v = w u - mean(w u)  (LayerNorm, which centres what it reads)

Only what is written directly counts: a head that makes a later head write is not seen here, but in patching.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import LogOdds, auroc
from sfc.session import Session
from sfc.stats import bootstrap_means, reported
from sfc.studies.collect.fill import batched
from sfc.studies.logits import COMPLIANCE, GUARDRAIL, LogitAttributions, component_table, group_table, strongest
from sfc.studies.study import Made, write_tables

N_AGAINST = 10


@dataclass(frozen=True)
class LogitDifference:
    """Mean over the tokens `opening` minus mean over the tokens `against`."""

    opening: Int[Tensor, " n_opening"]
    against: Int[Tensor, " n_against"]

    def __call__(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
        """The difference along the last axis. Linear: of logits it is in nats, of the columns of the unembedding
        [d_model, vocab] it is the direction in the residual stream that it reads."""
        return logits[..., self.opening].mean(-1) - logits[..., self.against].mean(-1)

    def tokens(self, model: Model) -> dict[str, list[str]]:
        """Both sets of tokens as text, for people and manifests."""
        sides = {"refusal": self.opening, "against": self.against}
        return {name: [model.tokenizer.decode([token]) for token in ids.tolist()] for name, ids in sides.items()}


@torch.no_grad()
def logit_difference_of(
    model: Model, score: LogOdds, harmless: Sequence[Batch], count: int = N_AGAINST
) -> LogitDifference:
    """The difference of the tokens that the score compares, or against those that open answers to harmless prompts.

    Args:
        harmless: prompts that the model answers; not read where the score compares with tokens of its own.
        count: how many tokens to take from the mean distribution of the first token of those answers.
    """
    if len(score.against):
        return LogitDifference(score.tokens, score.against)
    likely = torch.stack([last_logits(model, batch).softmax(-1).sum(0) for batch in harmless]).sum(0)
    return LogitDifference(score.tokens, likely.index_fill(0, score.tokens, -1.0).topk(count).indices.sort().values)


# Models in half precision round the residual stream after every block, and no part wrote what rounding adds.
MOST_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_EMBEDDED, _POSITION, _SCALE = "blocks.0.hook_resid_pre", "pos_embed.hook_out", "ln_final.hook_scale"


class Component(NamedTuple):
    """A part of the model that writes into the residual stream or the logits."""

    name: str
    """`embed`, `pos_embed`, `head.21.3`, `mlp.21`, `attn_bias.21`, `mlp_bias.21`, `final_norm_bias`, `unembed_bias`"""
    kind: Literal["embedding", "head", "mlp", "bias", "attention"]
    layer: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class LogitAttribution:
    """Each component's contribution to the logit difference of each prompt, in nats."""

    components: tuple[Component, ...]
    contributions: Float[np.ndarray, "prompts components"]
    logit_difference: Float[np.ndarray, " prompts"]
    """from the model's own logits, which the contributions sum to"""
    score: Float[np.ndarray, " prompts"]
    """the score, of which the logit difference is the linear relative"""

    @property
    def error(self) -> float:
        """The largest |sum of contributions - logit difference| over the prompts, relative to the sum of |terms|."""
        missing = np.abs(self.contributions.sum(1) - self.logit_difference)
        return float((missing / np.abs(self.contributions).sum(1)).max())


@torch.no_grad()
def attribute_logits(
    model: Model,
    score: LogOdds,
    difference: LogitDifference,
    batches: Sequence[Batch],
    progress: Callable[[int], object],
) -> LogitAttribution:
    """The contributions of all components, for every prompt in the order of the list that was batched.

    Args:
        progress: called with the number of prompts done since the last call.

    Raises:
        UserError: the contributions do not sum to the logit difference, because this model is not built of such parts.
    """
    n_prompts, sites = sum(len(batch.prompts) for batch in batches), _sites(model)
    components: tuple[Component, ...] = ()
    contributions = np.empty((0, 0))
    differences, scores = np.empty(n_prompts), np.empty(n_prompts)
    for batch in batches:
        seen: dict[str, Tensor] = {}
        logits = last_logits(model, batch, {site: _last_position(seen, site, batch) for site in sites}).double()
        if silent := [site for site in sites if site not in seen]:
            raise _not_a_sum(model, f"nothing passes {silent[0]}")
        parts = list(_parts(model, difference, seen))
        if not components:
            components = tuple(component for group, _ in parts for component in group)
            contributions = np.empty((n_prompts, len(components)))
        rows = batch.prompts.cpu().numpy()
        contributions[rows] = torch.cat([values for _, values in parts], 1).cpu().numpy()
        differences[rows] = difference(logits).cpu().numpy()
        scores[rows] = score(logits).cpu().numpy()
        progress(len(rows))
    attribution = LogitAttribution(components, contributions, differences, scores)
    if not attribution.error <= MOST_ERROR[model.dtype]:
        missed = f"the sum misses the logit difference by {attribution.error:.1g} of the absolute terms"
        raise _not_a_sum(model, f"{missed}, and {MOST_ERROR[model.dtype]:g} is allowed")
    return attribution


def _not_a_sum(model: Model, why: str) -> UserError:
    return UserError(
        f"direct logit attribution cannot take {model.config.source!r} apart: {why}; perhaps its blocks norm or scale"
        " what they write, or it caps its logits"
    )


def by_layer(attribution: LogitAttribution) -> LogitAttribution:
    """The same with the parts of each layer joined: `attention` and `mlp`, each with its bias; the rest as it is."""
    joined: dict[Component, list[int]] = {}
    for i, component in enumerate(attribution.components):
        joined.setdefault(_layer_part(component), []).append(i)
    sums = [attribution.contributions[:, columns].sum(1) for columns in joined.values()]
    return LogitAttribution(tuple(joined), np.stack(sums, 1), attribution.logit_difference, attribution.score)


def _layer_part(component: Component) -> Component:
    if component.layer is None:
        return component
    if component.kind == "mlp" or component.name.startswith("mlp_bias"):
        return Component(f"mlp.{component.layer}", "mlp", component.layer)
    return Component(f"attention.{component.layer}", "attention", component.layer)


def _sites(model: Model) -> list[str]:
    layers = [f"blocks.{i}.{site}" for i in range(model.n_layers) for site in ("attn.hook_z", "hook_mlp_out")]
    return [_EMBEDDED, *([_POSITION] if _POSITION in model.bridge.hook_dict else []), *layers, _SCALE]


def _last_position(into: dict[str, Tensor], site: str, batch: Batch) -> Intervention:
    """Changes nothing, and keeps the activation at the last position of each prompt, in float64."""
    rows, last = torch.arange(len(batch.lengths), device=batch.lengths.device), batch.lengths - 1

    def record(activation: Tensor) -> None:
        # Positional embeddings are made once for all rows.
        into[site] = activation.expand(len(rows), *activation.shape[1:])[rows, last].double()

    return record


def _parts(
    model: Model, difference: LogitDifference, seen: Mapping[str, Tensor]
) -> Iterator[tuple[list[Component], Float[Tensor, "batch components"]]]:
    """The components in the order in which the model passes them, with their contributions."""
    unembedding = model.hf.get_output_embeddings()
    reads = difference(unembedding.weight.double().T)
    norm = model.bridge.ln_final
    direction = _norm_weight(model) * reads
    if not norm.uses_rms_norm:
        direction = direction - direction.mean()
    direction = direction / seen[_SCALE]

    def written(x: Tensor) -> Float[Tensor, "batch 1"]:
        return (x * direction).sum(-1, keepdim=True)

    position = seen.get(_POSITION, torch.zeros_like(seen[_EMBEDDED]))
    yield [Component("embed", "embedding")], written(seen[_EMBEDDED] - position)
    if _POSITION in seen:
        yield [Component("pos_embed", "embedding")], written(position)
    for i, block in enumerate(model.bridge.blocks):
        w_o = block.attn.W_O.double()
        z = rearrange(seen[f"blocks.{i}.attn.hook_z"], "batch (head z) -> batch head z", head=len(w_o))
        heads = [Component(f"head.{i}.{head}", "head", i, head) for head in range(len(w_o))]
        yield heads, einsum(z, w_o, direction, "batch head z, head z d_model, batch d_model -> batch head")
        if block.attn.b_O is not None:
            yield [Component(f"attn_bias.{i}", "bias", i)], written(block.attn.b_O.double())
        mlp = seen[f"blocks.{i}.hook_mlp_out"]
        bias = getattr(block.mlp, "b_out", None)
        yield [Component(f"mlp.{i}", "mlp", i)], written(mlp if bias is None else mlp - bias.double())
        if bias is not None:
            yield [Component(f"mlp_bias.{i}", "bias", i)], written(bias.double())
    every_prompt = torch.ones_like(seen[_SCALE])
    if getattr(norm.original_component, "bias", None) is not None:
        yield [Component("final_norm_bias", "bias")], every_prompt * (norm.original_component.bias.double() @ reads)
    yield [Component("unembed_bias", "bias")], every_prompt * difference(unembedding.bias.double())


def _norm_weight(model: Model) -> Float[Tensor, " d_model"]:
    weight = model.bridge.ln_final.weight.double()
    # Gemma stores how far the weight is from one.
    return 1 + weight if getattr(model.bridge.cfg, "rmsnorm_uses_offset", False) else weight


_LISTED_HEADS = 10


def measure(study: LogitAttributions, session: Session, folder: Path) -> Made:
    """Attribute, classify the heads, and write the tables.

    Raises:
        UserError: the category lacks prompts, the score does not compare tokens, or the model is not the sum of its
            parts' outputs.
    """
    experiment, model, seed = session.run.experiment, session.model, session.run.experiment.seed
    category = session.run.group(study.of(session.run).category)
    score, words = session.metric, session.run.behavior.words
    if not isinstance(score, LogOdds):
        raise UserError(
            f"attribute-logits splits a difference of logits, and the score of behavior {experiment.behavior!r} does"
            " not compare tokens"
        )
    difference = logit_difference_of(model, score, [] if len(score.against) else _harmless(session))
    balanced = session.run.balanced(category)
    prompts, batches = batched(session, balanced[balanced["split"] == "test"])
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
    write_tables(folder, tables, digits=6)
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
    everyone = session.run.balanced()
    frame = everyone[(everyone["split"] == "reference") & ~everyone["refusal_label"]]
    if frame.empty:
        raise UserError("the reference split is empty: raise prompts.reference, or name model.against_tokens")
    return batched(session, frame)[1]


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
        "auroc": reported(auroc(attribution.logit_difference, toxic)),
        "score_correlation": reported(correlation),
    }


def _heads(components: pd.DataFrame) -> dict[str, Any]:
    """The heads that tell toxic from safe prompts best, and the names of all guardrail and compliance heads."""
    heads = strongest(components[components["kind"] == "head"])
    columns = ["component", "role", "toxic_mean", "toxic_low", "toxic_high", "safe_mean", "difference", "q_value"]
    names = {role: heads.loc[heads["role"] == role, "component"].tolist() for role in (GUARDRAIL, COMPLIANCE)}
    return {"n_heads": len(heads), **names, "heads": heads[columns].head(_LISTED_HEADS).to_dict("records")}
