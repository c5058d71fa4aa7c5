"""The engine: how runs are packed and where they start changes nothing; replies that are given are as if generated."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import SITES

from sfc.circuits.ablation import Ablation
from sfc.circuits.faithfulness import Ablations
from sfc.circuits.problem import PromptRuns
from sfc.data.render import Role, TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.edits import Replacement, Replacements, Steering, SteeringEdit
from sfc.models.engine import NO_EDIT, Edits, PreparedPrompts, prepare_suffixes
from sfc.models.loading import Model
from sfc.models.positions import steered_tokens
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore


def _steering(positions: str, during_reply: bool = False) -> Steering:
    random = torch.Generator().manual_seed(0)
    edits = [
        SteeringEdit(kind, (site,), torch.randn(32, generator=random), amount)  # pyright: ignore[reportArgumentType]
        for kind, amount in (("add", 4.0), ("add", -3.0), ("clamp", 2.0))
        for site in reversed(SITES)
    ]
    return Steering(edits, positions, during_reply)


def _circuits(ablation: Ablation) -> Ablations:
    return Ablations(ablation, np.random.default_rng(0).random((5, ablation.nodes.n_nodes)) < 0.5)


@pytest.fixture
def whole(model: Model, batches: list[Batch]) -> PreparedPrompts:
    return PreparedPrompts.of(model, batches)


@pytest.mark.parametrize("family", ["circuits", "steering"])
def test_packing_changes_no_figure(
    whole: PreparedPrompts, score: RefusalScore, ablation: Ablation, family: str
) -> None:
    edits: Edits = _circuits(ablation) if family == "circuits" else _steering("prompt", during_reply=True)
    counted: list[int] = []
    packed = engine.scores(whole, score, edits, counted.append)
    assert sum(counted) == len(edits) * whole.n_prompts and len(counted) < len(edits) * len(whole.batches)
    assert np.ptp(packed, axis=0).min() > 1e-3, "the edits differ"
    np.testing.assert_allclose(packed, engine.scores(whole, score, edits, batch_tokens=1), atol=1e-4)
    np.testing.assert_allclose(
        engine.next_token_kl(whole, edits), engine.next_token_kl(whole, edits, batch_tokens=1), atol=1e-4
    )
    one_by_one, together = (engine.replies(whole, score, edits, 4, batch_tokens=n) for n in (1, 10_000))
    assert one_by_one.texts == together.texts
    np.testing.assert_allclose(together.scores, packed, atol=1e-4)


def test_a_run_starts_at_the_last_block_before_the_first_edited_site(
    model: Model, score: RefusalScore, ablation: Ablation, batches: list[Batch]
) -> None:
    runs = PromptRuns.of(model, batches, SITES[0])
    from_cache = PreparedPrompts.of(model, batches, runs.cached_residuals)
    from_tokens = PreparedPrompts(model, batches, None)
    for edits in (_circuits(ablation), _steering("prompt"), NO_EDIT):
        np.testing.assert_allclose(
            engine.scores(from_cache, score, edits), engine.scores(from_tokens, score, edits), atol=1e-5
        )
    assert from_cache.cached is not None
    assert [sorted(known) for known in from_cache.cached] == [[0, 1]] * len(batches), "what steering started from, too"
    later = from_cache.start(0, SITES[1])
    assert later is not None and later.layer == 1 and from_cache.start(0, None) is later
    assert from_cache.start(0, "blocks.0.hook_resid_mid") is None and from_tokens.start(0, SITES[1]) is None


def test_a_replaced_activation_is_the_given_one(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], layout: TemplateLayout
) -> None:
    [batch] = make_batches(prompts, layout, 10_000, model.device)
    one = PreparedPrompts.of(model, [batch])
    given = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    where = torch.arange(batch.ids.shape[1])[None] == batch.lengths[:, None] - 1
    parts = [slice(None), slice(4, 9)]
    edits = Replacements([Replacement([SITES[1]], part) for part in parts], where, {SITES[1]: given})
    found = engine.scores(one, score, edits)
    for row, part in zip(found, parts, strict=True):

        def replace(x: torch.Tensor, part: slice = part) -> torch.Tensor:
            x = x.clone()
            x[torch.arange(len(x)), batch.lengths - 1, part] = given[0, 0, part]
            return x

        with torch.no_grad():
            expected = score(last_logits(model, batch, {SITES[1]: replace}))
        np.testing.assert_allclose(row[batch.prompts], expected, atol=1e-5)
    assert np.abs(found[0] - found[1]).min() > 1e-3


@pytest.mark.parametrize("during_reply", [False, True])
def test_losses_of_suffixes_are_those_of_whole_prompts(
    model: Model, prompts: list[TokenizedPrompt], layout: TemplateLayout, during_reply: bool
) -> None:
    replied = [
        TokenizedPrompt(np.append(prompt.ids, [5, 9]), np.append(prompt.roles, [Role.REPLY] * 2)) for prompt in prompts
    ]
    suffixes = prepare_suffixes(model, replied, partial(steered_tokens, "suffix"))
    whole = PreparedPrompts.of(model, make_batches(replied, layout, 2048, model.device))
    of_suffixes, of_whole = (engine.losses(some, _steering("suffix", during_reply)) for some in (suffixes, whole))
    for one, other in zip(of_suffixes, of_whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert (np.abs(of_whole.losses - of_whole.plain_losses).max(1) > 1e-3).all()
    assert of_whole.is_first.reshape(-1, 2).tolist() == [[True, False]] * len(prompts)
