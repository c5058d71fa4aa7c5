"""Ablation against a slow, obvious oracle straight from the definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_dictionary
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import PromptRuns
from sfc.core.config import ActivationsConfig
from sfc.core.errors import UserError
from sfc.core.sites import kind_of
from sfc.data.render import Role, TokenizedPrompt, tokenize_prompts
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.interventions import recorder
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore

MODES = ("node", "keep-current", "keep-clean", "ablate")


def oracle_scores(
    model: Model,
    score: RefusalScore,
    ablation: Ablation,
    prompts: list[TokenizedPrompt],
    layout: TemplateLayout,
    mask: Tensor,
) -> np.ndarray:
    """One prompt at a time, one token at a time, dense: `x <- x_hat(m f + (1 - m) f_ref) + error`."""
    masks = ablation.nodes.split(mask)
    scores = []
    for prompt in prompts:
        template_positions = layout.template_positions(prompt)
        batch = make_batches([prompt], layout, 1, model.device)[0]
        clean: dict[str, Tensor] = {}
        with torch.no_grad():
            last_logits(model, batch, {site: recorder(clean, site) for site in masks})

        def hook(site: str, template_positions: np.ndarray = template_positions, clean: dict[str, Tensor] = clean):
            def act(activation: Tensor) -> Tensor:
                dictionary, m = ablation.dictionaries[site], masks[site]
                result = activation.clone()
                for position in range(1, len(template_positions)):
                    x, place = activation[0, position], template_positions[position]
                    f, f_ref = dictionary.encode(x), ablation.baseline.features[site][place]
                    error, error_ref = x - dictionary.decode(f), ablation.baseline.errors[site][place]
                    if ablation.error_mode == "keep-clean":
                        error_ref = clean[site][0, position]
                        error_ref = error_ref - dictionary.decode(dictionary.encode(error_ref))
                    m_error = {"node": m[-1], "keep-current": 1.0}.get(ablation.error_mode, 0.0)
                    mixed = dictionary.decode(m[:-1] * f + (1 - m[:-1]) * f_ref)
                    result[0, position] = mixed + m_error * error + (1 - m_error) * error_ref
                return result

            return act

        with torch.no_grad():
            scores.append(float(score(last_logits(model, batch, {site: hook(site) for site in masks}))))
    return np.array(scores)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_packed_circuits_agree_with_the_oracle(
    model: Model, score: RefusalScore, ablation: Ablation, prompts: list[TokenizedPrompt], layout: TemplateLayout,
    batches: list[Batch], mode: str, share: float,
) -> None:  # fmt: skip
    ablation = replace(ablation, error_mode=mode)
    keep = np.random.default_rng(1).random((3, ablation.nodes.n_nodes)) < share
    runs = PromptRuns.of(model, batches, ablation.nodes.sites[0])
    fast = ablated_scores(model, score, ablation, runs, keep)
    for row, mask in zip(fast, keep, strict=True):
        slow = oracle_scores(model, score, ablation, prompts, layout, torch.from_numpy(mask).float())
        np.testing.assert_allclose(row, slow, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_sites_of_several_kinds_agree_with_the_oracle(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], layout: TemplateLayout, batches: list[Batch],
    mode: str,
) -> None:  # fmt: skip
    sites = ActivationsConfig(kind=["resid_post", "attn_out", "mlp_out"], layers=[0, 1]).sites
    assert [kind_of(site) for site in sites] == ["attn_out", "mlp_out", "resid_post"] * 2
    dictionaries = {site: random_dictionary(site, seed=number) for number, site in enumerate(sites)}
    baseline = mean_baseline(model, dictionaries, batches, layout)
    ablation = Ablation(Nodes.of_spaces(dictionaries), dictionaries, baseline, mode)
    keep = np.random.default_rng(1).random((3, ablation.nodes.n_nodes)) < 0.5
    fast = ablated_scores(model, score, ablation, PromptRuns.of(model, batches, sites[0]), keep)
    for row, mask in zip(fast, keep, strict=True):
        slow = oracle_scores(model, score, ablation, prompts, layout, torch.from_numpy(mask).float())
        np.testing.assert_allclose(row, slow, atol=1e-4)


def test_clean_errors_are_never_those_of_another_batch(ablation: Ablation, batches: list[Batch]) -> None:
    nothing = torch.zeros(1, ablation.nodes.n_nodes)
    with pytest.raises(ValueError, match="for_batch"):
        replace(ablation, error_mode="keep-clean").interventions(nothing, batches[0].prompts * 0, batches[0])


def test_masks_between_0_and_1_agree_with_the_oracle(
    model: Model, score: RefusalScore, ablation: Ablation, prompts: list[TokenizedPrompt], layout: TemplateLayout
) -> None:
    mask = torch.rand(ablation.nodes.n_nodes, generator=torch.Generator().manual_seed(2))
    batch = make_batches(prompts, layout, 10_000, model.device)[0]
    interventions = ablation.interventions(mask[None], torch.zeros_like(batch.lengths), batch)
    with torch.no_grad():
        fast = score(last_logits(model, batch, interventions)).numpy()
    slow = oracle_scores(model, score, ablation, [prompts[int(i)] for i in batch.prompts], layout, mask)
    np.testing.assert_allclose(fast, slow, atol=1e-4)


def test_ablating_nothing_changes_nothing(
    model: Model, score: RefusalScore, ablation: Ablation, batches: list[Batch]
) -> None:
    runs = PromptRuns.of(model, batches, ablation.nodes.sites[0])
    everything = np.ones((1, ablation.nodes.n_nodes), dtype=bool)
    kept = ablated_scores(model, score, ablation, runs, everything)[0]
    np.testing.assert_allclose(kept, full_scores(model, score, runs), atol=1e-4)


def test_with_everything_ablated_the_score_is_that_of_the_last_sites_baseline(
    model: Model, score: RefusalScore, ablation: Ablation, batches: list[Batch]
) -> None:
    """F(0) by hand: nothing but the baseline of the last site's last place reaches the final norm."""
    runs = PromptRuns.of(model, batches, ablation.nodes.sites[0])
    nothing = np.zeros((1, ablation.nodes.n_nodes), dtype=bool)
    fast = ablated_scores(model, score, ablation, runs, nothing)[0]
    site = ablation.nodes.sites[-1]
    x = ablation.dictionaries[site].decode(ablation.baseline.features[site][-1]) + ablation.baseline.errors[site][-1]
    with torch.no_grad():
        logits = model.hf.lm_head(model.hf.base_model.norm(x[None, None]))[0]
    np.testing.assert_allclose(fast, float(score(logits)), atol=1e-5)


