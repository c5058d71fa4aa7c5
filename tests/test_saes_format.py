"""SAELens' files: what we write SAELens reads, what we read is checked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfc.core.errors import UserError
from sfc.saes.architectures import CONFIG_FILE, WEIGHTS_FILE
from sfc.saes.dictionary import WEIGHTS, TopKDictionary
from sfc.saes.format import load_dictionary, save_dictionary


def make_dictionary(apply_b_dec_to_input: bool = True) -> TopKDictionary:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return TopKDictionary(weights, k=5, site="blocks.3.hook_resid_post", apply_b_dec_to_input=apply_b_dec_to_input)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_dictionary(make_dictionary(), tmp_path / "blocks.3.hook_resid_post", {"model_name": "smollm2"})
    return tmp_path / "blocks.3.hook_resid_post"


def test_round_trip(folder: Path) -> None:
    ours, read = make_dictionary(), load_dictionary(folder)
    assert (read.k, read.site, read.apply_b_dec_to_input) == (5, "blocks.3.hook_resid_post", True)
    for name in WEIGHTS:
        assert torch.equal(getattr(read, name), getattr(ours, name))
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_saelens_agrees(tmp_path: Path, apply_b_dec_to_input: bool) -> None:
    from sae_lens import SAE

    ours = make_dictionary(apply_b_dec_to_input)
    save_dictionary(ours, tmp_path, {"model_name": "smollm2"})
    theirs = SAE.load_from_disk(tmp_path)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
    f = ours.encode(x)
    torch.testing.assert_close(theirs.encode(x), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(f), ours.decode(f), atol=1e-5, rtol=1e-5)
    assert theirs.cfg.metadata.hook_name == ours.site
    assert theirs.cfg.metadata.model_name == "smollm2"


def test_a_dictionary_written_by_saelens_is_read(tmp_path: Path) -> None:
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name="blocks.0.hook_resid_pre")
    theirs = TopKSAE(TopKSAEConfig(16, 64, k=5, rescale_acts_by_decoder_norm=True, metadata=metadata))
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)  # decoder rows of many lengths: the rescaling matters
    theirs.save_model(tmp_path)
    ours = load_dictionary(tmp_path)
    x = torch.randn(9, 16)
    f = theirs.encode(x)
    torch.testing.assert_close(ours.encode(x), f, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.decode(f), theirs.decode(f), atol=1e-5, rtol=1e-5)


def set_in_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))


def change_weights(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    save_file({**weights, name: change(weights[name])}, folder / WEIGHTS_FILE)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / CONFIG_FILE).unlink(), "does not exist"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "does not exist"),
    "truncated weights": (lambda folder: truncate(folder / WEIGHTS_FILE), "cannot be read"),
    "empty weights": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b""), "cannot be read"),
    "a pickle": (lambda folder: torch.save({"W_enc": torch.ones(1)}, folder / WEIGHTS_FILE), "cannot be read"),
    "truncated configuration": (lambda folder: truncate(folder / CONFIG_FILE), "is not JSON"),
    "a list": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "not the configuration"),
    "another architecture": (lambda folder: set_in_config(folder, architecture="jumprelu"), "no tensor threshold"),
    "unknown normalisation": (lambda folder: set_in_config(folder, normalize_activations="magic"), "'magic'"),
    "no site": (lambda folder: set_in_config(folder, metadata={}), "hook_name"),
    "no k": (lambda folder: set_in_config(folder, k=None), "k must be a positive whole number"),
    "k above d_sae": (lambda folder: set_in_config(folder, k=65), "only 64 features"),
    "another width": (lambda folder: set_in_config(folder, d_in=17), "asks for [17, 64]"),
    "integers": (lambda folder: change_weights(folder, "b_dec", lambda tensor: tensor.long()), "int64"),
    "not finite": (lambda folder: change_weights(folder, "W_dec", lambda tensor: tensor / 0), "not finite"),
    "foreign": (lambda folder: save_file({"w": torch.ones(2)}, folder / WEIGHTS_FILE), "has no tensor W_enc"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_folder_gives_one_clear_line(folder: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(UserError) as error:
        load_dictionary(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
