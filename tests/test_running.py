"""Runs: from the start, from a cached residual stream, batched and one by one, with and without interventions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfc.core.errors import UserError
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.interventions import intervening, recorder
from sfc.models.loading import Model
from sfc.models.running import cached_residual_after, last_logits, losses_and_last_logits, run_to
from sfc.models.score import RefusalScore, auroc, score_batch, score_prompts


def _hf_logits(model: Model, prompt: TokenizedPrompt) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(torch.tensor(prompt.ids)[None]).logits[0]


def test_batched_logits_are_those_of_the_plain_model_one_by_one(
    model: Model, prompts: list[TokenizedPrompt], batches: list[Batch]
) -> None:
    assert len(batches) > 1
    assert sorted(int(i) for batch in batches for i in batch.prompts) == list(range(len(prompts)))
    for batch in batches:
        for row, logits in zip(batch.prompts, last_logits(model, batch), strict=True):
            torch.testing.assert_close(logits, _hf_logits(model, prompts[int(row)])[-1], atol=1e-5, rtol=1e-5)


@given(st.permutations(range(6)), st.integers(1, 200))
def test_scores_do_not_depend_on_how_prompts_are_batched(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], layout: TemplateLayout, batches: list[Batch],
    order: list[int], batch_tokens: int,
) -> None:  # fmt: skip
    others = make_batches([prompts[i] for i in order], layout, batch_tokens, model.device)
    assert all(batch.ids.numel() <= max(batch_tokens, batch.ids.shape[1]) for batch in others)
    permuted = score_prompts(model, score, others)
    np.testing.assert_allclose(permuted, score_prompts(model, score, batches)[order], atol=1e-5)


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_a_run_from_a_cached_residual_stream_is_exact(model: Model, batches: list[Batch], layer: int) -> None:
    for batch in batches:
        full = last_logits(model, batch)
        cached = cached_residual_after(model, batch, layer)
        assert torch.equal(last_logits(model, batch, cached=cached), full)
        assert torch.equal(last_logits(model, batch), full), "the model is left as it was"


def test_a_run_goes_on_from_a_prefix_to_a_later_layer_or_site(model: Model, batches: list[Batch]) -> None:
    sites = [f"blocks.{layer}.hook_{kind}" for layer in (0, 1) for kind in ("mlp_out", "resid_post")]
    for batch in batches:
        full: dict[str, torch.Tensor] = {}
        run_to(model, batch, {site: recorder(full, site) for site in sites}, sites[-1])
        for layer in (-1, 0, 1):
            start = cached_residual_after(model, batch, layer)
            seen: dict[str, torch.Tensor] = {}
            run_to(model, batch, {sites[-1]: recorder(seen, sites[-1])}, sites[-1], start)
            assert torch.equal(seen[sites[-1]], full[sites[-1]])
            assert torch.equal(cached_residual_after(model, batch, 1, start).residual, full[sites[-1]])
        with pytest.raises(ValueError, match="after block 1 does not pass block 0"):
            cached_residual_after(model, batch, 0, cached_residual_after(model, batch, 1))


def test_selected_and_repeated_rows_of_a_run_stay_exact(model: Model, batches: list[Batch]) -> None:
    batch, rows = batches[0], torch.tensor([2, 0])
    full = last_logits(model, batch)
    for layer in (-1, 0):
        cached = cached_residual_after(model, batch, layer)
        selected = last_logits(model, batch.select(rows), cached=cached.select(rows))
        torch.testing.assert_close(selected, full[rows], atol=1e-6, rtol=1e-6)
        repeated = last_logits(model, batch.repeat(2), cached=cached.repeat(2))
        torch.testing.assert_close(repeated, full.repeat(2, 1), atol=1e-6, rtol=1e-6)


def test_an_intervention_at_the_cached_site_acts_as_in_a_full_run(model: Model, batches: list[Batch]) -> None:
    double = {"blocks.0.hook_resid_post": lambda x: 2 * x}
    batch = batches[0]
    full = last_logits(model, batch, double)
    assert torch.equal(last_logits(model, batch, double, cached_residual_after(model, batch, 0)), full)
    assert not torch.allclose(full, last_logits(model, batch))


def test_interventions_act_inside_the_block_only_even_after_an_error(model: Model, batches: list[Batch]) -> None:
    batch, plain = batches[0], last_logits(model, batches[0])
    with pytest.raises(RuntimeError, match="stop here"), intervening(model, {"blocks.0.hook_resid_post": _raise}):
        last_logits(model, batch)
    assert torch.equal(last_logits(model, batch), plain)
    assert torch.equal(last_logits(model, batch, {"blocks.1.hook_resid_post": lambda x: x.clone()}), plain)


def test_runs_outside_need_no_gradients(model: Model, batches: list[Batch]) -> None:
    assert not last_logits(model, batches[0]).requires_grad


def _raise(_: torch.Tensor) -> None:
    raise RuntimeError("stop here")


def test_run_to_goes_no_further_than_the_last_site(model: Model, batches: list[Batch]) -> None:
    seen: dict[str, torch.Tensor] = {}
    sites = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    run_to(model, batches[0], {site: recorder(seen, site) for site in sites}, sites[0])
    assert list(seen) == [sites[0]]


def test_unknown_sites_are_named(model: Model) -> None:
    with (
        pytest.raises(UserError, match=r"blocks\.9.*layers 0 to 1"),
        intervening(model, {"blocks.9.hook_resid_post": _raise}),
    ):
        pass


def test_next_token_losses_are_the_models_own(
    model: Model, prompts: list[TokenizedPrompt], batches: list[Batch]
) -> None:
    for batch in batches:
        expected = []
        for row in batch.prompts.tolist():
            log_p = _hf_logits(model, prompts[row])[:-1].log_softmax(-1)
            expected.append(-log_p[torch.arange(len(log_p)), torch.tensor(prompts[row].ids[1:])])
        for cached in (None, cached_residual_after(model, batch, 0)):
            losses, logits = losses_and_last_logits(model, batch, cached=cached)
            torch.testing.assert_close(losses, torch.cat(expected), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(logits, last_logits(model, batch), atol=1e-5, rtol=1e-5)


def test_the_refusal_score_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.5]], requires_grad=True)
    p = logits.detach().softmax(-1)[0]
    log_odds = RefusalScore(torch.tensor([1, 3]), torch.tensor([], dtype=torch.long))(logits)
    assert log_odds.item() == pytest.approx(((p[1] + p[3]) / (p[0] + p[2])).log().item())
    difference = RefusalScore(torch.tensor([2]), torch.tensor([0]))(logits)
    assert difference.item() == pytest.approx(2.0)
    log_odds.sum().backward()
    assert logits.grad is not None and logits.grad[0, 1] > 0 > logits.grad[0, 2]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True), st.integers(0, 999))
def test_the_score_is_the_log_odds_and_its_gradient_that_of_finite_differences(tokens: list[int], seed: int) -> None:
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    score = RefusalScore(torch.tensor(tokens), torch.tensor([], dtype=torch.long))
    p = float(logits.detach().softmax(-1)[0, tokens].sum())
    assert score(logits).item() == pytest.approx(np.log(p / (1 - p)))
    assert torch.autograd.gradcheck(score, (logits,))


def test_a_refusal_token_must_be_one_token(model: Model) -> None:
    config = model.config.model_copy(update={"refusal_tokens": ["Sorry"]})
    with pytest.raises(UserError, match="'Sorry' is 5 tokens"):
        RefusalScore.of(replace(model, config=config))


def test_score_prompts_keeps_the_order_of_the_list(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], layout: TemplateLayout, batches: list[Batch]
) -> None:
    one_by_one = [
        score_batch(model, score, b)[0].item() for p in prompts for b in make_batches([p], layout, 1, model.device)
    ]
    np.testing.assert_allclose(score_prompts(model, score, batches), one_by_one, atol=1e-5)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    positive = [score for score, label in rows if label]
    negative = [score for score, label in rows if not label]
    value = auroc(np.array([score for score, _ in rows], dtype=float), np.array([label for _, label in rows]))
    if not positive or not negative:
        assert value is None
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert value == pytest.approx(wins / len(positive) / len(negative))
