"""Activation patching against a loop that runs the whole model, toy models whose effects are known, and by hand."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import random_model
from safetensors.torch import load_file, save_file

from sfc.core.config import ModelConfig
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.interventions import recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.models.sources import tiny_model_folder
from sfc.studies.patch.alignment import Unalignable, align
from sfc.studies.patch.patching import TokenizedPair, attribution_patching, make_transplant, patch_pairs, patched_scores
from sfc.studies.patch.ranking import Patch, cumulative_patches, single_patches

KINDS = ("resid", "attn", "mlp", "head")
TEXTS = [("Rob it", "Bob it"), ("Hurt my cat!", "Help my cat, please"), ("Steal", "Share")]


def _pairs(model: Model, texts: Sequence[tuple[str, str]] = TEXTS) -> list[TokenizedPair]:
    return [TokenizedPair(*model.tokenize(pair)) for pair in texts]


def _alone(model: Model, prompt: TokenizedPrompt) -> Batch:
    return make_batches([prompt], TemplateLayout.of([prompt]), 1, model.device)[0]


@torch.no_grad()
def _slow(
    model: Model, base: TokenizedPrompt, source: TokenizedPrompt, patches: Sequence[Patch], positions: str
) -> list[float]:
    """The patched scores of one pair, from a run of the whole model for every patch and nothing else."""
    score, seen = RefusalScore.of(model), {}
    into, out_of = align(positions, base, source)
    last_logits(model, _alone(model, source), {site: recorder(seen, site) for patch in patches for site in patch.sites})

    def put(site: str, patch: Patch):
        def act(x: torch.Tensor) -> torch.Tensor:
            width = x.shape[-1] // (1 if patch.head is None else model.bridge.cfg.n_heads)
            first = (patch.head or 0) * width
            x = x.clone()
            for i, j in zip(into, out_of, strict=True):
                x[0, i, first : first + width] = seen[site][0, j, first : first + width]
            return x

        return act

    batch = _alone(model, base)
    return [
        float(score(last_logits(model, batch, {site: put(site, patch) for site in patch.sites}))[0])
        for patch in patches
    ]


def _assert_equals_slow(model: Model, positions: str, texts: Sequence[tuple[str, str]] = TEXTS) -> None:
    pairs = [pair for pair in _pairs(model, texts) if _can_be_aligned(positions, pair)]
    assert pairs
    layers = range(model.n_layers)
    patches = single_patches(KINDS, layers, model.bridge.cfg.n_heads) + cumulative_patches(KINDS, layers)
    for direction in ("denoise", "noise"):
        runs = patch_pairs(model, RefusalScore.of(model), pairs, direction, positions, patches, batch_tokens=100)
        assert sorted(runs.pairs) == list(range(len(pairs)))
        for column, number in enumerate(runs.pairs):
            base, source = pairs[number] if direction == "noise" else reversed(pairs[number])
            expected = _slow(model, base, source, patches, positions)
            np.testing.assert_allclose(runs.patched[:, column], expected, atol=2e-4)


def _can_be_aligned(positions: str, pair: TokenizedPair) -> bool:
    try:
        align(positions, *pair)
    except Unalignable:
        return False
    return True


@pytest.mark.parametrize("positions", ["last", "last-9", "suffix", "content", "all", "content[-3]"])
def test_patching_is_the_loop_that_runs_the_whole_model_for_every_head(model: Model, positions: str) -> None:
    _assert_equals_slow(model, positions)


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX", "Qwen2"])
def test_other_architectures_agree_with_the_loop(architecture: str, tmp_path: Path) -> None:
    network = random_model(architecture, tmp_path)
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # as they come, the scores hardly differ
    network.save_pretrained(tmp_path)
    model = load_model(ModelConfig(source=str(tmp_path), template="plain", refusal_tokens=["I"]))  # pyright: ignore
    _assert_equals_slow(model, "content[-2]", TEXTS[1:2])


def test_the_batch_size_does_not_matter(model: Model, score: RefusalScore) -> None:
    pairs, patches = _pairs(model), single_patches(KINDS, range(2), 4)
    one, many = (patch_pairs(model, score, pairs, "denoise", "suffix", patches, tokens) for tokens in (1, 10_000))
    assert one.pairs == many.pairs
    np.testing.assert_allclose(one.patched, many.patched, atol=1e-5)
    np.testing.assert_allclose(one.attribution, many.attribution, atol=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_everything_patched_is_the_other_run_and_nothing_patched_is_none(
    model: Model, score: RefusalScore, direction: str
) -> None:
    texts = [("Rob the bank", "Bob the sank"), ("Steal", "Share"), ("the same", "the same")]
    pairs = _pairs(model, texts)
    last = patch_pairs(model, score, pairs, direction, "last", [Patch("resid", 1, 1)], 1000)
    np.testing.assert_allclose(last.patched[0], last.source, atol=1e-5)
    everywhere = patch_pairs(model, score, pairs, direction, "all", [Patch("resid", 0, 0), Patch("resid", 0, 1)], 1000)
    np.testing.assert_allclose(everywhere.patched, [everywhere.source] * 2, atol=1e-5)
    prefix = patch_pairs(model, score, pairs, direction, "prefix", single_patches(KINDS, range(2), 4), 1000)
    np.testing.assert_allclose(prefix.patched, [prefix.base] * 14, atol=1e-5)
    assert np.abs(prefix.source - prefix.base).max() > 0.01
    same = last.pairs.index(2)
    assert last.base[same] == pytest.approx(last.source[same], abs=1e-5)
    other = patch_pairs(model, score, pairs[2:], direction, "all", single_patches(KINDS, range(2), 4), 1000)
    np.testing.assert_allclose(other.patched, [other.base] * 14, atol=1e-5)
    np.testing.assert_allclose(other.attribution, 0, atol=1e-5)


def test_the_scores_are_those_of_the_prompts(model: Model, score: RefusalScore) -> None:
    pairs = _pairs(model)
    runs = patch_pairs(model, score, pairs, "denoise", "last", [Patch("mlp", 0, 0)], 1000)
    for column, number in enumerate(runs.pairs):
        clean, corrupted = (float(score(last_logits(model, _alone(model, prompt)))[0]) for prompt in pairs[number])
        assert (runs.source[column], runs.base[column]) == pytest.approx((clean, corrupted), abs=1e-5)


def test_a_pair_that_cannot_be_aligned_is_left_out_and_the_others_are_as_without_it(
    model: Model, score: RefusalScore
) -> None:
    pairs, patches = _pairs(model), [Patch("attn", 1, 1)]
    runs = patch_pairs(model, score, pairs, "noise", "content", patches, 1000)
    assert sorted(runs.pairs) == [0, 2], "the second pair has 12 tokens against 19"
    alone = patch_pairs(model, score, [pairs[0], pairs[2]], "noise", "content", patches, 1000)
    np.testing.assert_allclose(np.sort(runs.patched), np.sort(alone.patched), atol=1e-5)


def test_a_head_is_its_part_of_z_through_the_output_matrix(model: Model, score: RefusalScore) -> None:
    pair = _pairs(model)[0]
    clean: dict[str, torch.Tensor] = {}
    corrupted: dict[str, torch.Tensor] = {}
    site, output = "blocks.0.attn.hook_z", "blocks.0.hook_attn_out"
    batches = [_alone(model, prompt) for prompt in pair]
    for batch, seen in zip(batches, (clean, corrupted), strict=True):
        last_logits(model, batch, {site: recorder(seen, site)})
    W_O = model.hf.model.layers[0].self_attn.o_proj.weight
    runs = patch_pairs(model, score, [pair], "denoise", "last", single_patches(["head"], [0], 4), 1000)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)  # of 32 dimensions of four heads; they share two key-value heads
        moved = (clean[site][0, -1, part] - corrupted[site][0, -1, part]) @ W_O[:, part].T

        def add(x: torch.Tensor, moved: torch.Tensor = moved) -> torch.Tensor:
            return torch.cat([x[:, :-1], x[:, -1:] + moved], dim=1)

        by_hand = float(score(last_logits(model, batches[1], {output: add}))[0])
        assert runs.patched[head, 0] == pytest.approx(by_hand, abs=1e-5)


def test_attribution_patching_is_exact_for_small_changes(model: Model, score: RefusalScore) -> None:
    pairs, patches = _pairs(model), single_patches(KINDS, range(2), 4)
    for positions in ("suffix", "content[-1]"):
        sites = list(dict.fromkeys(site for patch in patches for site in patch.sites))
        transplant = make_transplant(model, score, pairs, positions, sites)
        here: dict[str, torch.Tensor] = {}
        last_logits(model, transplant.base.batches[0], {site: recorder(here, site) for site in sites})
        near = {site: here[site] + 0.004 * (transplant.values[site] - here[site]) for site in sites}
        nearby = replace(transplant, values=near)
        changes = patched_scores(model, score, nearby, patches, 1000) - transplant.base_score.numpy()
        attributed = attribution_patching(model, score, nearby, patches)
        assert np.abs(attributed).max() > 1e-4
        np.testing.assert_allclose(changes, attributed, atol=1e-5 + 0.05 * np.abs(attributed).max())


def test_attribution_patching_says_nothing_of_ranges_of_layers(model: Model, score: RefusalScore) -> None:
    patches = [Patch("mlp", 0, 1), Patch("mlp", 1, 1)]
    runs = patch_pairs(model, score, _pairs(model), "denoise", "last", patches, 1000)
    assert np.isnan(runs.attribution[0]).all() and np.isfinite(runs.attribution[1]).all()
    assert np.isfinite(runs.patched).all()


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose logit difference is linear in every activation: attention is uniform, MLPs write nothing, and the
    norms are constant because one dimension that nobody reads or writes outweighs all others."""
    folder = tmp_path_factory.mktemp("model") / "linear"
    shutil.copytree(tiny_model_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if any(part in name for part in ("q_proj", "k_proj", "down_proj")):
            weight.zero_()
        elif "v_proj" in name:
            weight[:, 0] = 0
            weight *= 200
        elif "o_proj" in name:
            weight[0] = 0
        elif "embed_tokens" in name:
            weight[:, 0] = 1000
        elif "lm_head" in name:
            weight[:, 0] = 0
            weight *= 1000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"source": str(folder), "refusal_tokens": ["I"], "against_tokens": ["S"]}
    return load_model(ModelConfig.model_validate(config))


