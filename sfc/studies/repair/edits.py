"""A repair as a hook: some features set to their reference at every token of the prompt.

`x <- x - sum_i (f_i(x) - f_ref_i) d_i`, i over the repair's features at a site, f_ref the role-aligned mean: what
`sfc.ablation` does where all other nodes are kept. A feature of a top-k dictionary depends on which others are active,
so that no fixed weights do the same.

A repair as a change of weights: what features write is projected out of what heads and MLPs write.

Every attention and MLP output before a feature's site loses its component along the feature's decoder row: `W_out (1 -
U^T U)`, the rows of U an orthonormal basis (Arditi et al. 2024, for one direction). It is exactly the hook that
projects at these outputs, at every token. It is not the ablation of the features: it removes the component and not the
feature's value, leaves what the embedding writes, and puts no mean in its place.

What an edit does to prompts: their refusal scores, their replies, and the cross-entropy of given replies.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sfc.circuits.baselines import Reference
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import PromptRuns
from sfc.core.artifacts import replacing
from sfc.core.errors import UserError
from sfc.core.sites import kind_of, layer_of, site_of
from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import PACKED_TOKENS, PAD_SLOT, Batch, SlotLayout, make_batches
from sfc.models.generation import continue_tails
from sfc.models.interventions import Intervention
from sfc.models.loading import Model
from sfc.models.running import logits_at
from sfc.models.score import Score, score_batch
from sfc.models.tails import flush_right
from sfc.saes.dictionary import Dictionary

_META = "repair"


@dataclass(frozen=True)
class Repair:
    """Features that are set to a reference, by site."""

    layout: SlotLayout
    """what the rows of `reference` are"""
    features: Mapping[str, Int[Tensor, " features"]]
    reference: Mapping[str, Float[Tensor, "slots features"]]
    dictionaries: str
    """the folder of the dictionaries whose features these are"""

    @classmethod
    def of(cls, chosen: Int[Tensor, " chosen"], nodes: Nodes, reference: Reference, dictionaries: str) -> "Repair":
        """The repair that ablates these nodes, all of them features."""
        site_of = torch.from_numpy(nodes.site_numbers)[chosen]
        starts = torch.tensor([0, *nodes.sizes[:-1]]).cumsum(0)
        features = {
            site: chosen[site_of == number] - starts[number]
            for number, site in enumerate(nodes.sites)
            if (site_of == number).any()
        }
        values = {site: reference.features[site][:, of_site].cpu() for site, of_site in features.items()}
        return cls(reference.layout, features, values, dictionaries)

    def interventions(self, dictionaries: Mapping[str, Dictionary], batch: Batch) -> dict[str, Intervention]:
        """What acts in a run of the batch; its slots must be those of the repair's layout.

        Raises:
            UserError: a site has no dictionary, or one with too few features.
        """
        for site, features in self.features.items():
            if site not in dictionaries or int(features.max()) >= dictionaries[site].d_sae:
                raise UserError(f"this repair is of the dictionaries {self.dictionaries}; those given do not fit it")
        return {site: self._at_site(site, dictionaries[site], batch) for site in self.features}

    def _at_site(self, site: str, dictionary: Dictionary, batch: Batch) -> Intervention:
        touched = batch.touchable
        features = self.features[site].to(touched.device)
        reference = self.reference[site].to(touched.device)[batch.slots[touched]]
        rows = dictionary.W_dec[features]

        def act(activation: Tensor) -> Tensor:
            x = activation[touched].float()
            replaced = x - (dictionary.encode(x)[:, features] - reference) @ rows
            return activation.masked_scatter(touched[..., None], replaced.to(activation.dtype))

        return act


def save_repair(repair: Repair, path: Path) -> None:
    """Write the features and their references as safetensors."""
    tensors = {f"{site}/features": values.contiguous() for site, values in repair.features.items()}
    tensors |= {f"{site}/reference": values.contiguous() for site, values in repair.reference.items()}
    about = {
        "n_prefix": repair.layout.n_prefix,
        "n_suffix": repair.layout.n_suffix,
        "dictionaries": repair.dictionaries,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, {_META: json.dumps(about)})


def load_repair(path: Path) -> Repair:
    """Read what `save_repair` wrote.

    Raises:
        UserError: the file is missing or is no repair.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        by_kind = {
            kind: {name.rpartition("/")[0]: each for name, each in tensors.items() if name.endswith(f"/{kind}")}
            for kind in ("features", "reference")
        }
        layout = SlotLayout(about["n_prefix"], about["n_suffix"])
        return Repair(layout, by_kind["features"], by_kind["reference"], about["dictionaries"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no repair that `sfc repair` wrote ({error})") from None


Subspaces = Mapping[str, Float[Tensor, "directions d_model"]]
"""by site, `attn_out` or `mlp_out`, an orthonormal basis of what is projected out there"""


def writers_before(site: str) -> list[str]:
    """The outputs of attention and MLPs that the activation at a site is a sum of."""
    layer, kind = layer_of(site), kind_of(site)
    if kind in ("attn_out", "mlp_out"):
        return [site]
    attention = layer + (kind != "resid_pre")
    mlps = layer + (kind == "resid_post")
    return [site_of("attn_out", n) for n in range(attention)] + [site_of("mlp_out", n) for n in range(mlps)]


def written_subspaces(
    features: Mapping[str, Sequence[int]], dictionaries: Mapping[str, Dictionary]
) -> dict[str, Float[Tensor, "directions d_model"]]:
    """What is projected out of each output before the sites of some features: the span of their decoder rows."""
    rows: dict[str, list[Tensor]] = {}
    for site, of_site in features.items():
        written = dictionaries[site].W_dec[list(of_site)].detach().double().cpu()
        for writer in writers_before(site):
            rows.setdefault(writer, []).append(written)
    return {writer: _basis(torch.cat(parts)) for writer, parts in rows.items()}


def projecting(subspaces: Subspaces) -> dict[str, Intervention]:
    """Interventions that project the subspaces out, at every token."""

    def at_site(basis: Tensor) -> Intervention:
        def act(activation: Tensor) -> Tensor:
            u = basis.to(activation.device, torch.float32)
            x = activation.float()
            return (x - (x @ u.T) @ u).to(activation.dtype)

        return act

    return {site: at_site(basis) for site, basis in subspaces.items()}


@torch.no_grad()
def project_weights(model: Model, subspaces: Subspaces) -> None:
    """Change the model's output weights and biases in place, so that they write nothing into the subspaces.

    Raises:
        UserError: an output is no linear layer.
    """
    for site, basis in subspaces.items():
        block = model.bridge.blocks[layer_of(site)]
        layer = (block.attn.o if kind_of(site) == "attn_out" else block.mlp.out).original_component
        if not isinstance(layer, nn.Linear | Conv1D):
            raise UserError(f"the output of {site} is a {type(layer).__name__}, not a linear layer")
        u = basis.to(layer.weight.device)
        weight = layer.weight.double() if isinstance(layer, Conv1D) else layer.weight.double().T
        projected = weight - (weight @ u.T) @ u  # [d_in, d_out]
        layer.weight.copy_(projected if isinstance(layer, Conv1D) else projected.T)
        if layer.bias is not None:
            bias = layer.bias.double()
            layer.bias.copy_(bias - (bias @ u.T) @ u)


def save_subspaces(subspaces: Subspaces, path: Path) -> None:
    """Write the bases as safetensors, named by their sites; the weights follow from them by `project_weights`."""
    with replacing(path) as temporary:
        save_file({site: basis.contiguous() for site, basis in subspaces.items()}, temporary)


def _basis(rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "directions d_model"]:
    _, singular, directions = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
    return directions[singular > 1e-6 * singular[0]]


class Edit(NamedTuple):
    """What acts in a run."""

    in_prompt: Callable[[Batch], Mapping[str, Intervention]]
    """given the batch, whose replies, if any, stand in no slot"""
    in_reply: Mapping[str, Intervention]
    """at every token that is generated"""


NO_EDIT = Edit(lambda _: {}, {})


class Replies(NamedTuple):
    """What edited prompts are answered, in the order of the prompts."""

    scores: Float[np.ndarray, " prompts"]
    texts: list[str]


@torch.no_grad()
def edited_scores(model: Model, score: Score, runs: PromptRuns, edit: Edit) -> Float[np.ndarray, " prompts"]:
    """The refusal score of every prompt, from its first token on, in nats."""
    scores = np.full(runs.n_prompts, np.nan)
    for batch, _ in runs:
        scores[batch.prompts.cpu().numpy()] = score_batch(model, score, batch, edit.in_prompt(batch)).cpu().numpy()
    return scores


@torch.no_grad()
def edited_replies(
    model: Model,
    score: Score,
    prompts: Sequence[TokenizedPrompt],
    layout: SlotLayout,
    edit: Edit,
    reply_tokens: int,
) -> Replies:
    """The greedy reply to every prompt, with the score from the same run."""
    scores, texts = np.full(len(prompts), np.nan), [""] * len(prompts)
    for batch in make_batches(prompts, layout, PACKED_TOKENS, model.device):
        places = batch.prompts.tolist()
        tails = flush_right(batch)
        continued = continue_tails(model, tails, reply_tokens, edit.in_prompt(tails), edit.in_reply)
        scores[places] = score(continued.first_logits, tails).cpu().numpy()
        decoded = model.tokenizer.batch_decode(continued.ids, skip_special_tokens=True)
        for place, text in zip(places, decoded, strict=True):
            texts[place] = text
    return Replies(scores, texts)


@torch.no_grad()
def reply_losses(
    model: Model, prompts: Sequence[TokenizedPrompt], layout: SlotLayout, edit: Edit
) -> Float[np.ndarray, " tokens"]:
    """The cross-entropy of each token of the replies that come with the prompts, in nats."""
    losses = []
    for batch in make_batches(prompts, layout, PACKED_TOKENS, model.device):
        is_reply = _is_reply([prompts[i] for i in batch.prompts.tolist()], batch)
        before = torch.roll(is_reply, -1, dims=1)
        without_replies = replace(batch, slots=torch.where(is_reply, PAD_SLOT, batch.slots))
        # What acts at generated tokens acts at these.
        logits = logits_at(model, batch, before, {**edit.in_prompt(without_replies), **edit.in_reply})
        targets = batch.ids[is_reply]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu().numpy())
    return np.concatenate(losses)


def _is_reply(prompts: Sequence[TokenizedPrompt], batch: Batch) -> Tensor:
    marked = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        marked[row, : len(prompt.ids)] = torch.from_numpy(prompt.roles == Role.REPLY)
    return marked.to(batch.ids.device)
