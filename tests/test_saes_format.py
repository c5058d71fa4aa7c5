"""SAELens' files: what we write SAELens reads, what it writes of every architecture is read, and all is checked."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfc.core.errors import UserError
from sfc.saes.architectures import (
    ARCHITECTURES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Architecture,
    DictionaryConfig,
    Weights,
)  # fmt: skip
from sfc.saes.dictionary import (
    WEIGHTS,
    Dictionary,
    JumpReLUDictionary,
    TopKDictionary,
)  # fmt: skip
from sfc.saes.format import load_dictionary, save_dictionary

D_IN, D_SAE, SITE = 16, 64, "blocks.3.hook_resid_post"
NORMALISATIONS = (
    "none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm"
)  # fmt: skip


def make_dictionary(apply_b_dec_to_input: bool = True) -> TopKDictionary:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return TopKDictionary(weights, k=5, site=SITE, apply_b_dec_to_input=apply_b_dec_to_input)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_dictionary(make_dictionary(), tmp_path / SITE, {"model_name": "smollm2"})
    return tmp_path / SITE


def test_round_trip(folder: Path) -> None:
    ours, read = make_dictionary(), load_dictionary(folder)
    assert (read.k, read.site, read.apply_b_dec_to_input) == (5, SITE, True)
    for name in WEIGHTS:
        assert torch.equal(getattr(read, name), getattr(ours, name))
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_saelens_reads_what_is_written_and_agrees(tmp_path: Path, apply_b_dec_to_input: bool) -> None:
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


def rows(*shape: int) -> Tensor:
    """Activations of many norms, around a mean that is not zero."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, D_IN, generator=random) * torch.randn(*shape, 1, generator=random).exp()
    return x + torch.randn(*shape, 1, generator=random)


def built(architecture: str, **settings: Any) -> Any:
    """A dictionary of SAELens' own with random weights; thresholds and gates of both signs."""
    from sae_lens import SAE

    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "metadata": {"hook_name": SITE}, **settings}
    sae = SAE.from_dict({**config, "k": 5} if architecture.endswith("topk") else config)
    random = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    if architecture == "matching_pursuit":  # it keeps its directions at length one
        sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=1)
    return sae


def without_signs(f: Tensor, architecture: str) -> Tensor:
    """SAELens' feature values as ours, which are not negative."""
    return torch.cat([f.relu(), (-f).relu()], dim=-1) if architecture == "abstopk" else f


def expected_scale(x: Tensor, normalisation: str) -> Tensor | float:
    if normalisation == "layer_norm":
        return x.std(-1, keepdim=True)
    return x.norm(dim=-1, keepdim=True) / D_IN**0.5 if normalisation == "constant_norm_rescale" else 1.0


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False], ids=["b_dec subtracted", "b_dec not subtracted"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "jumprelu", "standard", "gated", "matching_pursuit"])
def test_features_and_reconstructions_are_those_of_saelens(
    architecture: str, normalisation: str, apply_b_dec_to_input: bool, tmp_path: Path
) -> None:
    """Where the normalisation depends on the row, our feature values are SAELens' times the row's scale."""
    from sae_lens import SAE

    settings = {"normalize_activations": normalisation, "apply_b_dec_to_input": apply_b_dec_to_input}
    built(architecture, **settings).save_model(tmp_path)
    ours, theirs, x = load_dictionary(tmp_path), SAE.load_from_disk(tmp_path), rows(5, 20)
    with torch.no_grad():
        signed = theirs.encode(x)
        x_hat = theirs.decode(signed)
    f = without_signs(signed, architecture)
    assert 0.02 < (f > 0).float().mean() < 0.7 and (signed.min() < 0) == (architecture == "abstopk")
    encoded = ours.encode(x)
    own = f.shape[-1]
    torch.testing.assert_close(encoded[..., :own], f * expected_scale(x, normalisation), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(encoded), x_hat, atol=1e-5, rtol=1e-5)
    values, indices = ours.encode_sparse(x.flatten(0, 1))
    dense = torch.zeros(100, ours.d_sae).scatter_add(1, indices, values)
    torch.testing.assert_close(dense, encoded.flatten(0, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.decode_sparse(values, indices), x_hat.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert isinstance(ours, Dictionary) and (ours.site, ours.d_in) == (SITE, D_IN)


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_features_rescaled_by_decoder_norms_are_those_of_saelens(
    architecture: str, normalisation: str, tmp_path: Path
) -> None:
    from sae_lens import SAE

    built(architecture, rescale_acts_by_decoder_norm=True, normalize_activations=normalisation).save_model(tmp_path)
    ours, theirs, x = load_dictionary(tmp_path), SAE.load_from_disk(tmp_path), rows(50)
    signed = theirs.encode(x)
    scaled = without_signs(signed, architecture) * expected_scale(x, normalisation)
    torch.testing.assert_close(ours.encode(x)[:, : scaled.shape[1]], scaled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(signed), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"residual_threshold": 1.5}, {"max_iterations": 3}, {"stop_on_duplicate_support": False, "max_iterations": 9}],
)
def test_matching_pursuit_stops_where_saelens_stops(settings: dict[str, Any], tmp_path: Path) -> None:
    from sae_lens import SAE

    built("matching_pursuit", **settings).save_model(tmp_path)
    ours, theirs, x = load_dictionary(tmp_path), SAE.load_from_disk(tmp_path), rows(50)
    f = theirs.encode(x)
    torch.testing.assert_close(ours.encode(x), f, atol=1e-5, rtol=1e-5)
    by_itself = torch.cat([ours.encode(row[None]) for row in x])
    torch.testing.assert_close(by_itself, f, atol=1e-5, rtol=1e-5)  # it is a function of one row


