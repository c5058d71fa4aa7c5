"""Repairs against what they should be: ablations of the same nodes, prompts one at a time, and changed weights."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import random_model
from conftest import SITES, TEXTS

from sfc.circuits.ablation import Ablation
from sfc.circuits.faithfulness import Ablations, prepared
from sfc.circuits.problem import PromptRuns
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.data.render import Role, TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.engine import NO_EDIT, PreparedPrompts
from sfc.models.generation import generate_replies
from sfc.models.interventions import Intervention, intervening
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.studies.repair.edits import (
    FeatureAblation,
    Projections,
    best_size,
    load_repair,
    projected_weights,
    qualified,
    save_repair,
    writers_before,
    written_subspaces,
)

CHOSEN = np.array([3, 10, 49 + 5, 49 + 20])  # of 48 features and an error at each of two sites


@pytest.fixture(scope="module")
def repair(ablation: Ablation) -> FeatureAblation:
    return FeatureAblation.of(CHOSEN, ablation.nodes, ablation.baseline, "saes/x")


@pytest.fixture(scope="module")
def hook(ablation: Ablation) -> Ablations:
    return Ablations(ablation, ~np.isin(np.arange(ablation.nodes.n_nodes), CHOSEN)[None])


def test_the_hook_sets_its_features_to_their_references_and_leaves_all_else(
    model: Model,
    score: RefusalScore,
    ablation: Ablation,
    batches: list[Batch],
    repair: FeatureAblation,
    hook: Ablations,
) -> None:
    names = [ablation.nodes.name(int(node)) for node in CHOSEN]
    assert [f"{site.split('.')[1]}/F{n}" for site, of in repair.features.items() for n in of.tolist()] == [
        f"{name.split('.')[1].split('/')[0]}/{name.split('/')[1]}" for name in names
    ]
    scores = engine.scores(prepared(model, PromptRuns.of(model, batches, SITES[0])), score, hook)[0]
    for batch in batches:

        def at_site(site: str, features: torch.Tensor, batch: Batch = batch) -> Intervention:
            """Token by token, with dense features."""
            dictionary, reference = ablation.dictionaries[site], ablation.baseline.features[site]

            def act(activation: torch.Tensor) -> torch.Tensor:
                changed = activation.clone()
                for row, position in batch.touchable.nonzero().tolist():
                    x, place = activation[row, position], batch.template_positions[row, position]
                    for feature in features.tolist():
                        moved = dictionary.encode(x[None])[0, feature] - reference[place, feature]
                        changed[row, position] -= moved * dictionary.W_dec[feature]
                return changed

            return act

        with torch.no_grad():
            by_hand = {site: at_site(site, features) for site, features in repair.features.items()}
            expected = score(last_logits(model, batch, by_hand))
            of_file = score(last_logits(model, batch, repair.interventions(ablation.dictionaries, batch)))
        np.testing.assert_allclose(scores[batch.prompts.numpy()], expected, atol=1e-4)
        np.testing.assert_allclose(of_file, expected, atol=1e-4)
        plain = score(last_logits(model, batch))
        assert (expected - plain).abs().max() > 1e-3


def test_replies_are_those_of_the_hook_on_each_prompt_alone(
    model: Model, score: RefusalScore, ablation: Ablation, prompts: list[TokenizedPrompt], layout: TemplateLayout,
    repair: FeatureAblation, hook: Ablations,
) -> None:  # fmt: skip
    some = PreparedPrompts.of(model, make_batches(prompts, layout, 200, model.device))
    [replies] = engine.replies(some, score, hook, 4).texts
    for prompt, text in zip(prompts, replies, strict=True):
        ids = torch.from_numpy(prompt.ids)[None]
        for _ in range(4):
            batch = _with_positions(prompt, ids, layout)
            with torch.no_grad(), intervening(model, repair.interventions(ablation.dictionaries, batch)):
                newest = model.hf(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, newest[None, None]], dim=1)
        assert model.tokenizer.decode(ids[0, len(prompt.ids) :], skip_special_tokens=True).startswith(text)
    assert engine.replies(some, score, NO_EDIT, 4).texts == [generate_replies(model, prompts, 4, 200)]


def _with_positions(prompt: TokenizedPrompt, ids: torch.Tensor, layout: TemplateLayout) -> Batch:
    """A prompt that has been continued; what came after it stands in no place."""
    template_positions = torch.full_like(ids, -1)
    template_positions[0, : len(prompt.ids)] = torch.from_numpy(layout.template_positions(prompt))
    return Batch(torch.tensor([0]), ids, torch.tensor([ids.shape[1]]), template_positions, torch.zeros_like(ids))


def test_losses_of_given_replies_are_those_of_one_run_each(
    model: Model, ablation: Ablation, prompts: list[TokenizedPrompt], layout: TemplateLayout, repair: FeatureAblation,
    hook: Ablations,
) -> None:  # fmt: skip
    reply = np.array([5, 9, 7], dtype=prompts[0].ids.dtype)
    replied = [
        TokenizedPrompt(np.append(p.ids, reply[:n]), np.append(p.roles, np.full(n, Role.REPLY)))
        for n, p in enumerate(prompts[:3], start=1)
    ]
    given = PreparedPrompts.of(model, make_batches(replied, layout, 1000, model.device))
    [losses] = engine.losses(given, hook).losses
    expected = []
    for full, prompt in zip(replied, prompts, strict=False):
        ids = torch.from_numpy(full.ids)[None]
        batch = _with_positions(prompt, ids, layout)
        with torch.no_grad(), intervening(model, repair.interventions(ablation.dictionaries, batch)):
            log_p = model.hf(input_ids=ids).logits[0].log_softmax(-1)
        expected += [-log_p[i - 1, full.ids[i]].item() for i in range(len(prompt.ids), len(full.ids))]
    np.testing.assert_allclose(sorted(losses), sorted(expected), atol=1e-4)


def test_a_saved_repair_is_the_same_repair(
    repair: FeatureAblation, ablation: Ablation, batches: list[Batch], tmp_path: Path
) -> None:
    save_repair(repair, tmp_path / "repair.safetensors")
    loaded = load_repair(tmp_path / "repair.safetensors")
    assert (loaded.layout, loaded.dictionaries) == (repair.layout, repair.dictionaries)
    for site in repair.features:
        assert (loaded.features[site] == repair.features[site]).all()
        assert (loaded.reference[site] == repair.reference[site]).all()
    with pytest.raises(UserError, match="do not fit it"):
        loaded.interventions({SITES[0]: ablation.dictionaries[SITES[0]]}, batches[0])
    (tmp_path / "no.safetensors").write_bytes(b"x" * 20)
    for bad in ("no.safetensors", "none.safetensors"):
        with pytest.raises(UserError, match=r"is not a repair|does not exist"):
            load_repair(tmp_path / bad)


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX", "Llama"])
def test_changed_weights_do_exactly_what_projecting_the_outputs_does(architecture: str, tmp_path: Path) -> None:
    random_model(architecture, tmp_path)
    changed = load_model(load_experiment("tiny", [f"model.source={tmp_path}", "model.template=plain"]).model)
    random = torch.Generator().manual_seed(0)
    subspaces = {
        site: torch.linalg.qr(torch.randn(32, n, generator=random, dtype=torch.float64))[0].T
        for n, site in enumerate(writers_before("blocks.1.hook_resid_post"), start=1)
    }
    assert len(subspaces) == 4
    ids = torch.from_numpy(changed.tokenize(TEXTS[:1])[0].ids)[None]
    with torch.no_grad():
        plain = changed.hf(input_ids=ids).logits
        [whole] = make_batches(changed.tokenize(TEXTS[:1]), TemplateLayout(9, 9), 1000, changed.device)
        with intervening(changed, Projections([subspaces]).interventions(whole, [0]).in_prompt):
            hooked = changed.hf(input_ids=ids).logits
        with projected_weights(changed, subspaces):
            torch.testing.assert_close(changed.hf(input_ids=ids).logits, hooked, atol=2e-5, rtol=1e-4)
        assert torch.equal(changed.hf(input_ids=ids).logits, plain)
    assert (hooked - plain).abs().max() > 1e-3


def test_the_subspaces_are_spanned_by_the_features_that_come_later(ablation: Ablation) -> None:
    subspaces = written_subspaces({SITES[0]: [3], SITES[1]: [5, 20]}, ablation.dictionaries)
    sizes = {site: len(basis) for site, basis in subspaces.items()}
    assert sizes == {
        "blocks.0.hook_attn_out": 3, "blocks.0.hook_mlp_out": 3, "blocks.1.hook_attn_out": 2,
        "blocks.1.hook_mlp_out": 2,
    }  # fmt: skip
    u, rows = subspaces["blocks.1.hook_attn_out"], ablation.dictionaries[SITES[1]].W_dec[[5, 20]].double()
    torch.testing.assert_close(u @ u.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(rows @ u.T @ u, rows)
    assert writers_before("blocks.1.hook_resid_mid") == [
        "blocks.0.hook_attn_out", "blocks.1.hook_attn_out", "blocks.0.hook_mlp_out",
    ]  # fmt: skip
    assert writers_before("blocks.1.hook_mlp_out") == ["blocks.1.hook_mlp_out"]


def test_features_qualify_that_matter_for_hard_prompts_and_not_for_toxic_ones() -> None:
    hard = np.array([1.0, 2.0, 3.0, -1.0, 0.5, 9.0, 0.0])
    toxic = np.array([0.1, 1.5, -2.0, -5.0, 0.25, 0.0, -1.0])
    is_error = np.arange(7) == 5
    assert qualified(hard, toxic, ~is_error, 0.5).tolist() == [2, 0, 4]
    assert qualified(hard, toxic, ~is_error, 0.75).tolist() == [2, 1, 0, 4]


def test_the_size_that_refuses_fewest_hard_prompts_and_spares_the_toxic_ones_is_chosen() -> None:
    tried = pd.DataFrame(
        [(0, 0.5, 0.9, 1.0), (5, 0.4, 0.9, 0.8), (10, 0.3, 0.85, 0.7), (20, 0.1, 0.6, -1.0), (30, 0.4, 0.9, 0.5)],
        columns=["size", "hard", "toxic", "hard_score"],
    )
    assert best_size(tried, 0.05) == 10
    assert best_size(tried, 0.0) == 30, "of two sizes with equal shares the one with the lower score"
    assert best_size(tried, 0.5) == 20
    assert best_size(tried[tried["size"].isin([0, 20])], 0.05) is None
