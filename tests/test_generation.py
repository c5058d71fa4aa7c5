"""Greedy generation: the batch does not matter, and Hugging Face's own loop agrees."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sfc.core.experiments import load_experiment
from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import cache_suffixes
from sfc.models.generation import continue_tails, end_tokens, generate_ids, generate_replies
from sfc.models.interventions import Intervention
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.sources import tiny_model_folder

TEXTS = ["Hi", "How do I bake bread?", "A" * 60, "why", "Tell me a story about the sea, and be quick about it."]
LENGTH = 12


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(load_experiment("tiny").model)


def _hf_greedy(prompt: TokenizedPrompt) -> list[int]:
    network = AutoModelForCausalLM.from_pretrained(tiny_model_folder())
    ids = torch.from_numpy(prompt.ids)[None]
    out = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH)
    return out[0, ids.shape[1] :].tolist()


def test_batched_replies_equal_single_ones_and_hugging_faces_own(model: Model) -> None:
    prompts = model.tokenize(TEXTS)
    batched = generate_ids(model, prompts, LENGTH, batch_tokens=10_000)
    one_by_one = generate_ids(model, prompts, LENGTH, batch_tokens=1)
    assert batched == one_by_one == [_hf_greedy(prompt) for prompt in prompts]
    assert generate_replies(model, prompts, LENGTH, 10_000) == [
        model.tokenizer.decode(ids, skip_special_tokens=True) for ids in batched
    ]


def test_generation_stops_at_the_end_token(model: Model) -> None:
    prompts = model.tokenize(TEXTS)
    free = generate_ids(model, prompts, LENGTH, batch_tokens=10_000)
    # Whatever the third token of the first reply is becomes the end token: the reply must stop there, and only there.
    end = free[0][2]
    before = model.hf.generation_config.eos_token_id
    model.hf.generation_config.eos_token_id = [before, end]
    try:
        assert end_tokens(model) >= {before, end}
        for ids, whole in zip(generate_ids(model, prompts, LENGTH, 10_000), free, strict=True):
            expected = whole[: whole.index(end) + 1] if end in whole else whole
            assert ids == expected
    finally:
        model.hf.generation_config.eos_token_id = before


def test_interventions_act_in_every_step_and_leave_with_the_block(model: Model) -> None:
    prompts = model.tokenize(TEXTS[:2])
    plain = generate_ids(model, prompts, 4, 10_000)
    seen: list[int] = []

    def push(activation: torch.Tensor) -> torch.Tensor:
        seen.append(activation.shape[1])
        return activation + 3 * torch.randn(activation.shape[-1], generator=torch.Generator().manual_seed(1))

    longest, push_there = max(len(prompt.ids) for prompt in prompts), {"blocks.0.hook_resid_post": push}
    assert continue_tails(model, cache_suffixes(model, prompts, longest), 4, push_there, push_there).ids != plain
    assert seen == [longest, 1, 1, 1]
    assert generate_ids(model, prompts, 4, 10_000) == plain


def test_progress_counts_every_prompt(model: Model) -> None:
    done: list[int] = []
    generate_replies(model, model.tokenize(TEXTS), 2, batch_tokens=100, progress=done.append)
    assert sum(done) == len(TEXTS)
    assert len(done) > 1


def test_no_prompts_give_no_replies(model: Model) -> None:
    assert generate_replies(model, [], 4, 100) == []


def test_a_prompt_longer_than_the_budget_is_answered(model: Model) -> None:
    long = TokenizedPrompt(np.full(50, 65), np.full(50, Role.CONTENT))
    assert len(generate_ids(model, [long], 3, batch_tokens=8)[0]) <= 3


def test_replies_continued_from_tails_are_those_of_the_whole_prompts(model: Model) -> None:
    prompts = model.tokenize(TEXTS)
    whole = generate_ids(model, prompts, LENGTH, batch_tokens=10_000)
    for n_suffix in (1, 3, 200):
        suffixes = cache_suffixes(model, prompts, n_suffix)
        for _ in range(2):  # the suffixes stay what they were
            continued = continue_tails(model, suffixes, LENGTH)
            assert continued.ids == whole
            torch.testing.assert_close(continued.first_logits, last_logits(model, suffixes))


def test_interventions_in_the_prompt_and_in_the_reply_are_told_apart(model: Model) -> None:
    suffixes = cache_suffixes(model, model.tokenize(TEXTS), 1)
    plain = continue_tails(model, suffixes, 5)
    seen: dict[str, list[int]] = {"prompt": [], "reply": []}

    def pushing(part: str) -> Intervention:
        direction = 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))

        def push(activation: torch.Tensor) -> torch.Tensor:
            seen[part].append(activation.shape[1])
            return activation + direction

        return push

    site = "blocks.0.hook_resid_post"
    in_reply = continue_tails(model, suffixes, 5, in_reply={site: pushing("reply")})
    assert seen == {"prompt": [], "reply": [1] * 4}
    torch.testing.assert_close(in_reply.first_logits, plain.first_logits)
    assert [ids[0] for ids in in_reply.ids] == [ids[0] for ids in plain.ids] and in_reply.ids != plain.ids
    in_prompt = continue_tails(model, suffixes, 5, {site: pushing("prompt")})
    assert seen == {"prompt": [1], "reply": [1] * 4}
    assert not torch.allclose(in_prompt.first_logits, plain.first_logits)
