"""One prompt: firing against the dictionary itself, scaling against ablation with a reference of zero."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SITES, TEXTS

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import zero_baseline
from sfc.circuits.nodes import Nodes
from sfc.core.errors import UserError
from sfc.features.session import PromptSession
from sfc.models import engine
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.edits import Steering, SteeringEdit
from sfc.models.engine import prepare_suffixes
from sfc.models.interventions import Intervention, recorder
from sfc.models.loading import Model
from sfc.models.positions import steered_tokens
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore, score_batch
from sfc.saes.dictionary import Dictionary

PROMPT = TEXTS[1]


@pytest.fixture(scope="module")
def probe(model: Model, score: RefusalScore, dictionaries: dict[str, Dictionary]) -> PromptSession:
    return PromptSession(model, score, dictionaries)


def _scaling(probe: PromptSession, factors: Mapping[str, float], batch: Batch) -> Mapping[str, Intervention]:
    return probe._edits(factors, None).interventions(batch, [0]).in_prompt


def test_firing_is_what_the_dictionaries_encode_but_not_at_the_sink(probe: PromptSession, model: Model) -> None:
    prompts = model.tokenize([PROMPT])
    [batch] = make_batches(prompts, TemplateLayout.of(prompts), 4096, model.device)
    kept: dict[str, torch.Tensor] = {}
    last_logits(model, batch, {site: recorder(kept, site) for site in SITES})
    names = ["resid_post.1/F5", "resid_post.0/F7", "resid_post.0/F3"]
    firing = probe.fires(PROMPT, names)
    assert "".join(firing.tokens) == model.tokenizer.decode(prompts[0].ids)
    for column, (site, feature) in enumerate([(SITES[1], 5), (SITES[0], 7), (SITES[0], 3)]):
        expected = probe.dictionaries[site].encode(kept[site][0]).detach().numpy()[:, feature]
        np.testing.assert_allclose(firing.values[1:, column], expected[1:], atol=1e-5)
    assert not firing.values[0].any() and firing.values.any()


def test_switching_off_is_ablation_to_zero_with_current_errors(probe: PromptSession, model: Model) -> None:
    prompts = model.tokenize([PROMPT])
    layout = TemplateLayout.of(prompts)
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in probe.dictionaries.items()})
    ablation = Ablation(nodes, probe.dictionaries, zero_baseline(probe.dictionaries, layout), "keep-current")
    off = [f"resid_post.{layer}/F{feature}" for layer in (0, 1) for feature in range(0, 48, 2)]
    keep = torch.ones(1, nodes.n_nodes)
    keep[0, [nodes.number(name) for name in off]] = 0
    [batch] = make_batches(prompts, layout, 4096, model.device)
    interventions = ablation.interventions(keep, torch.zeros(1, dtype=torch.long), batch)
    expected = float(score_batch(model, probe.score, batch, interventions)[0])
    assert probe.score_of(PROMPT, dict.fromkeys(off, 0.0)) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - probe.score_of(PROMPT)) > 1e-3


@pytest.mark.parametrize("layers", [(), (0,), (1,), (0, 1)])
def test_runs_that_start_from_the_kept_prompt_are_runs_from_the_start(
    probe: PromptSession, model: Model, layers: tuple[int, ...]
) -> None:
    scaled = {f"resid_post.{layer}/F{feature}": -1.5 for layer in layers for feature in range(48)}
    for text in (PROMPT, TEXTS[3], PROMPT):
        prompts = model.tokenize([text])
        [batch] = make_batches(prompts, TemplateLayout.of(prompts), 4096, model.device)
        with torch.no_grad():
            whole = float(score_batch(model, probe.score, batch, _scaling(probe, scaled, batch))[0])
        assert probe.score_of(text, scaled) == pytest.approx(whole, abs=1e-6)


def test_a_factor_of_one_changes_nothing(probe: PromptSession) -> None:
    ones = {f"resid_post.{layer}/F{feature}": 1.0 for layer in (0, 1) for feature in range(48)}
    assert probe.score_of(PROMPT, ones) == pytest.approx(probe.score_of(PROMPT), abs=1e-5)
    assert probe.reply(PROMPT, ones, 5) == probe.reply(PROMPT, max_new_tokens=5)


def test_a_reply_is_made_under_the_same_scaling_in_every_step(probe: PromptSession, model: Model) -> None:
    """Greedy decoding token by token, each from the start and without a cache, gives the same tokens."""
    off = {f"resid_post.{layer}/F{feature}": 0.0 for layer in (0, 1) for feature in range(40)}
    [prompt] = model.tokenize([PROMPT])
    ids = list(prompt.ids)
    for _ in range(4):
        grown = prompt._replace(
            ids=np.array(ids), roles=np.concatenate([prompt.roles, np.full(len(ids) - len(prompt.ids), 3)])
        )
        [batch] = make_batches([grown], TemplateLayout.of([grown]), 4096, model.device)
        with torch.no_grad():
            logits = last_logits(model, batch, _scaling(probe, off, batch))
        ids.append(int(logits[0].argmax()))
    new = [int(i) for i in ids[len(prompt.ids) :]]
    assert probe.reply(PROMPT, off, 4) == model.tokenizer.decode(new, skip_special_tokens=True)


def test_an_unknown_feature_is_named(probe: PromptSession) -> None:
    with pytest.raises(UserError, match=r"no node 'resid_post\.9/F1'"):
        probe.score_of(PROMPT, {"resid_post.9/F1": 0.0})


@pytest.mark.parametrize("positions", ["last", "suffix", "prompt"])
@pytest.mark.parametrize("during_reply", [False, True])
def test_steering_is_what_sfc_steer_does(
    probe: PromptSession, model: Model, positions: str, during_reply: bool
) -> None:
    edit = SteeringEdit("add", (SITES[0],), torch.randn(32, generator=torch.Generator().manual_seed(3)), 6.0)
    prepared = prepare_suffixes(model, model.tokenize([PROMPT]), partial(steered_tokens, positions))
    steering = Steering([edit], positions, during_reply)
    expected = engine.replies(prepared, probe.score, steering, 5)
    assert probe.score_of(PROMPT, steering=steering) == pytest.approx(expected.scores[0, 0], abs=1e-4)
    assert abs(expected.scores[0, 0] - probe.score_of(PROMPT)) > 1e-3
    assert probe.reply(PROMPT, max_new_tokens=5, steering=steering) == expected.texts[0][0]


def test_features_of_the_site_are_scaled_before_it_is_steered(probe: PromptSession, model: Model) -> None:
    off = {f"resid_post.1/F{feature}": 0.0 for feature in range(0, 48, 2)}
    steering = Steering([SteeringEdit("add", (SITES[1],), torch.ones(32), 3.0)], "prompt", False)
    prompts = model.tokenize([PROMPT])
    [batch] = make_batches(prompts, TemplateLayout.of(prompts), 4096, model.device)
    [scale] = _scaling(probe, off, batch).values()

    def both(activation: torch.Tensor) -> torch.Tensor:
        changed = scale(activation)
        assert changed is not None
        shift = torch.full((32,), 3 / 32**0.5)
        return torch.cat([changed[:, :1], changed[:, 1:] + shift], dim=1)

    with torch.no_grad():
        expected = float(score_batch(model, probe.score, batch, {SITES[1]: both})[0])
    assert probe.score_of(PROMPT, off, steering) == pytest.approx(expected, abs=1e-4)
    assert probe.score_of(PROMPT, {}, steering) != pytest.approx(expected, abs=1e-4)
