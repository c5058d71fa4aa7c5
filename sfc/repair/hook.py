"""A repair as a hook: some features set to their reference at every token of the prompt.

`x <- x - sum_i (f_i(x) - f_ref_i) d_i`, i over the repair's features at a site, f_ref the role-aligned mean: what
`sfc.ablation` does where all other nodes are kept. A feature of a top-k dictionary depends on which others are active,
so that no fixed weights do the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfc.ablation.nodes import Nodes
from sfc.ablation.references import Reference
from sfc.artifacts import replacing
from sfc.errors import UserError
from sfc.models.batches import Batch, SlotLayout
from sfc.models.interventions import Intervention
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
