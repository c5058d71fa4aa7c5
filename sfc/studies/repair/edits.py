"""Which features a repair ablates, and how: as a hook, or as a change of weights.

Marks et al. 2024 (SHIFT) read a circuit and ablate by hand the features that should not matter. Here the rule is
automatic. With h and t the attribution effects of a feature on the refusal score of over-refused hard prompts and of
refused toxic ones, features qualify where h > 0 and t <= share * h, and those with the largest h come first.

The hook ablates them at every token of the prompt, with all other nodes kept:
`x <- x - sum_i (f_i(x) - f_ref_i) d_i`, i over the repair's features at a site, f_ref the role-aligned mean. A feature
of a top-k dictionary depends on which others are active, so that no fixed weights do the same.

The change of weights projects what features write out of what heads and MLPs write. Every attention and MLP output
before a feature's site loses its component along the feature's decoder row: `W_out (1 - U^T U)`, the rows of U an
orthonormal basis (Arditi et al. 2024, for one direction). It is exactly the hook that projects at these outputs, at
every token. It is not the ablation of the features: it removes the component and not the feature's value, leaves what
the embedding writes, and puts no mean in its place.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import BaselineTables, zero_baseline
from sfc.circuits.faithfulness import Ablations
from sfc.circuits.nodes import Nodes
from sfc.core.artifacts import replacing
from sfc.core.contents import check
from sfc.core.errors import UserError
from sfc.core.sites import in_order, kind_of, layer_of, site_of
from sfc.models.batches import Batch, TemplateLayout
from sfc.models.engine import Alike, Edits
from sfc.models.interventions import Intervention, Interventions
from sfc.models.loading import Model
from sfc.saes.dictionary import Dictionary

_META = "repair"


@dataclass(frozen=True)
class FeatureAblation:
    """Features that are set to a reference, by site."""

    layout: TemplateLayout
    """what the rows of `reference` are"""
    features: Mapping[str, Int[Tensor, " features"]]
    reference: Mapping[str, Float[Tensor, "positions features"]]
    dictionaries: str
    """the folder of the dictionaries whose features these are"""

    @classmethod
    def of(
        cls, chosen: Int[np.ndarray, " chosen"], nodes: Nodes, reference: BaselineTables, dictionaries: str
    ) -> "FeatureAblation":
        """The repair that ablates these nodes, all of them features."""
        features = {site: torch.from_numpy(of_site) for site, of_site in nodes.by_site(chosen).items()}
        values = {site: reference.features[site][:, of_site].cpu() for site, of_site in features.items()}
        return cls(reference.layout, features, values, dictionaries)

    def interventions(self, dictionaries: Mapping[str, Dictionary], batch: Batch) -> Mapping[str, Intervention]:
        """What acts in a run of the batch; its template_positions must be those of the repair's layout.

        Raises:
            UserError: a site has no dictionary, or one with too few features.
        """
        for site, features in self.features.items():
            if site not in dictionaries or int(features.max()) >= dictionaries[site].d_sae:
                raise UserError(f"this repair is of the dictionaries {self.dictionaries}; those given do not fit it")
        here = {site: dictionaries[site] for site in self.features}
        # Values of nodes that are kept do not matter.
        reference, ablated = zero_baseline(here, self.layout), []
        for site, features in self.features.items():
            reference.features[site][:, features] = self.reference[site].to(batch.ids.device)
            of_site = torch.zeros(here[site].d_sae + here[site].n_parts, dtype=torch.bool)
            ablated.append(of_site.index_fill(0, features, True))
        ablation = Ablation(Nodes.of_spaces(here), here, reference, "node")
        keep = ~torch.cat(ablated)[None].numpy()
        return Ablations(ablation, keep).interventions(batch, [0]).in_prompt


def save_repair(repair: FeatureAblation, path: Path) -> None:
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


def load_repair(path: Path) -> FeatureAblation:
    """Read what `save_repair` wrote.

    Raises:
        UserError: the file is missing or is not a repair.
    """
    check(path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        by_kind = {
            kind: {name.rpartition("/")[0]: each for name, each in tensors.items() if name.endswith(f"/{kind}")}
            for kind in ("features", "reference")
        }
        layout = TemplateLayout(about["n_prefix"], about["n_suffix"])
        return FeatureAblation(layout, by_kind["features"], by_kind["reference"], about["dictionaries"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a repair that `sfc repair` wrote ({error})") from None


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
    features: Mapping[str, Int[np.ndarray, " features"]], dictionaries: Mapping[str, Dictionary]
) -> dict[str, Float[Tensor, "directions d_model"]]:
    """What is projected out of each output before the sites of some features: the span of their decoder rows."""
    rows: dict[str, list[Tensor]] = {}
    for site, of_site in features.items():
        written = dictionaries[site].W_dec[list(of_site)].detach().double().cpu()
        for writer in writers_before(site):
            rows.setdefault(writer, []).append(written)
    return {writer: _basis(torch.cat(parts)) for writer, parts in rows.items()}


@dataclass(frozen=True)
class Projections(Edits):
    """Subspaces projected out at every token of prompt and reply, as `project_weights` does it in the weights."""

    subspaces: Sequence[Subspaces]

    def __len__(self) -> int:
        return len(self.subspaces)

    def alike(self) -> Sequence[Alike]:
        """Each by itself."""
        return [Alike([number], in_order(list(each))[0]) for number, each in enumerate(self.subspaces)]

    def interventions(self, batch: Batch, members: Sequence[int]) -> Interventions:
        """See `Edits`."""
        [number] = members
        acting = {site: _projecting(basis.to(batch.ids.device)) for site, basis in self.subspaces[number].items()}
        return Interventions(acting, acting)


def _projecting(basis: Float[Tensor, "directions d_model"]) -> Intervention:
    u = basis.float()

    def project(activation: Tensor) -> Tensor:
        x = activation.float()
        return (x - (x @ u.T) @ u).to(activation.dtype)

    return project


@torch.no_grad()
def project_weights(model: Model, subspaces: Subspaces) -> None:
    """Change the model's output weights and biases in place, so that they write nothing into the subspaces.

    Raises:
        UserError: an output is not a linear layer.
    """
    for site, basis in subspaces.items():
        layer = _output_layer(model, site)
        u = basis.to(layer.weight.device)
        weight = layer.weight.double() if isinstance(layer, Conv1D) else layer.weight.double().T
        projected = weight - (weight @ u.T) @ u  # [d_in, d_out]
        layer.weight.copy_(projected if isinstance(layer, Conv1D) else projected.T)
        if layer.bias is not None:
            bias = layer.bias.double()
            layer.bias.copy_(bias - (bias @ u.T) @ u)


@contextmanager
def projected_weights(model: Model, subspaces: Subspaces) -> Iterator[None]:
    """As `project_weights`, undone at the end of the block.

    Raises:
        UserError: an output is not a linear layer.
    """
    layers = [_output_layer(model, site) for site in subspaces]
    before = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]
    project_weights(model, subspaces)
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer.load_state_dict(state)


def _output_layer(model: Model, site: str) -> nn.Linear | Conv1D:
    block = model.bridge.blocks[layer_of(site)]
    layer = (block.attn.o if kind_of(site) == "attn_out" else block.mlp.out).original_component
    if not isinstance(layer, nn.Linear | Conv1D):
        raise UserError(f"the output of {site} is a {type(layer).__name__}, not a linear layer")
    return layer


def save_subspaces(subspaces: Subspaces, path: Path) -> None:
    """Write the bases as safetensors, named by their sites; the weights follow from them by `project_weights`."""
    with replacing(path) as temporary:
        save_file({site: basis.contiguous() for site, basis in subspaces.items()}, temporary)


def _basis(rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "directions d_model"]:
    _, singular, directions = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
    return directions[singular > 1e-6 * singular[0]]


def qualified(
    on_hard: Float[np.ndarray, " nodes"],
    on_toxic: Float[np.ndarray, " nodes"],
    is_feature: Bool[np.ndarray, " nodes"],
    share: float,
) -> Int[np.ndarray, " qualified"]:
    """The features that matter for hard prompts and not for toxic ones, the best first.

    Args:
        share: of its effect on hard prompts that a feature may have on toxic ones.
    """
    fits = (on_hard > 0) & (on_toxic <= share * on_hard) & is_feature
    ranking = np.argsort(-on_hard, kind="stable")
    return ranking[fits[ranking]]


def best_size(tried: pd.DataFrame, most_lost: float) -> int | None:
    """The number of features whose ablation refuses fewest hard prompts among those that spare the toxic ones.

    Toxic prompts are spared where the share refused falls by at most `most_lost`; of equals, the one with the lowest
    mean score of hard prompts counts. None where no size spares them and lowers that score.

    Args:
        tried: a row per `size`, 0 being the model as it is: `hard` and `toxic`, shares refused, and `hard_score`.
    """
    plain = tried[tried["size"] == 0].iloc[0]
    edited = tried[(tried["size"] > 0) & (tried["hard_score"] < plain["hard_score"])]
    spared = edited[plain["toxic"] - edited["toxic"] <= most_lost + 1e-9]
    if spared.empty:
        return None
    return int(spared.sort_values(["hard", "hard_score"])["size"].iloc[0])


def shares_refused(scores: Mapping[str, Float[np.ndarray, " prompts"]], above: float) -> dict[str, float]:
    """By group of prompts, the share whose score is above a threshold, and the mean as `GROUP_score`."""
    shares = {group: float((values > above).mean()) for group, values in scores.items()}
    return shares | {f"{group}_score": float(values.mean()) for group, values in scores.items()}
