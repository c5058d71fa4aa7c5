"""Fine-tuning dictionaries end to end: its loss against counterfactual ablation, and what training does to it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_dictionary
from test_training_runs import train, weights
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.counterfactuals import Counterfactuals, Pairs
from sfc.circuits.nodes import Nodes
from sfc.core.config import SaeConfig
from sfc.core.errors import UserError
from sfc.data.render import Role, TokenizedPrompt, answered
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.engine import kl
from sfc.models.interventions import recorder
from sfc.models.loading import Model
from sfc.models.running import cached_residual_after, last_logits
from sfc.saes import end_to_end
from sfc.saes.checkpoint import Parameters, Training
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.end_to_end import equally_long, finetune, swapped_loss

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
TEXTS = ["Bake my cake", "Pick my lock", "Burn a house, please", "Draw a house, please", "Hi there"]
DICTIONARIES = {site: random_dictionary(site, seed=number) for number, site in enumerate(SITES)}


def config(**options: object) -> SaeConfig:
    return SaeConfig.model_validate({"k": 6, "finetune_steps": 30, "finetune_rate": 1e-2} | options)


def trainings(dictionaries: dict[str, TopKDictionary], scale: float = 1.0) -> list[Training]:
    return [
        Training(
            site, scale,
            Parameters(d.W_enc.t() + 0, d.b_enc * scale, d.W_dec + 0, d.b_dec * scale),
            optimizer=None,  # pyright: ignore
            tokens_since_fired=None,  # pyright: ignore
            anchors=None,
        )
        for site, d in dictionaries.items()
    ]  # fmt: skip


def tuned(model: Model, chats: Sequence[TokenizedPrompt], path: Path, **options: object) -> list[TopKDictionary]:
    return finetune(
        model, chats, DICTIONARIES, config(**options), seed=0, checkpoint=path / "x.safetensors", report=lambda _: None
    )


def loss(model: Model, dictionaries: dict[str, TopKDictionary], batch: Batch) -> float:
    cached = cached_residual_after(model, batch, -1)
    with torch.no_grad():
        return float(swapped_loss(model, batch, cached, trainings(dictionaries), 6, np.random.default_rng(0)))


def missed(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_loss_is_that_of_counterfactual_ablation_with_all_features_kept(
    model: Model, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "OTHER_SHARE", 0.0)
    prompts = model.tokenize(TEXTS[:2])
    assert len(prompts[0].ids) == len(prompts[1].ids)
    layout = TemplateLayout.of(prompts)
    [batch] = make_batches(prompts, layout, 1000, model.device)
    cached = cached_residual_after(model, batch, 0)
    found = swapped_loss(model, batch, cached, trainings(DICTIONARIES, scale), 6, np.random.default_rng(0))

    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([True, False]))
    baseline = Counterfactuals.of(model, DICTIONARIES, prompts, pairs, layout, 1000)
    [paired] = baseline.batches(prompts, torch.ones(2, dtype=torch.bool), 1000)
    nodes = Nodes.of_spaces(DICTIONARIES)
    kept = torch.from_numpy(~nodes.is_error).float()[None]
    ablation = Ablation(nodes, DICTIONARIES, baseline, "ablate")
    own: dict[str, Tensor] = {}
    current: dict[str, Tensor] = {}
    with torch.no_grad():
        plain = last_logits(model, batch, {site: recorder(own, site) for site in SITES}).log_softmax(-1)
        ablated = ablation.interventions(kept, torch.zeros_like(batch.lengths), paired)
        # The first site is as it is; what the second has depends on what was done at the first.
        last_logits(model, paired, {SITES[0]: ablated[SITES[0]], SITES[1]: recorder(current, SITES[1])})
        current[SITES[0]] = own[SITES[0]]
        swapped = last_logits(model, paired, ablated).log_softmax(-1)
    divergence = kl(plain, swapped).mean()
    inside = batch.touchable
    unexplained = [
        missed(own[site][inside], d.decode_sparse(*d.encode_sparse(current[site][inside])))
        for site, d in DICTIONARIES.items()
    ]
    expected = end_to_end.FIRST_WEIGHT * divergence + end_to_end.VARIANCE_WEIGHT * sum(unexplained)
    assert float(divergence) > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_chats_share_a_batch_where_their_prompts_are_equally_long(model: Model) -> None:
    prompts = model.tokenize(TEXTS)
    chats = [answered(prompt, list(range(5, 5 + i))) for i, prompt in enumerate(prompts)]
    batches = equally_long(chats, 0, model.device)
    in_prompt = [(batch.roles >= 0) & (batch.roles != Role.REPLY) for batch in batches]
    assert all(len(set(inside.sum(1).tolist())) == 1 and len(inside) > 1 for inside in in_prompt)
    batched = sorted(tuple(ids[:n].tolist()) for b in batches for ids, n in zip(b.ids, b.lengths, strict=True))
    alike = [c for c, p in zip(chats, prompts, strict=True) if sum(len(q.ids) == len(p.ids) for q in prompts) > 1]
    assert batched == sorted(tuple(chat.ids.tolist()) for chat in alike) and len(alike) < len(chats)


def test_fine_tuning_lowers_the_loss_and_leaves_the_given_dictionaries_alone(model: Model, tmp_path: Path) -> None:
    chats = [answered(prompt, [7, 8, 9][:i]) for i, prompt in enumerate(model.tokenize(TEXTS))]
    before = {site: d.W_enc.detach().clone() for site, d in DICTIONARIES.items()}
    after = {d.site: d for d in tuned(model, chats, tmp_path)}
    for batch in equally_long(chats, 0, model.device):
        assert loss(model, after, batch) < 0.8 * loss(model, DICTIONARIES, batch)
    for site, dictionary in after.items():
        torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(dictionary.d_sae))
        assert torch.equal(DICTIONARIES[site].W_enc, before[site])


def test_a_killed_fine_tuning_goes_on_to_the_same_weights(model: Model, tmp_path: Path) -> None:
    chats = model.tokenize(TEXTS)
    whole = tuned(model, chats, tmp_path, finetune_steps=6)
    path, done = tmp_path / "killed.safetensors", []

    def killed(steps: int) -> None:
        done.append(steps)
        if sum(done) == 4:
            raise KeyboardInterrupt

    often = config(finetune_steps=6, checkpoint_seconds=1e-9)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, chats, DICTIONARIES, often, seed=0, checkpoint=path, report=killed)
    done.clear()
    resumed = finetune(model, chats, DICTIONARIES, often, seed=0, checkpoint=path, report=done.append)
    assert 1 <= done[0] <= 3, "it goes on from the last checkpoint that was saved"
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_without_two_equally_long_prompts_it_is_told(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="equally many tokens"):
        tuned(model, model.tokenize(["Hi", "Burn a house, please"]), tmp_path)


def test_train_fine_tunes_after_training_and_leaves_nothing_else(tmp_path: Path) -> None:
    for name, steps in (("plain", 0), ("tuned", 3)):
        (tmp_path / name).mkdir()
        train(tmp_path / name, "--set", f"saes.finetune_steps={steps}")
    [folder] = tmp_path.glob("tuned/saes/tiny-*")
    assert not (folder / "untuned").exists() and not list(folder.glob("checkpoint*"))
    plain, fine_tuned = weights(tmp_path / "plain"), weights(tmp_path / "tuned")
    assert plain.keys() == fine_tuned.keys() and all(plain[name] != fine_tuned[name] for name in plain)