def test_each_row_of_a_batch_runs_with_its_own_circuit(
    model: Model, score: RefusalScore, ablation: Ablation, batches: list[Batch]
) -> None:
    batch = batches[0]
    masks = torch.rand(2, ablation.nodes.n_nodes, generator=torch.Generator().manual_seed(5))
    circuit = torch.arange(len(batch.lengths)) % 2
    with torch.no_grad():
        mixed = score(last_logits(model, batch, ablation.interventions(masks, circuit, batch)))
        for number in (0, 1):
            alone = torch.full_like(circuit, number)
            whole = score(last_logits(model, batch, ablation.interventions(masks, alone, batch)))
            torch.testing.assert_close(mixed[circuit == number], whole[circuit == number], atol=1e-5, rtol=1e-5)


def test_padding_and_the_first_token_are_never_touched(model: Model, ablation: Ablation, batches: list[Batch]) -> None:
    batch = batches[-1]
    nothing = torch.zeros(1, ablation.nodes.n_nodes)
    interventions = ablation.interventions(nothing, torch.zeros_like(batch.lengths), batch)
    x = torch.randn(*batch.ids.shape, 32, generator=torch.Generator().manual_seed(3))
    for act in interventions.values():
        replaced = act(x)
        assert replaced is not None
        assert torch.equal(replaced[~batch.touchable], x[~batch.touchable])
        assert not torch.isclose(replaced, x).all(-1)[batch.touchable].any()


