"""KVCachedSuffix: runs of the last tokens alone agree with runs of the whole prompts, on every architecture."""

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, random_model

from sfc.core.config import ModelConfig
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import NO_POSITION, Batch, TemplateLayout, cache_suffixes, flush_right, make_batches
from sfc.models.interventions import recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import cached_residual_after, last_logits


def _whole(model: Model, prompts: list[TokenizedPrompt]) -> Batch:
    """All prompts in one right-padded batch, in the order of the list."""
    batch = make_batches(prompts, TemplateLayout.of(prompts), 10_000, model.device)[0]
    return batch.select(torch.argsort(batch.prompts))


@pytest.mark.parametrize("n_suffix", [1, 4, 9, 60])
def test_the_logits_of_tails_are_those_of_the_prompts(
    model: Model, prompts: list[TokenizedPrompt], n_suffix: int
) -> None:
    suffixes, whole = cache_suffixes(model, prompts, n_suffix), _whole(model, prompts)
    expected = last_logits(model, whole)
    assert suffixes.ids.shape[1] == n_suffix
    torch.testing.assert_close(last_logits(model, suffixes), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last_logits(model, suffixes), expected, atol=1e-5, rtol=1e-5)  # a run leaves no trace
    cached = None
    for layer in range(-1, model.n_layers):
        cached = cached_residual_after(model, suffixes, layer, cached)
        assert torch.equal(cached.residual, cached_residual_after(model, suffixes, layer).residual)
        torch.testing.assert_close(last_logits(model, suffixes, cached=cached), expected, atol=1e-5, rtol=1e-5)
        rows = torch.tensor([3, 0, 3])
        selected = last_logits(model, suffixes.select(rows), cached=cached.select(rows))
        torch.testing.assert_close(selected, expected[rows], atol=1e-5, rtol=1e-5)
        repeated = last_logits(model, suffixes.repeat(2), cached=cached.repeat(2))
        torch.testing.assert_close(repeated, expected.repeat(2, 1), atol=1e-5, rtol=1e-5)


def test_whole_prompts_flush_right_run_like_those_flush_left(model: Model, prompts: list[TokenizedPrompt]) -> None:
    whole = _whole(model, prompts)
    suffixes, longest = flush_right(whole), cache_suffixes(model, prompts, max(len(prompt.ids) for prompt in prompts))
    for name in ("ids", "template_positions", "roles", "positions", "touchable", "lengths"):
        assert torch.equal(getattr(suffixes, name), getattr(longest, name))
    torch.testing.assert_close(last_logits(model, suffixes.repeat(2)), last_logits(model, whole).repeat(2, 1))


def test_template_positions_and_touchable_tokens_of_suffixes(model: Model, prompts: list[TokenizedPrompt]) -> None:
    layout = TemplateLayout.of(prompts)
    suffixes = cache_suffixes(model, prompts, 9)
    for row, prompt in enumerate(prompts):
        n = min(9, len(prompt.ids))
        assert suffixes.ids[row, 9 - n :].tolist() == prompt.ids[-n:].tolist()
        assert (
            suffixes.template_positions[row].tolist()
            == [NO_POSITION] * (9 - n) + layout.template_positions(prompt)[-n:].tolist()
        )
        sink = [False] if len(prompt.ids) <= 9 else []
        assert suffixes.touchable[row].tolist() == [False] * (9 - n) + sink + [True] * (n - len(sink))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tails_run_exactly_on_every_architecture(architecture: str, tmp_path: Path) -> None:
    random_model(architecture, tmp_path)
    model = load_model(ModelConfig(source=str(tmp_path), template="plain", refusal_tokens=["I"]))  # pyright: ignore
    prompts = model.tokenize(["Hello there", "What?", "x"])
    whole = _whole(model, prompts)
    for n_suffix in (4, max(len(prompt.ids) for prompt in prompts) - 1):
        suffixes = cache_suffixes(model, prompts, n_suffix)
        sites = {f"blocks.{layer}.{site}": None for layer in range(3) for site in ("hook_resid_post", "attn.hook_z")}
        of_tails: dict[str, torch.Tensor] = {}
        of_whole: dict[str, torch.Tensor] = {}
        logits = last_logits(model, suffixes, {site: recorder(of_tails, site) for site in sites})
        expected = last_logits(model, whole, {site: recorder(of_whole, site) for site in sites})
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        for layer in range(-1, model.n_layers):
            cached = cached_residual_after(model, suffixes, layer)
            torch.testing.assert_close(last_logits(model, suffixes, cached=cached), expected, atol=1e-5, rtol=1e-4)
        for site in sites:
            for row, prompt in enumerate(prompts):
                n = min(n_suffix, len(prompt.ids))
                last = of_whole[site][row, len(prompt.ids) - n : len(prompt.ids)]
                torch.testing.assert_close(of_tails[site][row, n_suffix - n :], last, atol=1e-5, rtol=1e-4)
