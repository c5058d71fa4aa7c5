"""A repair as a change of weights: what features write is projected out of what heads and MLPs write.

Every attention and MLP output before a feature's site loses its component along the feature's decoder row: `W_out (1 -
U^T U)`, the rows of U an orthonormal basis (Arditi et al. 2024, for one direction). It is exactly the hook that
projects at these outputs, at every token. It is not the ablation of the features: it removes the component and not the
feature's value, leaves what the embedding writes, and puts no mean in its place.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sfc.artifacts import replacing
from sfc.errors import UserError
from sfc.models.interventions import Intervention
from sfc.models.loading import Model
from sfc.saes.dictionary import Dictionary
from sfc.sites import kind_of, layer_of, site_of

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
