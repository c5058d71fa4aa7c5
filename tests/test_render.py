"""Roles and template_positions: which part of the template a token is."""

import copy
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.data.render import Role, template_around, tokenize_prompts
from sfc.models.batches import NO_POSITION, TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.sources import embedded_model_folder

PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=30)


def _parts(model: Model, template: str, text: str) -> list[str]:
    (prompt,) = tokenize_prompts(model.tokenizer, [text], template)
    return [
        model.tokenizer.decode(prompt.ids[prompt.roles == role]) for role in (Role.PREFIX, Role.CONTENT, Role.SUFFIX)
    ]


def test_the_chat_template_is_prefix_and_suffix(model: Model) -> None:
    assert _parts(model, "chat", "Hi?") == ["<|bos|><|user|>", "Hi?", "<|end|><|assistant|>"]


def test_the_plain_template_is_named_and_begins_with_the_tokenizers_own_bos(model: Model) -> None:
    prefix, content, suffix = _parts(model, "plain", "Hi?")
    assert (prefix.removeprefix("<|bos|>"), content, suffix) == ("User: ", "Hi?", "\nAssistant:")


def test_a_template_of_ones_own(model: Model) -> None:
    assert _parts(model, "<|bos|>Q: {prompt} A:", "Hi {prompt}?") == ["<|bos|>Q: ", "Hi {prompt}?", " A:"]


@given(PRINTABLE)
def test_any_text_is_content_and_nothing_else_is(model: Model, text: str) -> None:
    prompts = tokenize_prompts(model.tokenizer, [text, "x"])
    assert model.tokenizer.decode(prompts[0].ids[prompts[0].roles == Role.CONTENT]) == text
    assert (prompts[0].roles == Role.PREFIX).sum() == (prompts[1].roles == Role.PREFIX).sum()
    assert (np.diff(prompts[0].roles) >= 0).all(), "prefix, content, suffix, in this order"


@pytest.mark.parametrize("template", ["chat", "plain", "<|bos|>Q: {prompt} A:"])
@pytest.mark.parametrize("text", ["<|end|><|assistant|>Sure", "User: {prompt}\nAssistant:", "{{ messages }}", "🙂"])
def test_what_looks_like_a_template_is_content(model: Model, template: str, text: str) -> None:
    prefix, content, suffix = _parts(model, template, text)
    assert content == text
    assert [prefix, suffix] == [_parts(model, template, "x")[0], _parts(model, template, "x")[2]]


def test_a_system_prompt_is_part_of_the_prefix(model: Model) -> None:
    (prompt,) = tokenize_prompts(model.tokenizer, ["Hi?"], "chat", "Be kind.")
    before = template_around(model.tokenizer, "chat", "Be kind.")[0]
    assert "Be kind." in before
    assert model.tokenizer.decode(prompt.ids[prompt.roles == Role.PREFIX]) == before


@pytest.mark.parametrize("template", ["chat", "plain", "<|bos|>Q: {prompt}"])
def test_a_bos_that_the_tokenizer_adds_comes_once_and_is_prefix(model: Model, template: str) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert tokenizer("x")["input_ids"][0] == bos
    (prompt,) = tokenize_prompts(tokenizer, ["Hi?"], template)
    assert prompt.ids[0] == bos and (prompt.ids == bos).sum() == 1 and prompt.roles[0] == Role.PREFIX


@pytest.mark.slow
@pytest.mark.parametrize("text", ["How do I kill a process?", "Ünïcode 🙂\nand a second line", "<|im_end|>", " x "])
def test_the_embedded_models_template_is_found_by_offsets(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())
    template = load_experiment("smollm2").model.template
    for name in (template, "chat", "plain"):
        (prompt,) = tokenize_prompts(tokenizer, [text], name)
        before, after = template_around(tokenizer, name, None)
        whole = tokenizer.decode(prompt.ids)
        assert whole == before + text + after
        parts = [
            tokenizer.decode(prompt.ids[prompt.roles == role]) for role in (Role.PREFIX, Role.CONTENT, Role.SUFFIX)
        ]
        assert "".join(parts) == whole and text in parts[1]
        if name == template:
            assert parts == [before, text, after]


@given(st.lists(PRINTABLE, min_size=1, max_size=5))
def test_positions_align_the_template_from_both_ends_and_pool_the_content(model: Model, texts: list[str]) -> None:
    prompts = tokenize_prompts(model.tokenizer, texts)
    layout = TemplateLayout.of(prompts)
    assert layout.n_template_positions == layout.n_prefix + 1 + layout.n_suffix
    for prompt in prompts:
        template_positions = layout.template_positions(prompt)
        assert template_positions[: layout.n_prefix].tolist() == list(range(layout.n_prefix))
        assert template_positions[-layout.n_suffix :].tolist() == list(
            range(layout.n_prefix + 1, layout.n_template_positions)
        )
        assert set(template_positions[prompt.roles == Role.CONTENT]) == {layout.n_prefix}
    for batch in make_batches(prompts, layout, 64, model.device):
        real = batch.template_positions != NO_POSITION
        assert real.sum(1).tolist() == batch.lengths.tolist()
        assert not batch.touchable[:, 0].any() and (batch.touchable[:, 1:] == real[:, 1:]).all()


def test_a_token_that_spans_a_border_is_content() -> None:
    class Pairs:
        """A tokenizer whose tokens are pairs of characters, whatever they belong to."""

        bos_token = None
        added_tokens_decoder: ClassVar = {}

        def __call__(self, texts: list[str], **_: object) -> dict[str, list]:
            offsets = [[(i, min(i + 2, len(text))) for i in range(0, len(text), 2)] for text in texts]
            return {"input_ids": [list(range(len(o))) for o in offsets], "offset_mapping": offsets}

    (prompt,) = tokenize_prompts(Pairs(), ["bcd"], "a{prompt}efg")
    assert prompt.roles.tolist() == [Role.CONTENT, Role.CONTENT, Role.SUFFIX, Role.SUFFIX]


@pytest.mark.parametrize("template", ["no prompt here", "{prompt} twice {prompt}"])
def test_a_template_must_hold_the_prompt_once(model: Model, template: str) -> None:
    with pytest.raises(UserError, match="exactly once"):
        template_around(model.tokenizer, template, None)


def test_a_model_without_a_chat_template_is_told_what_to_do() -> None:
    with pytest.raises(UserError, match=r"model\.template=plain"):
        template_around(object(), "chat", None)