@pytest.mark.parametrize("architecture", ["abstopk", "jumprelu", "matching_pursuit"])
def test_gradients_of_features_are_those_of_finite_differences(architecture: str, tmp_path: Path) -> None:
    built(architecture).save_model(tmp_path)
    ours, x = load_dictionary(tmp_path), rows(20)
    direction, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), 1e-3
    x.requires_grad_()
    values, indices = ours.encode_sparse(x)
    (gradient,) = torch.autograd.grad((values * (indices % 7)).sum(), x)
    weights = (torch.arange(ours.d_sae) % 7).double()
    ends = [ours.encode(x.detach() + sign * step * direction) for sign in (1, -1)]
    smooth = ((ends[0] > 0) == (ends[1] > 0)).all(1)
    assert smooth.sum() > 10
    slope = ((ends[0] - ends[1]).double() @ weights) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(1).double()[smooth], slope[smooth], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_a_batch_top_k_sae_is_read_as_the_jumprelu_sae_it_is_saved_as(kind: str, tmp_path: Path) -> None:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    widths = {"matryoshka_widths": [8, D_SAE]} if kind.startswith("Matryoshka") else {}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=D_IN, d_sae=D_SAE, k=5, metadata=SAEMetadata(hook_name=SITE), **widths
    )
    trained = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    trained.topk_threshold.fill_(0.4)
    trained.save_inference_model(tmp_path / "finished")
    x = rows(50)
    ours, f = load_dictionary(tmp_path / "finished"), sae_lens.SAE.load_from_disk(tmp_path / "finished").encode(x)
    assert isinstance(ours, JumpReLUDictionary)
    assert f[f > 0].min() > 0.4
    torch.testing.assert_close(ours.encode(x), f, atol=1e-5, rtol=1e-5)
    trained.save_model(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="checkpoint of training: save_inference_model of SAELens writes"):
        load_dictionary(tmp_path / "checkpoint")


def test_every_architecture_of_saelens_is_read_or_refused_with_the_reason(tmp_path: Path) -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    transcoders = {name for name in SAE_CLASS_REGISTRY if name.endswith("transcoder")}
    assert set(SAE_CLASS_REGISTRY) - transcoders - set(ARCHITECTURES.names()) == {"temporal"}
    built("standard").save_model(tmp_path)
    change_config(tmp_path, architecture="temporal")
    with pytest.raises(UserError, match="what it encodes of a token depends on the tokens before it"):
        load_dictionary(tmp_path)


LEGACY = {
    "standard": {"hook_point": SITE, "normalize_activations": False, "activation_fn_str": "relu", "l1_coefficient": 5},
    "standard, scaled": {"hook_name": SITE, "normalize_activations": True, "finetuning_scaling_factor": False},
    "layer norm": {"hook_name": SITE, "normalize_activations": "layer_norm", "sae_lens_version": "5.10.3"},
    "top-k": {"hook_name": SITE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
}


@pytest.mark.parametrize("case", LEGACY)
def test_files_of_before_saelens_6_are_read_as_saelens_6_reads_them(case: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    built("standard").save_model(tmp_path)
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", **LEGACY[case]}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    change_weights(tmp_path, scaling_factor=torch.ones(D_SAE))
    ours, theirs, x = load_dictionary(tmp_path), SAE.load_from_disk(tmp_path), rows(50)
    f = theirs.encode(x)
    scale = expected_scale(x, str(config.get("normalize_activations")))
    torch.testing.assert_close(ours.encode(x)[:, :D_SAE], f * scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(f), atol=1e-5, rtol=1e-5)


def test_a_stranger_registers_an_architecture(tmp_path: Path) -> None:
    """One whose features are `relu(x @ W_enc)`, and whose decoder is the transpose of its encoder."""

    def build(config: DictionaryConfig, weights: Weights) -> Dictionary:
        zeros = {"b_enc": torch.zeros(config.d_sae), "threshold": torch.zeros(config.d_sae)}
        weights = {**weights, "W_dec": weights["W_enc"].T, "b_dec": torch.zeros(config.d_in), **zeros}
        return JumpReLUDictionary(weights, site=config.site)

    name = "tied, for a test"
    ARCHITECTURES.register(Architecture(name, lambda config: {"W_enc": (config.d_in, config.d_sae)}, build))
    W_enc, x = torch.randn(D_IN, D_SAE), rows(9)
    config = {"architecture": name, "d_in": D_IN, "d_sae": D_SAE, "metadata": {"hook_name": SITE}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "sae_lens_version": "6.0.0"}))
    save_file({"W_enc": W_enc}, tmp_path / WEIGHTS_FILE)
    dictionary = load_dictionary(tmp_path)
    torch.testing.assert_close(dictionary.encode(x), (x @ W_enc).relu())
    torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), (x @ W_enc).relu() @ W_enc.T)
    with pytest.raises(UserError, match="tied"):
        ARCHITECTURES.register(Architecture(name, lambda _: {}, build))


