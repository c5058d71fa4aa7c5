"""Dictionaries that SAELens wrote, of every architecture and input normalisation, against SAELens itself."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_reference
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.methods.attribution import attributed_effects
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.models.batches import Batch, SlotLayout
from sfc.models.running import last_logits
from sfc.saes.dictionary import Dictionary, JumpReLUDictionary, NormalisedDictionary, TopKDictionary
from sfc.saes.format import CONFIG_FILE, WEIGHTS_FILE, load_dictionary

D_IN, D_SAE, SITE = 16, 64, "blocks.3.hook_resid_post"
NORMALISATIONS = (
    "none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm"
)  # fmt: skip


def rows(*shape: int) -> Tensor:
    """Activations of many norms, around a mean that is not zero."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, D_IN, generator=random) * torch.randn(*shape, 1, generator=random).exp()
    return x + torch.randn(*shape, 1, generator=random)


def built(architecture: str, **settings: Any) -> Any:
    """A dictionary of SAELens' own with random weights; thresholds and gates of both signs."""
    from sae_lens import SAE

    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "metadata": {"hook_name": SITE}, **settings}
    sae = SAE.from_dict({**config, "k": 5} if architecture == "topk" else config)
    random = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return sae


def expected_scale(x: Tensor, normalisation: str) -> Tensor | float:
    if normalisation == "layer_norm":
        return x.std(-1, keepdim=True)
    return x.norm(dim=-1, keepdim=True) / D_IN**0.5 if normalisation == "constant_norm_rescale" else 1.0


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False], ids=["b_dec subtracted", "b_dec not subtracted"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
def test_features_and_reconstructions_are_those_of_saelens(
    architecture: str, normalisation: str, apply_b_dec_to_input: bool, tmp_path: Path
) -> None:
    """Where the normalisation depends on the row, our feature values are SAELens' times the row's scale."""
    from sae_lens import SAE

    settings = {"normalize_activations": normalisation, "apply_b_dec_to_input": apply_b_dec_to_input}
    built(architecture, **settings).save_model(tmp_path)
    ours, theirs, x = load_dictionary(tmp_path), SAE.load_from_disk(tmp_path), rows(5, 20)
    with torch.no_grad():
        f = theirs.encode(x)
        x_hat = theirs.decode(f)
    assert 0.02 < (f > 0).float().mean() < 0.7
    encoded = ours.encode(x)
    torch.testing.assert_close(encoded[..., :D_SAE], f * expected_scale(x, normalisation), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(encoded), x_hat, atol=1e-5, rtol=1e-5)
    values, indices = ours.encode_sparse(x.flatten(0, 1))
    dense = torch.zeros(100, ours.d_sae).scatter_add(1, indices, values)
    torch.testing.assert_close(dense, encoded.flatten(0, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.decode_sparse(values, indices), x_hat.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert isinstance(ours, Dictionary) and (ours.site, ours.d_in) == (SITE, D_IN)


def test_features_rescaled_by_decoder_norms_are_those_of_saelens(tmp_path: Path) -> None:
    from sae_lens import SAE

    built("topk", rescale_acts_by_decoder_norm=True, normalize_activations="layer_norm").save_model(tmp_path)
    ours, theirs, x = load_dictionary(tmp_path), SAE.load_from_disk(tmp_path), rows(50)
    f = theirs.encode(x)
    torch.testing.assert_close(ours.encode(x)[:, :D_SAE], f * x.std(-1, keepdim=True), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(f), atol=1e-5, rtol=1e-5)


def test_a_batch_top_k_sae_is_read_as_the_jumprelu_sae_it_is_saved_as(tmp_path: Path) -> None:
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=SITE)
    trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=5, metadata=metadata))
    trained.topk_threshold.fill_(0.4)
    trained.save_inference_model(tmp_path)
    x = rows(50)
    ours, f = load_dictionary(tmp_path), SAE.load_from_disk(tmp_path).encode(x)
    assert isinstance(ours, JumpReLUDictionary)
    assert f[f > 0].min() > 0.4
    torch.testing.assert_close(ours.encode(x), f, atol=1e-5, rtol=1e-5)


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


