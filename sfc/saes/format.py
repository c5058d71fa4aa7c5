"""Dictionaries in SAELens' own format: a folder for each, with `cfg.json` and `sae_weights.safetensors`.

`sae_lens.SAE.load_from_disk(folder)` reads what is written here, and what SAELens writes is read here without importing
sae_lens, which takes seconds: only what others publish in other formats is converted by SAELens itself (see
`sfc.saes.published`). Whatever it computes after loading is folded into the weights where it can be (see
`sfc.saes.architectures`).
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sfc.core.artifacts import Json, replacing, write_json
from sfc.core.contents import check, remedy
from sfc.core.errors import UserError
from sfc.saes.architectures import (
    ARCHITECTURES,
    CONFIG_FILE,
    MATRICES,
    WEIGHTS_FILE,
    Shapes,
    Weights,
    memory_of,
    read_config,
)
from sfc.saes.dictionary import WEIGHTS, Dictionary, NormalisedDictionary, TopKDictionary


class Dictionaries(Mapping[str, Dictionary]):
    """The dictionaries of a folder, one per site, in the order of the sites.

    Each is read when it is first asked for, and kept; a `UserError` says that one is missing or damaged.
    """

    def __init__(
        self, folder: Path, sites: Sequence[str], device: torch.device | str = "cpu", dtype: str = "float32"
    ) -> None:
        self._folder, self._sites, self._device, self._dtype = folder, tuple(sites), device, dtype
        self._read: dict[str, Dictionary] = {}

    def __getitem__(self, site: str) -> Dictionary:
        if site not in self._sites:
            raise KeyError(site)
        if site not in self._read:
            self._read[site] = load_dictionary(self._folder / site, self._device, self._dtype)
        return self._read[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def memory(self) -> int:
        """Bytes that all of them take together, whether they are read yet or not.

        Raises:
            UserError: a configuration is missing or damaged.
        """
        return sum(memory_of(read_config(self._folder / site), self._dtype) for site in self._sites)


def save_dictionary(dictionary: TopKDictionary, folder: Path, metadata: Json) -> None:
    """Write a dictionary into `folder`, which is made if need be; each file appears whole or not at all.

    `metadata` (JSON values, such as the model's name) goes into the configuration beside SAELens' `hook_name`.
    """
    sae_lens = version("sae-lens")
    config = {
        "architecture": "topk",
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "k": dictionary.k,
        "dtype": str(dictionary.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.apply_b_dec_to_input,
        "rescale_acts_by_decoder_norm": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # Without its version SAELens takes the file for one from before 6.0 and rewrites its configuration.
        "metadata": {"sae_lens_version": sae_lens, **metadata, "hook_name": dictionary.site},
    }
    weights = {name: getattr(dictionary, name).detach().cpu().contiguous() for name in WEIGHTS}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary)
    write_json(folder / CONFIG_FILE, config)


def load_dictionary(folder: Path, device: torch.device | str = "cpu", dtype: str = "float32") -> Dictionary:
    """Read a dictionary of any registered architecture: its matrices in this precision, the rest in float32.

    Feature values and reconstructions are SAELens' own; where the input normalisation depends on the row, they are in
    the model's units, and features for the row's scale and mean follow (see `NormalisedDictionary`).

    Raises:
        UserError: a file is missing, damaged, describes what cannot be used here, or does not fit the other file.
    """
    config = read_config(folder)
    architecture = ARCHITECTURES[config.architecture]
    weights = _read_weights(folder / WEIGHTS_FILE, config.architecture, architecture.shapes(config), device)
    dictionary = architecture.build(config, weights)
    is_module = isinstance(dictionary, torch.nn.Module)
    if is_module:
        for name in MATRICES:
            if isinstance(matrix := getattr(dictionary, name, None), torch.nn.Parameter):
                matrix.data = matrix.data.to(getattr(torch, dtype))
    made = dictionary.parameters() if is_module else weights.values()
    if not all(bool(weight.isfinite().all()) for weight in made):
        raise UserError(f"{folder / WEIGHTS_FILE} has values too large for {dtype}: the dictionary cannot be used")
    if config.normalize_activations in ("constant_norm_rescale", "layer_norm"):
        return NormalisedDictionary(dictionary, config.normalize_activations)
    return dictionary


def _read_weights(path: Path, architecture: str, shapes: Shapes, device: torch.device | str) -> Weights:
    weights = read_tensors(path, device)
    for name, shape in shapes.items():
        if name not in weights:
            raise UserError(f"{path} has no tensor {name}: it is not a {architecture} dictionary")
        if tuple(weights[name].shape) != shape or not weights[name].is_floating_point():
            found = f"{weights[name].dtype} {list(weights[name].shape)}"
            raise UserError(f"{path}: {name} is {found}, {CONFIG_FILE} asks for {list(shape)}")
        if not weights[name].isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite")
    for name in weights.keys() - shapes.keys():
        # Early versions of SAELens wrote a scaling factor of ones that does nothing.
        if name != "scaling_factor" or not bool((weights[name] == 1).all()):
            raise UserError(f"{path} has a tensor {name} that is not part of a {architecture} dictionary")
    return {name: weights[name].float() for name in shapes}


def read_tensors(path: Path, device: torch.device | str = "cpu") -> Weights:
    """The tensors of a safetensors file, by name.

    Raises:
        UserError: it is missing, damaged, or of another kind.
    """
    check(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, OSError, ValueError, KeyError) as error:  # the last two: of a type PyTorch does not have
        raise UserError(f"{path} cannot be read ({error}); {remedy(path)}") from None
