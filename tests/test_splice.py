"""What splicing a dictionary in costs, and which tokens a direction raises: against loops over prompts and tokens."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sfc.data.render import TokenizedPrompt
from sfc.features.cards import token_effects
from sfc.models.batches import Batch
from sfc.models.loading import Model
from sfc.models.score import RefusalScore
from sfc.saes.dictionary import Dictionary, TopKDictionary
from sfc.saes.splice import MIN_DAMAGE, SplicingQuality, run_clean, splicing_quality

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


def spliced(
    model: Model, score: RefusalScore, dictionary: Dictionary, batches: list[Batch], sites: tuple[str, ...] = SITES
) -> SplicingQuality:
    return splicing_quality(model, score, dictionary, run_clean(model, score, batches, sites))


def by_hand(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], site: str, replace: Callable[[Tensor], Tensor]
) -> tuple[float, Tensor]:
    """Mean loss over tokens and each prompt's score, with a plain hook, prompt by prompt and without padding."""

    def hook(_module, _inputs, output: Tensor) -> Tensor:
        rest = torch.stack([replace(x) for x in output[0, 1:]])
        return torch.cat([output[:, :1], rest[None]], dim=1)

    losses, scores = [], []
    handle = model.bridge.hook_dict[site].register_forward_hook(hook)
    try:
        for prompt in prompts:
            ids = torch.tensor(prompt.ids)
            with torch.no_grad():
                logits = model.hf(ids[None]).logits[0]
            losses += [-float(logits[i].log_softmax(-1)[ids[i + 1]]) for i in range(len(ids) - 1)]
            scores.append(score(logits[-1:])[0])
    finally:
        handle.remove()
    return sum(losses) / len(losses), torch.stack(scores)


@pytest.mark.parametrize("site", SITES)
def test_splicing_is_a_loop_over_prompts_with_a_hook_written_out_by_hand(
    model: Model, score: RefusalScore, dictionaries: dict[str, Dictionary], prompts: list[TokenizedPrompt],
    batches: list[Batch], site: str,
) -> None:  # fmt: skip
    dictionary, seen = dictionaries[site], []
    loss, scores = by_hand(model, score, prompts, site, lambda x: seen.append(x) or x)
    mean = torch.stack(seen).mean(0)
    replacements = (lambda x: dictionary.decode(dictionary.encode(x)), lambda _: mean, torch.zeros_like)
    runs = [by_hand(model, score, prompts, site, replace) for replace in replacements]
    losses, changes = [run[0] for run in runs], [float((run[1] - scores).abs().mean()) for run in runs]
    quality = spliced(model, score, dictionary, batches)
    assert quality[:4] == pytest.approx((loss, *losses), abs=1e-4)
    assert quality.score == pytest.approx(float(scores.mean()), abs=1e-4)
    assert quality[7:10] == pytest.approx([float(run[1].mean()) for run in runs], abs=1e-4)
    assert quality[10:13] == pytest.approx(changes, abs=1e-4)
    for found, ablated in ((quality.loss_recovered, losses[1]), (quality.loss_recovered_zero, losses[2])):
        expected = (ablated - losses[0]) / (ablated - loss)
        assert found == pytest.approx(expected, abs=0.01) if ablated - loss > MIN_DAMAGE else math.isnan(found)
    assert quality.score_recovered == pytest.approx(1 - changes[0] / changes[1], abs=0.01)
    assert quality.score_recovered_zero == pytest.approx(1 - changes[0] / changes[2], abs=0.01)


def test_a_site_is_measured_alone_whatever_the_sites_before_it(
    model: Model, score: RefusalScore, dictionaries: dict[str, Dictionary], batches: list[Batch]
) -> None:
    alone = spliced(model, score, dictionaries[SITES[1]], batches, SITES[1:])
    assert alone == pytest.approx(spliced(model, score, dictionaries[SITES[1]], batches), abs=1e-5, nan_ok=True)


def test_a_perfect_dictionary_recovers_everything(model: Model, score: RefusalScore, batches: list[Batch]) -> None:
    both_signs = torch.cat([torch.eye(32), -torch.eye(32)])
    weights = {"W_enc": both_signs.T, "b_enc": torch.zeros(64), "W_dec": both_signs, "b_dec": torch.zeros(32)}
    quality = spliced(model, score, TopKDictionary(weights, k=32, site=SITES[0]), batches)
    assert quality.cross_entropy_spliced == quality.cross_entropy
    assert quality.score_change_spliced == 0
    assert quality.loss_recovered == quality.score_recovered == quality.score_recovered_zero == 1
    assert quality.cross_entropy_mean_ablated > quality.cross_entropy + 0.01
    assert quality.score_change_mean_ablated > 0.01


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_a_dictionary_that_only_knows_the_ablation_recovers_nothing(
    model: Model, score: RefusalScore, batches: list[Batch], ablation: str
) -> None:
    clean = run_clean(model, score, batches, SITES)
    b_dec = clean.means[SITES[0]] if ablation == "mean" else torch.zeros(32)
    weights = {"W_enc": torch.zeros(32, 4), "b_enc": torch.zeros(4), "W_dec": torch.zeros(4, 32), "b_dec": b_dec}
    quality = splicing_quality(model, score, TopKDictionary(weights, k=2, site=SITES[0]), clean)
    recovered = {"mean": (quality.loss_recovered, quality.score_recovered),
                 "zero": (quality.loss_recovered_zero, quality.score_recovered_zero)}  # fmt: skip
    assert recovered[ablation] == (0, 0)


def test_what_an_ablation_does_not_harm_cannot_be_recovered(
    model: Model, score: RefusalScore, batches: list[Batch]
) -> None:
    """One prompt of two tokens has one token to ablate: its activation is the mean of all."""
    batch = batches[0].select(torch.tensor([0]))
    two = Batch(batch.prompts, batch.ids[:, :2], torch.tensor([2]), batch.template_positions[:, :2], batch.roles[:, :2])
    weights = {
        "W_enc": torch.zeros(32, 4),
        "b_enc": torch.zeros(4),
        "W_dec": torch.zeros(4, 32),
        "b_dec": torch.ones(32),
    }
    quality = spliced(model, score, TopKDictionary(weights, k=2, site=SITES[0]), [two])
    assert quality.score_change_spliced > 0.01
    assert math.isnan(quality.loss_recovered) and math.isnan(quality.score_recovered)
    assert not math.isnan(quality.score_recovered_zero)


def test_token_effects_are_the_unembeddings_extremes_where_they_stand_out(model: Model) -> None:
    weight = model.hf.get_output_embeddings().weight.detach()
    norm = model.hf.base_model.norm.weight.detach()
    decoder = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    decoder[0] = (weight[7] - weight.mean(0)) / norm
    decoder[1] = -decoder[0]
    effects = token_effects(model, decoder, range(100), count=4)
    logits = [float((decoder[0] * norm) @ row) for row in weight]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    assert effects[0].raises == effects[1].lowers == [model.tokenizer.decode([token]) for token in order[:4]]
    assert order[0] == 7
    assert sum(bool(of.raises) + bool(of.lowers) for of in effects[2:]) <= 10