def test_the_mask_is_differentiable(
    model: Model, score: RefusalScore, ablation: Ablation, batches: list[Batch]
) -> None:
    batch = batches[0]

    def scored(mask: Tensor) -> Tensor:
        interventions = ablation.interventions(mask[None], torch.zeros_like(batch.lengths), batch)
        return score(last_logits(model, batch, interventions)).sum()

    mask = torch.full((ablation.nodes.n_nodes,), 0.6, requires_grad=True)
    (gradient,) = torch.autograd.grad(scored(mask), mask)
    direction = torch.randn(len(mask), generator=torch.Generator().manual_seed(4))
    step = 1e-3 * direction
    with torch.no_grad():
        difference = (scored(mask + step) - scored(mask - step)).item()
    assert difference == pytest.approx(2 * (gradient @ step).item(), rel=0.05, abs=1e-4)


def test_references_are_means_within_prompts_first(
    model: Model, ablation: Ablation, prompts: list[TokenizedPrompt], layout: TemplateLayout
) -> None:
    site = ablation.nodes.sites[1]
    dictionary = ablation.dictionaries[site]
    per_position: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for prompt in prompts[:4]:
        kept: list[Tensor] = []
        batch = make_batches([prompt], layout, 1, model.device)[0]
        with torch.no_grad():
            last_logits(model, batch, {site: kept.append})
        template_positions = layout.template_positions(prompt)
        for place in set(template_positions.tolist()):
            x = kept[0][0][torch.from_numpy(template_positions == place)]
            f = dictionary.encode(x)
            per_position.setdefault(place, []).append((f.mean(0), (x - dictionary.decode(f)).mean(0)))
    for place, means in per_position.items():
        features, errors = (torch.stack(part).mean(0) for part in zip(*means, strict=True))
        torch.testing.assert_close(ablation.baseline.features[site][place], features, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ablation.baseline.errors[site][place], errors, atol=1e-5, rtol=1e-4)


def test_a_reference_that_misses_a_position_of_the_template_is_an_error(
    model: Model, ablation: Ablation, prompts: list[TokenizedPrompt], layout: TemplateLayout
) -> None:
    wider = TemplateLayout(layout.n_prefix, layout.n_suffix + 1)
    with pytest.raises(UserError, match="reference prompts"):
        mean_baseline(model, ablation.dictionaries, make_batches(prompts, wider, 500, model.device), wider)


def test_node_names_and_numbers_are_inverse() -> None:
    nodes = Nodes.of({"blocks.0.hook_resid_post": 3, "blocks.5.hook_mlp_out": 2})
    names = [nodes.name(i) for i in range(nodes.n_nodes)]
    assert names == ["resid_post.0/F0", "resid_post.0/F1", "resid_post.0/F2", "resid_post.0/error",
                     "mlp_out.5/F0", "mlp_out.5/F1", "mlp_out.5/error"]  # fmt: skip
    assert [nodes.number(name) for name in names] == list(range(nodes.n_nodes))
    assert nodes.is_error.tolist() == [False, False, False, True, False, False, True]
    for wrong in ("resid_post.0/F3", "resid_post.1/F0", "mlp_out.5/F2", "nonsense", "resid_post.0/F-1"):
        with pytest.raises(UserError, match="no node"):
            nodes.number(wrong)


def test_the_attention_sink_is_no_part_of_the_contents_mean(model: Model, ablation: Ablation) -> None:
    """Where a template has no prefix, the first token is content, and still not pooled with the others."""
    prompts = tokenize_prompts(model.tokenizer, ["Bake bread?", "No."], "{prompt} A:")
    layout = TemplateLayout.of(prompts)
    assert layout.n_prefix == 0
    site = ablation.nodes.sites[0]
    batches = make_batches(prompts, layout, 99, model.device)
    baseline = mean_baseline(model, {site: ablation.dictionaries[site]}, batches, layout)
    means = []
    for prompt in prompts:
        kept: list[Tensor] = []
        with torch.no_grad():
            last_logits(model, make_batches([prompt], layout, 1, model.device)[0], {site: kept.append})
        content = np.flatnonzero(prompt.roles == Role.CONTENT)
        means.append(kept[0][0, content[content > 0]].mean(0))
    x_ref = ablation.dictionaries[site].decode(baseline.features[site][0]) + baseline.errors[site][0]
    torch.testing.assert_close(x_ref, torch.stack(means).mean(0), atol=1e-5, rtol=1e-4)
