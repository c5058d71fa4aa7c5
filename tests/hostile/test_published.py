"""Dictionaries in the layouts in which others publish them, every file of them damaged in every way."""

import io
from pathlib import Path

import dictionary_repositories as repositories
import numpy as np
import pytest

from hostile.inputs import OBJECT, WEIGHTS, Damage, damages, put
from hostile.sampling import CONTROLS, at_most, sample
from sfc.core.errors import UserError
from sfc.core.faults import user_message
from sfc.saes.format import load_dictionary
from sfc.saes.published import in_saelens_format
from sfc.saes.source import local_dictionaries

SITE = "blocks.12.hook_resid_post"


def _arrays(**changes: object) -> Damage:
    """The arrays of an archive with some of them changed; None leaves one out."""

    def changed(data: bytes) -> bytes:
        with np.load(io.BytesIO(data)) as archive:
            arrays = {**archive, **changes}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in arrays.items() if value is not None})  # pyright: ignore
        return buffer.getvalue()

    return changed


ARCHIVE: dict[str, Damage] = {
    "pickled-objects": _arrays(W_dec=np.array([{"a": 1}], dtype=object)),
    "no-decoder": _arrays(W_dec=None),
    "words": _arrays(threshold=np.array(["high"] * 96)),
    "not-finite": _arrays(b_dec=np.full(24, np.nan)),
    "other-shape": _arrays(W_enc=np.zeros((96, 24), np.float32)),
    "a-number": _arrays(b_enc=np.float32(3)),
    "no-arrays": lambda data: b"PK\x05\x06" + bytes(18),
}
LAYOUTS = {
    "Gemma Scope": (
        "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", repositories.gemma_scope, {"params.npz": (ARCHIVE,)},
    ),
    "Gemma Scope 2": (
        "gemma-scope-2-1b-it/resid_post/layer_12_width_16k_l0_medium", repositories.gemma_scope_2,
        {"config.json": (OBJECT,), "params.safetensors": (WEIGHTS,)},
    ),
    "Llama Scope": (
        "Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L12R-8x",
        lambda folder, tensors: repositories.llama_scope(folder, tensors, SITE),
        {"hyperparams.json": (OBJECT,), "checkpoints/final.safetensors": (WEIGHTS,)},
    ),
    "sparsify": ("layers.12", repositories.sparsify, {"cfg.json": (OBJECT,), "sae.safetensors": (WEIGHTS,)}),
}  # fmt: skip
CASES = [
    (layout, name, damage)
    for layout, (_, _, files) in LAYOUTS.items()
    for name, kinds in files.items()
    for damage in dict.fromkeys(damages(*kinds))
    if name.endswith(".json") or damage not in ("utf-16", "long-field")  # these need text
]


@pytest.mark.parametrize(("layout", "name", "damage"), sample(CASES, keep=4))
def test_a_damaged_file_of_a_published_dictionary_is_one_line(
    layout: str, name: str, damage: str, tmp_path: Path
) -> None:
    place, write, files = LAYOUTS[layout]
    folder, made = tmp_path / "given" / place, tmp_path / "made"
    folder.parent.mkdir(parents=True)
    write(folder, repositories.weights(24, 96))
    made.mkdir()
    put(folder / name, (folder / name).read_bytes(), damage, *files[name])
    with at_most(60):
        try:
            found = local_dictionaries(str(folder), [SITE])[SITE]
            dictionary = load_dictionary(in_saelens_format(str(folder), found, made))
        except Exception as error:
            message = user_message(error)
            assert message and "\n" not in message and 20 < len(message) < 1200, repr(error)
            assert not CONTROLS.search(message) or not isinstance(error, UserError), message
        else:
            assert dictionary.d_in == 24 and all(bool(weight.isfinite().all()) for weight in dictionary.parameters())  # pyright: ignore