def test_the_names_of_architectures_are_known_without_torch() -> None:
    code = "import sys; from sfc.saes.source import read_config; from sfc.saes.architectures import ARCHITECTURES"
    code += "; print(*ARCHITECTURES.names(), 'torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *names, torch_is_there = finished.stdout.split()
    assert (
        names[:6] == ["topk", "abstopk", "jumprelu", "standard", "gated", "matching_pursuit"]
        and torch_is_there == "False"
    )


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))


def change_weights(folder: Path, **tensors: Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS_FILE), **tensors}, folder / WEIGHTS_FILE)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no configuration": ("topk", lambda folder: (folder / CONFIG_FILE).unlink(), "does not exist"),
    "no weights": ("topk", lambda folder: (folder / WEIGHTS_FILE).unlink(), "does not exist"),
    "truncated weights": ("topk", lambda folder: truncate(folder / WEIGHTS_FILE), "cannot be read"),
    "empty weights": ("topk", lambda folder: (folder / WEIGHTS_FILE).write_bytes(b""), "cannot be read"),
    "a pickle": ("topk", lambda folder: torch.save({"W_enc": torch.ones(1)}, folder / WEIGHTS_FILE), "cannot be read"),
    "truncated configuration": ("topk", lambda folder: truncate(folder / CONFIG_FILE), "is not JSON"),
    "a list": ("topk", lambda folder: (folder / CONFIG_FILE).write_text("[]"), "not the configuration"),
    "an unknown architecture": (
        "jumprelu", lambda folder: change_config(folder, architecture="magic"), "no SAE architecture 'magic'"
    ),
    "a transcoder": (
        "jumprelu", lambda folder: change_config(folder, architecture="transcoder"), "d_out is missing"
    ),
    "another architecture": ("topk", lambda folder: change_config(folder, architecture="jumprelu"), "tensor threshold"),
    "another architecture's weights": (
        "jumprelu", lambda folder: change_config(folder, architecture="gated"), "no tensor b_gate"
    ),
    "weights that would be ignored": (
        "jumprelu", lambda folder: change_config(folder, architecture="standard"),
        "a tensor threshold that is not part of",
    ),
    "foreign": ("topk", lambda folder: save_file({"w": torch.ones(2)}, folder / WEIGHTS_FILE), "has no tensor W_enc"),
    "unknown normalisation": ("topk", lambda folder: change_config(folder, normalize_activations="magic"), "'magic'"),
    "split by head": ("topk", lambda folder: change_config(folder, reshape_activations="hook_z"), "'hook_z'"),
    "no boolean": (
        "topk", lambda folder: change_config(folder, apply_b_dec_to_input="no"),
        "apply_b_dec_to_input: Input should be a valid boolean (got 'no')",
    ),
    "no site": ("topk", lambda folder: change_config(folder, metadata={}), "hook_name is missing"),
    "no k": ("topk", lambda folder: change_config(folder, k=None), "k: Input should be a valid integer (got None)"),
    "k of zero": ("topk", lambda folder: change_config(folder, k=0), "k: Input should be greater than or equal to 1"),
    "k above d_sae": ("topk", lambda folder: change_config(folder, k=65), "only 64 features"),
    "another width": ("topk", lambda folder: change_config(folder, d_in=17), "asks for [17, 64]"),
    "integers": ("topk", lambda folder: change_weights(folder, b_dec=torch.ones(D_IN, dtype=torch.long)), "int64"),
    "not finite": (
        "jumprelu", lambda folder: change_weights(folder, threshold=torch.full((D_SAE,), torch.nan)),
        "threshold has values that are not finite",
    ),
    "fine-tuned": (
        "topk", lambda folder: change_weights(folder, scaling_factor=torch.full((D_SAE,), 1.1)), "scaling_factor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_folder_gives_one_clear_line(damage: str, tmp_path: Path) -> None:
    architecture, spoil, message = DAMAGES[damage]
    built(architecture).save_model(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        load_dictionary(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