def foreign(normalisation: str | None, seed: int = 0, d_in: int = D_IN, site: str = SITE) -> Dictionary:
    """A JumpReLU dictionary, behind a normalisation if one is named."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "W_enc": (d_in, D_SAE),
        "b_enc": (D_SAE,),
        "threshold": (D_SAE,),
        "W_dec": (D_SAE, d_in),
        "b_dec": (d_in,),
    }
    weights = {name: 0.3 * torch.randn(*shape, generator=random) for name, shape in shapes.items()}
    inner = JumpReLUDictionary(weights, site=site)
    return inner if normalisation is None else NormalisedDictionary(inner, normalisation)  # pyright: ignore


@pytest.mark.parametrize("normalisation", [None, "constant_norm_rescale", "layer_norm"])
def test_sparse_gradients_are_those_of_dense_autograd(normalisation: str | None) -> None:
    dictionary = foreign(normalisation).double()  # pyright: ignore[reportAttributeAccessIssue]
    x = rows(30).double().requires_grad_()
    outputs = dictionary.decode(dictionary.encode(x)), dictionary.decode_sparse(*dictionary.encode_sparse(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(output.pow(3).sum(), x)[0] for output in outputs))


@pytest.mark.parametrize("normalisation", [None, "constant_norm_rescale", "layer_norm"])
def test_rows_without_features_and_no_rows_at_all(normalisation: str | None) -> None:
    dictionary = foreign(normalisation)
    for x in (torch.zeros(2, D_IN), torch.zeros(0, D_IN)):
        values, indices = dictionary.encode_sparse(x)
        assert values.shape == indices.shape and len(values) == len(x)
        torch.testing.assert_close(dictionary.decode_sparse(values, indices), dictionary.decode(dictionary.encode(x)))
        assert dictionary.encode(x).isfinite().all()


def test_a_row_of_zeros_has_no_norm_to_divide_by_and_stays_finite() -> None:
    inner = TopKDictionary(foreign(None).state_dict(), k=5, site=SITE)  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.zeros(1, D_IN)
    dictionary = NormalisedDictionary(inner, "constant_norm_rescale")
    torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), x)


def test_the_features_of_the_row_are_its_scale_and_the_two_signs_of_its_mean() -> None:
    x = torch.tensor([[1.0, 3.0] * 8, [-3.0, -5.0] * 8])
    of_the_row = foreign("layer_norm").encode(x)[:, D_SAE:]
    std = (16 / 15) ** 0.5
    torch.testing.assert_close(of_the_row, torch.tensor([[std, 2.0, 0.0], [std, 0.0, 4.0]]))
    of_the_row = foreign("constant_norm_rescale").encode(x)[:, D_SAE:]
    torch.testing.assert_close(of_the_row, torch.tensor([[5.0**0.5], [17.0**0.5]]))


@pytest.fixture(params=[None, "constant_norm_rescale", "layer_norm"])
def foreign_problem(
    request: pytest.FixtureRequest, problem: Problem, batches: list[Batch], layout: SlotLayout
) -> Problem:
    """The problem with foreign dictionaries in place of its own."""
    sites = problem.ablation.nodes.sites
    dictionaries = {site: foreign(request.param, i, problem.model.d_model, site) for i, site in enumerate(sites)}
    reference = mean_reference(problem.model, dictionaries, batches[:2], layout)
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()})
    return replace(problem, ablation=Ablation(nodes, dictionaries, reference, "node"))


def scores_with(problem: Problem, keep: np.ndarray) -> np.ndarray:
    return ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, keep[None])[0]


def test_law_keeping_every_node_changes_nothing(foreign_problem: Problem) -> None:
    kept = scores_with(foreign_problem, np.ones(foreign_problem.ablation.nodes.n_nodes, dtype=bool))
    full = full_scores(foreign_problem.model, foreign_problem.score, foreign_problem.runs)
    np.testing.assert_allclose(kept, full, atol=1e-4)


def test_ablation_follows_its_definition(foreign_problem: Problem) -> None:
    """The last site alone, half of its nodes kept: `x <- x_hat(m f + (1 - m) f_ref) + error`, densely."""
    ablation, model = foreign_problem.ablation, foreign_problem.model
    site = ablation.nodes.sites[-1]
    alone = Ablation(
        Nodes.of({site: ablation.dictionaries[site].d_sae}), ablation.dictionaries, ablation.reference, "node"
    )
    keep = np.random.default_rng(0).random(alone.nodes.n_nodes) < 0.5
    m, m_error = torch.from_numpy(keep[:-1]).float(), float(keep[-1])
    dictionary, runs = ablation.dictionaries[site], foreign_problem.runs
    fast = scores_with(replace(foreign_problem, ablation=alone), keep)
    for batch in runs.batches:

        def oracle(x: Tensor, batch: Batch = batch) -> Tensor:
            slots = batch.slots.clamp(min=0)
            f, f_ref = dictionary.encode(x), ablation.reference.features[site][slots]
            error, error_ref = x - dictionary.decode(f), ablation.reference.errors[site][slots]
            replaced = dictionary.decode(m * f + (1 - m) * f_ref) + m_error * error + (1 - m_error) * error_ref
            return torch.where(batch.touchable[..., None], replaced, x)

        with torch.no_grad():
            slow = foreign_problem.score(last_logits(model, batch, {site: oracle}))
        np.testing.assert_allclose(fast[batch.prompts.numpy()], slow.numpy(), atol=1e-4)


def test_law_effects_of_a_site_sum_to_the_first_order_effect_of_its_activation(foreign_problem: Problem) -> None:
    model, score, ablation = foreign_problem.model, foreign_problem.score, foreign_problem.ablation
    site = ablation.nodes.sites[-1]
    x_ref = ablation.dictionaries[site].decode(ablation.reference.features[site]) + ablation.reference.errors[site]
    for batch, prefix in foreign_problem.runs:
        kept: list[Tensor] = []

        def keep(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.detach().requires_grad_())
            return kept[0]

        score(last_logits(model, batch, {site: keep})).sum().backward()
        x, g = kept[0].detach(), kept[0].grad
        moved = (g * (x - x_ref[batch.slots.clamp(min=0)])).sum(-1) * batch.touchable
        effects = ablation.nodes.split(attributed_effects(foreign_problem, batch, prefix).by_prompt)[site]
        torch.testing.assert_close(effects.sum(1), moved.sum(1), atol=1e-5, rtol=1e-3)


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))


def change_weights(folder: Path, **tensors: Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS_FILE), **tensors}, folder / WEIGHTS_FILE)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "signed features": (lambda folder: change_config(folder, architecture="abstopk"), "architecture is 'abstopk'"),
    "a transcoder": (lambda folder: change_config(folder, architecture="transcoder"), "'transcoder'; supported: topk"),
    "split by head": (lambda folder: change_config(folder, reshape_activations="hook_z"), "'hook_z'"),
    "an unknown normalisation": (lambda folder: change_config(folder, normalize_activations="batch"), "'batch'"),
    "no boolean": (lambda folder: change_config(folder, apply_b_dec_to_input="no"), "must be true or false"),
    "another architecture's weights": (lambda folder: change_config(folder, architecture="gated"), "no tensor b_gate"),
    "weights that would be ignored": (
        lambda folder: change_config(folder, architecture="standard"), "a tensor threshold that is not part of"
    ),
    "fine-tuned": (lambda folder: change_weights(folder, scaling_factor=torch.full((D_SAE,), 1.1)), "scaling_factor"),
    "thresholds that are not numbers": (
        lambda folder: change_weights(folder, threshold=torch.full((D_SAE,), torch.nan)), "threshold has values"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    built("jumprelu").save_model(tmp_path)
    spoil, message = REFUSED[case]
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        load_dictionary(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_plain_top_k_dictionary_stays_what_it_is(tmp_path: Path) -> None:
    built("topk").save_model(tmp_path)
    assert isinstance(load_dictionary(tmp_path), TopKDictionary)