@pytest.mark.parametrize("positions", ["last", "suffix", "all"])
def test_in_a_linear_model_noising_denoising_and_attribution_patching_agree_and_heads_add_up(
    linear: Model, positions: str
) -> None:
    pairs = _pairs(linear, [("Rob the bank", "Bob the sank"), ("Steal", "Share")])
    patches = single_patches(KINDS, range(2), 4)
    score = RefusalScore.of(linear)
    denoise, noise = (patch_pairs(linear, score, pairs, d, positions, patches, 1000) for d in ("denoise", "noise"))
    gap = denoise.source - denoise.base
    assert np.abs(gap).min() > 0.05
    np.testing.assert_allclose((denoise.patched - denoise.base) / gap, (noise.patched - noise.base) / -gap, atol=2e-3)
    np.testing.assert_allclose((denoise.patched - denoise.base) / gap, denoise.attribution / gap, atol=2e-3)
    np.testing.assert_allclose((noise.patched - noise.base) / -gap, noise.attribution / -gap, atol=2e-3)
    effect = dict(zip(patches, (denoise.patched - denoise.base) / gap, strict=True))
    for layer in range(2):
        heads = sum(effect[Patch("head", layer, layer, head)] for head in range(4))
        np.testing.assert_allclose(heads, effect[Patch("attn", layer, layer)], atol=2e-3)
        np.testing.assert_allclose(effect[Patch("mlp", layer, layer)], 0, atol=2e-3)
