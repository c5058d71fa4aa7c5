"""Direct logit attribution: the parts sum to the logit difference on every architecture, and heads get their roles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import random_model
from commands import sfc
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.interventions import intervening, recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.stats import bootstrap_means
from sfc.studies.logits import component_table, group_table, strongest
from sfc.studies.logits.measure import (
    Component,
    LogitAttribution,
    LogitDifference,
    attribute_logits,
    by_layer,
    logit_difference_of,
)

TEXTS = ["Hello there", "What?", "Name three rivers of Europe."]
DIFFERENCE = LogitDifference(torch.tensor([40, 41]), torch.tensor([70, 80, 90]))
NO_BIAS = {"embed": 1, "head": 12, "mlp": 3, "unembed_bias": 1}
BIASES = {"attn_bias": 3, "mlp_bias": 3, "final_norm_bias": 1}
PARTS = {
    "Llama": NO_BIAS,
    "Qwen2": NO_BIAS,
    "GPTNeoX": NO_BIAS | BIASES,
    "GPT2": NO_BIAS | BIASES | {"pos_embed": 1},
    "GPTJ": NO_BIAS | {"mlp_bias": 3, "final_norm_bias": 1},
    "Bloom": NO_BIAS | BIASES,
}


def _noisy(architecture: str, folder: Path) -> Model:
    """A model whose biases and norm weights are not zeros and ones, as fresh ones are."""
    network = random_model(architecture, folder)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return load_model(ModelConfig(source=str(folder), template="plain", refusal_tokens=["I"]))  # pyright: ignore


def _batched(model: Model) -> list[Batch]:
    prompts = model.tokenize(TEXTS)
    return make_batches(prompts, TemplateLayout.of(prompts), 80, model.device)


def _attribute(model: Model, batches: list[Batch]) -> LogitAttribution:
    return attribute_logits(model, RefusalScore.of(model), DIFFERENCE, batches, lambda _: None)


@pytest.mark.parametrize("architecture", PARTS)
def test_the_parts_sum_to_the_models_own_logit_difference(architecture: str, tmp_path: Path) -> None:
    model = _noisy(architecture, tmp_path)
    batches = _batched(model)
    assert len(batches) > 1
    attribution = _attribute(model, batches)
    with torch.no_grad():
        ids = [torch.tensor(prompt.ids)[None] for prompt in model.tokenize(TEXTS)]
        logits = torch.cat([model.hf(row).logits[:, -1] for row in ids])
    own = logits[:, [40, 41]].mean(1) - logits[:, [70, 80, 90]].mean(1)
    absolute = np.abs(attribution.contributions).sum(1)
    assert (np.abs(attribution.contributions.sum(1) - own.numpy()) < 1e-5 * absolute).all()
    assert attribution.error < 1e-5
    kinds = pd.Series([component.name.split(".")[0] for component in attribution.components]).value_counts()
    assert kinds.to_dict() == PARTS[architecture]
    assert len({component.name for component in attribution.components}) == len(attribution.components)


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "GPTNeoX", "Qwen2"])
def test_a_heads_contribution_is_what_is_lost_without_it_with_everything_else_frozen(
    architecture: str, tmp_path: Path
) -> None:
    """The slow way: take the head's z away in the last layer, where only the MLP and the norm's scale could answer."""
    model = _noisy(architecture, tmp_path)
    batch = make_batches(prompts := model.tokenize(TEXTS[:1]), TemplateLayout.of(prompts), 80, model.device)[0]
    attribution = _attribute(model, [batch])
    names = [component.name for component in attribution.components]
    kept: dict[str, torch.Tensor] = {}
    last_logits(model, batch, {site: recorder(kept, site) for site in ("ln_final.hook_scale", "blocks.2.hook_mlp_out")})
    frozen = {site: (lambda _, value=value: value.clone()) for site, value in kept.items()}
    whole = DIFFERENCE(last_logits(model, batch, frozen))
    for head in range(4):
        ablated = {"blocks.2.attn.hook_z": lambda z, head=head: _without(z, head), **frozen}
        lost = whole - DIFFERENCE(last_logits(model, batch, ablated))
        found = attribution.contributions[0, names.index(f"head.2.{head}")]
        assert found == pytest.approx(lost.item(), abs=1e-5, rel=1e-3)
        assert abs(found) > 1e-4


def _without(z: torch.Tensor, head: int) -> torch.Tensor:
    heads = z.clone().reshape(*z.shape[:2], 4, -1)
    heads[:, :, head] = 0
    return heads.reshape(z.shape)


def test_a_head_that_writes_nothing_contributes_nothing(model: Model, batches: list[Batch]) -> None:
    plain = _attribute(model, batches)
    names = [component.name for component in plain.components]
    silent = names.index("head.1.2")
    with intervening(model, {"blocks.1.attn.hook_z": lambda z: _without(z, 2)}):
        attribution = _attribute(model, batches)
    assert (attribution.contributions[:, silent] == 0).all() and (plain.contributions[:, silent] != 0).all()
    before = [i for i, component in enumerate(plain.components) if component.layer == 0]
    scales = attribution.contributions[:, before] / plain.contributions[:, before]
    np.testing.assert_allclose(scales, np.repeat(scales[:, :1], len(before), 1), rtol=1e-4)
    assert attribution.error < 1e-5


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("Gemma2", "misses the logit difference"), ("Granite", "Granite.*nothing passes its hook")],
)
def test_a_model_that_is_no_sum_of_such_parts_is_refused(architecture: str, why: str, tmp_path: Path) -> None:
    model = _noisy(architecture, tmp_path)
    with pytest.raises(UserError, match=why) as error:
        _attribute(model, _batched(model))
    assert "\n" not in str(error.value)


def test_layers_are_sums_of_their_parts(model: Model, batches: list[Batch]) -> None:
    attribution = _attribute(model, batches)
    joined = by_layer(attribution)
    assert [c.name for c in joined.components] == [
        "embed", "attention.0", "mlp.0", "attention.1", "mlp.1", "unembed_bias",
    ]  # fmt: skip
    np.testing.assert_allclose(joined.contributions.sum(1), attribution.contributions.sum(1))
    heads = [i for i, c in enumerate(attribution.components) if c.kind == "head" and c.layer == 1]
    np.testing.assert_allclose(joined.contributions[:, 3], attribution.contributions[:, heads].sum(1))
    assert joined.error == pytest.approx(
        (np.abs(attribution.contributions.sum(1) - attribution.logit_difference) / np.abs(joined.contributions).sum(1))
        .max()
    )  # fmt: skip


def test_the_difference_is_that_of_means_and_reads_the_unembedding_alike() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    expected = [(row[40] + row[41]) / 2 - (row[70] + row[80] + row[90]) / 3 for row in logits]
    torch.testing.assert_close(DIFFERENCE(logits), torch.stack(expected))


def test_without_tokens_to_compare_with_the_likeliest_after_harmless_prompts_are_taken(
    model: Model, batches: list[Batch]
) -> None:
    probabilities = torch.cat([last_logits(model, batch).softmax(-1) for batch in batches]).mean(0)
    probabilities[ord("I") - ord("!")] = 0  # the byte-level alphabet begins with "!"
    difference = logit_difference_of(model, RefusalScore.of(model), batches, count=4)
    assert difference.tokens(model)["refusal"] == ["I"]
    assert sorted(difference.against.tolist()) == sorted(probabilities.topk(4).indices.tolist())
    config = model.config.model_copy(update={"against_tokens": ["S", "H"]})
    named = logit_difference_of(model, RefusalScore.of(replace(model, config=config)), [])
    assert sorted(named.tokens(model)["against"]) == ["H", "S"]


def _constructed(n: int = 40) -> tuple[LogitAttribution, np.ndarray]:
    """Heads of every sort; the embedding pushes toxic prompts hardest but is no head."""
    random = np.random.default_rng(0)
    toxic = np.arange(n) % 2 == 0
    means = {  # toxic, safe
        "head.0.0": (1.0, 0.1),
        "head.0.1": (-1.0, 0.1),
        "head.0.2": (1.0, 1.0),
        "head.0.3": (0.1, 1.0),
        "head.1.0": (-0.1, -1.0),
        "head.1.1": (0.0, 0.0),
        "embed": (5.0, 0.0),
    }
    columns = [np.where(toxic, *sides) + (sides != (0.0, 0.0)) * 0.02 * random.normal(size=n)
               for sides in means.values()]  # fmt: skip
    components = tuple(
        Component(name, "head", int(name[5]), int(name[7])) if name != "embed" else Component(name, "embedding")
        for name in means
    )
    contributions = np.stack(columns, 1)
    return LogitAttribution(components, contributions, contributions.sum(1), contributions.sum(1)), toxic


def test_heads_get_the_role_that_they_were_made_for() -> None:
    table = component_table(*_constructed(), seed=0).set_index("component")
    assert table["role"].dropna().to_dict() == {
        "head.0.0": "guardrail",
        "head.0.1": "compliance",
        "head.0.2": "neither",  # pushes all prompts alike
        "head.0.3": "neither",  # pushes towards refusal, but harmless prompts more
        "head.1.0": "neither",
        "head.1.1": "neither",  # never writes
    }
    assert table.loc["head.1.1", "p_value"] == 1 and pd.isna(table.loc["embed", "q_value"])
    assert (table["toxic_low"] <= table["toxic_mean"]).all() and (table["safe_mean"] <= table["safe_high"]).all()


def test_the_tables_figures_are_those_of_the_prompts() -> None:
    attribution, toxic = _constructed()
    table = component_table(attribution, toxic, seed=0)
    sides = attribution.contributions[toxic], attribution.contributions[~toxic]
    np.testing.assert_allclose(table["toxic_mean"], sides[0].mean(0))
    np.testing.assert_allclose(table["difference"], sides[0].mean(0) - sides[1].mean(0))
    p_value = ttest_ind(sides[0][:, 2], sides[1][:, 2], equal_var=False)[1]
    assert table.loc[2, "p_value"] == pytest.approx(p_value)
    assert strongest(table[table["kind"] == "head"])["component"].iloc[0] == "head.0.1"
    frame = pd.DataFrame({"category": np.where(np.arange(40) < 10, "privacy", "violence")})
    groups = group_table(attribution, frame.assign(label=np.where(toxic, "toxic", "safe")), seed=0)
    row = groups[(groups["category"] == "privacy") & (groups["label"] == "safe") & (groups["component"] == "head.0.3")]
    assert row["n"].item() == 5
    assert row["mean"].item() == pytest.approx(attribution.contributions[1:10:2, 3].mean())


def test_one_prompt_a_side_proves_nothing() -> None:
    attribution, toxic = _constructed(2)
    table = component_table(attribution, toxic, seed=0)
    assert set(table["role"].dropna()) == {"neither"}


@given(st.integers(2, 30), st.integers(0, 999), st.floats(-3, 3), st.floats(0.1, 5))
def test_intervals_of_means_move_and_stretch_with_the_values(n: int, seed: int, shift: float, scale: float) -> None:
    values = np.random.default_rng(seed).normal(size=(n, 3))
    plain, moved = bootstrap_means(values, seed), bootstrap_means(shift + scale * values, seed)
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(getattr(moved, name), shift + scale * getattr(plain, name), atol=1e-9)
    np.testing.assert_allclose(plain.mean, values.mean(0))
    assert (plain.low <= plain.high).all()


def test_intervals_of_means_are_near_those_of_the_normal_distribution_and_cover() -> None:
    random = np.random.default_rng(0)
    values = random.normal(2.0, 3.0, size=(400, 50))
    interval = bootstrap_means(values, seed=1)
    half = 1.96 * values.std(0) / np.sqrt(400)
    np.testing.assert_allclose(interval.high - interval.mean, half, rtol=0.15)
    np.testing.assert_allclose(interval.mean - interval.low, half, rtol=0.15)
    assert 44 <= ((interval.low < 2.0) & (interval.high > 2.0)).sum() <= 50
    constant = bootstrap_means(np.full((3, 1), 0.1), seed=0)
    assert constant.low[0] == pytest.approx(0.1) == constant.high[0]
    with pytest.raises(ValueError, match="no rows"):
        bootstrap_means(np.empty((0, 2)), seed=0)


def test_the_command_ends_with_files_and_figures_that_agree(tmp_path: Path) -> None:
    arguments = ("attribute-logits", "--preset", "tiny", "--category", "all", "--json")
    result = sfc(*arguments, root=tmp_path).result
    assert result["reconstruction_error"] < 1e-4
    assert result["n_heads"] == len(result["heads"]) == 8
    components = pd.read_csv(tmp_path / result["files"]["components"])
    prompts = pd.read_csv(tmp_path / result["files"]["prompts"])
    assert prompts["category"].nunique() == 10
    assert prompts["label"].value_counts().to_dict() == {"toxic": result["n_toxic"], "safe": result["n_safe"]}
    for label in ("toxic", "safe"):
        mean = prompts.loc[prompts["label"] == label, "logit_difference"].mean()
        assert components[f"{label}_mean"].sum() == pytest.approx(mean, abs=1e-4)
        assert result["logit_difference"][label]["mean"] == pytest.approx(mean, abs=1e-3)
    for role in ("guardrail", "compliance"):
        assert sorted(components.loc[components["role"] == role, "component"]) == sorted(result[role])
    assert len(pd.read_csv(tmp_path / result["files"]["groups"])) == 10 * 2 * len(components)
    page = (tmp_path / result["files"]["page"]).read_text(encoding="utf-8")
    assert all(head["component"] in page for head in result["heads"])
