"""Every family of models that the bridge claims works as the plain model does, or is refused in one clear line.

`docs/models.md` lists those that work. Each is a small model with random weights, large enough ones that a difference
shows.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TEXTS, random_dictionary

from hostile.families import FAMILIES, N_LAYERS, WIDTH, tiny_network
from hostile.sampling import sample
from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import PromptRuns
from sfc.core.config import ModelConfig
from sfc.core.errors import CannotLoadModel, UserError
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.generation import generate_ids
from sfc.models.interventions import recorder
from sfc.models.loading import load_model, load_outline
from sfc.models.model import Model
from sfc.models.running import last_logits
from sfc.models.score import LogOdds

_ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$", re.MULTILINE)
WORKING = {
    family: architecture
    for architecture, families in _ROW.findall((REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8"))
    for family in re.findall(r"`([\w.-]+)`", families)
}
"""the architecture of every family that the docs say works"""
NOT_MADE = {"gemma3n"}
"""of which a small model cannot be made here: it sees by a package that is not installed"""


def _load(folder: Path) -> Model:
    return load_model(ModelConfig(source=str(folder), template="plain", refusal_tokens=["I"]))  # pyright: ignore


@pytest.mark.parametrize("family", sample([family for family in FAMILIES if family not in NOT_MADE], keep=5))
def test_a_family_works_as_the_docs_say(family: str, tmp_path: Path) -> None:
    network = tiny_network(family, tmp_path)
    if family not in WORKING:
        with pytest.raises(CannotLoadModel) as error:
            _load(tmp_path)
        assert type(network).__name__ in str(error.value) and "docs/models.md" in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 800
        return
    assert WORKING[family] == type(network).__name__
    model = _load(tmp_path)
    outline = load_outline(model.config)
    assert (outline.n_layers, outline.d_model) == (model.n_layers, model.d_model) == (N_LAYERS, WIDTH)
    assert outline.n_positions == model.n_positions
    _discover(model)
    _greedy_replies_are_the_plain_models(model, tmp_path)


def _discover(model: Model) -> None:
    """Scores, a recorded site, and an ablation: nothing of a circuit, all of it, and in between."""
    prompts = model.tokenize(TEXTS)
    layout = TemplateLayout.of(prompts)
    batches = make_batches(prompts, layout, 120, model.device)
    site = f"blocks.{N_LAYERS // 2}.hook_resid_post"
    model.check_sites([site])
    seen: dict[str, torch.Tensor] = {}
    last_logits(model, batches[0], {site: recorder(seen, site)})
    assert seen[site].shape == (*batches[0].ids.shape, WIDTH)
    spaces = {site: random_dictionary(site)}
    nodes = Nodes.of_spaces(spaces)
    ablation = Ablation(nodes, spaces, mean_baseline(model, spaces, batches, layout), "node")
    score, runs = LogOdds.of_tokens(model, ["I"]), PromptRuns.of(model, batches, site)
    keep = np.zeros((3, nodes.n_nodes), dtype=bool)
    keep[1, ::3] = keep[2] = True
    scores = ablated_scores(model, score, ablation, runs, keep)
    full = full_scores(model, score, runs)
    np.testing.assert_allclose(scores[2], full, atol=1e-3)
    assert np.isfinite(scores).all()
    assert np.abs(scores[0] - full).max() > 1e-3, "ablating everything changes something"


@torch.no_grad()
def _greedy_replies_are_the_plain_models(model: Model, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = model.tokenize(TEXTS[:3])
    for prompt, reply in zip(prompts, generate_ids(model, prompts, 4, 400), strict=True):
        ids = prompt.ids.tolist()
        for token in reply:
            logits = network(torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-3 * logits.abs().max()
            ids.append(token)


def test_the_docs_list_families_that_there_are() -> None:
    assert set(WORKING) < set(FAMILIES) and len(WORKING) > 50


@pytest.mark.parametrize(("family", "way"), [("cohere", "padded on the right"), ("mpt", "a cached step of generation")])
def test_what_a_bridge_gets_wrong_is_named_with_how_far_off_it_is(family: str, way: str, tmp_path: Path) -> None:
    tiny_network(family, tmp_path)
    with pytest.raises(CannotLoadModel, match=rf"computes something else than \w+ itself .*{way}.* off by \d+\.\d+%"):
        _load(tmp_path)


def test_an_architecture_that_the_bridge_lacks_is_named(tmp_path: Path) -> None:
    tiny_network("biogpt", tmp_path)
    with pytest.raises(CannotLoadModel, match="bridge does not fit BioGptForCausalLM, the architecture of"):
        _load(tmp_path)


def test_a_site_that_does_not_do_what_it_should_is_refused_with_the_reason(tmp_path: Path) -> None:
    tiny_network("opt", tmp_path / "opt")
    model = _load(tmp_path / "opt")
    with pytest.raises(UserError, match=r"OPTForCausalLM cannot be used at .*mlp_out'.*activations are \[32, 32\]"):
        model.check_sites(["blocks.1.hook_mlp_out"])
    tiny_network("granite", tmp_path / "granite")
    with pytest.raises(UserError, match=r"GraniteForCausalLM cannot be used at .*attn_out'.*nothing passes its hook"):
        _load(tmp_path / "granite").check_sites(["blocks.0.hook_attn_out"])
