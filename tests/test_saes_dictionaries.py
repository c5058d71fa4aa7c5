"""Laws of dictionaries with thresholds and normalisations: gradients, rows without features, ablation, attribution."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.methods.attribution import attributed_effects
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem
from sfc.models.batches import Batch, TemplateLayout
from sfc.models.running import last_logits
from sfc.saes.dictionary import Dictionary, JumpReLUDictionary, NormalisedDictionary, TopKDictionary

D_IN, D_SAE, SITE = 16, 64, "blocks.3.hook_resid_post"


def rows(*shape: int) -> Tensor:
    """Activations of many norms, around a mean that is not zero."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, D_IN, generator=random) * torch.randn(*shape, 1, generator=random).exp()
    return x + torch.randn(*shape, 1, generator=random)


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
    request: pytest.FixtureRequest, problem: Problem, batches: list[Batch], layout: TemplateLayout
) -> Problem:
    """The problem with foreign dictionaries in place of its own."""
    sites = problem.ablation.nodes.sites
    dictionaries = {site: foreign(request.param, i, problem.model.d_model, site) for i, site in enumerate(sites)}
    baseline = mean_baseline(problem.model, dictionaries, batches[:2], layout)
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()})
    return replace(problem, ablation=Ablation(nodes, dictionaries, baseline, "node"))


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
        Nodes.of({site: ablation.dictionaries[site].d_sae}), ablation.dictionaries, ablation.baseline, "node"
    )
    keep = np.random.default_rng(0).random(alone.nodes.n_nodes) < 0.5
    m, m_error = torch.from_numpy(keep[:-1]).float(), float(keep[-1])
    dictionary, runs = ablation.dictionaries[site], foreign_problem.runs
    fast = scores_with(replace(foreign_problem, ablation=alone), keep)
    for batch in runs.batches:

        def oracle(x: Tensor, batch: Batch = batch) -> Tensor:
            template_positions = batch.template_positions.clamp(min=0)
            f, f_ref = dictionary.encode(x), ablation.baseline.features[site][template_positions]
            error, error_ref = x - dictionary.decode(f), ablation.baseline.errors[site][template_positions]
            replaced = dictionary.decode(m * f + (1 - m) * f_ref) + m_error * error + (1 - m_error) * error_ref
            return torch.where(batch.touchable[..., None], replaced, x)

        with torch.no_grad():
            slow = foreign_problem.score(last_logits(model, batch, {site: oracle}))
        np.testing.assert_allclose(fast[batch.prompts.numpy()], slow.numpy(), atol=1e-4)


def test_law_effects_of_a_site_sum_to_the_first_order_effect_of_its_activation(foreign_problem: Problem) -> None:
    model, score, ablation = foreign_problem.model, foreign_problem.score, foreign_problem.ablation
    site = ablation.nodes.sites[-1]
    x_ref = ablation.dictionaries[site].decode(ablation.baseline.features[site]) + ablation.baseline.errors[site]
    for batch, prefix in foreign_problem.runs:
        kept: list[Tensor] = []

        def keep(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.detach().requires_grad_())
            return kept[0]

        score(last_logits(model, batch, {site: keep})).sum().backward()
        x, g = kept[0].detach(), kept[0].grad
        moved = (g * (x - x_ref[batch.template_positions.clamp(min=0)])).sum(-1) * batch.touchable
        effects = ablation.nodes.split(attributed_effects(foreign_problem, batch, prefix).by_prompt)[site]
        torch.testing.assert_close(effects.sum(1), moved.sum(1), atol=1e-5, rtol=1e-3)
