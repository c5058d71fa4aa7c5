"""Models whose numbers are not finite, whose positions are too few, or whose files are not what they seem."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from commands import sfc
from conftest import TEXTS
from safetensors.torch import load_file, save_file

from hostile.families import N_LAYERS, WIDTH, tiny_network
from sfc.core.config import ModelConfig
from sfc.core.errors import CannotLoadModel, UserError
from sfc.core.experiments import load_experiment
from sfc.data.render import TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import Batch, TemplateLayout, flush_right, make_batches
from sfc.models.engine import NO_EDIT, Alike, Edits, PreparedPrompts
from sfc.models.generation import continue_tails, generate_ids
from sfc.models.interventions import Interventions
from sfc.models.judge import is_refusal
from sfc.models.loading import load_model, load_outline
from sfc.models.model import Model
from sfc.models.running import last_logits
from sfc.models.score import LogOdds, score_prompts
from sfc.models.sources import tiny_model_folder
from sfc.studies.behaviour.measure import measure_behaviour


def _copy(folder: Path, **config: Any) -> Path:
    """The tiny model in a folder of its own, with some of its configuration changed."""
    shutil.copytree(tiny_model_folder(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def _load(folder: Path, dtype: str = "float32") -> Model:
    config = ModelConfig(source=str(folder), dtype=dtype, refusal_tokens=["I"])  # pyright: ignore
    return load_model(config)


def _change(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


SITE = "blocks.0.hook_resid_post"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    folder = _copy(tmp_path / "model")
    _change(folder, DOWN, lambda weight: weight.index_fill(1, torch.tensor([3]), value))
    with pytest.raises(UserError, match=rf"the weights {DOWN} of model '{folder}' are not finite"):
        _load(folder)


def test_logits_that_overflow_in_half_precision_name_the_precision(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "model")
    _change(folder, DOWN, lambda weight: weight * 3e4)
    _load(folder)
    with pytest.raises(UserError, match=r"not finite in float16: --set model\.dtype=float32 or bfloat16"):
        _load(folder, "float16")


def test_numbers_that_are_not_finite_end_a_command_and_leave_nothing(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "model")
    _change(folder, DOWN, lambda weight: weight * 3e4)
    options = ("--preset", "tiny", "--set", f"model.source={folder}", "--set", "model.dtype=float16")
    (root := tmp_path / "root").mkdir()
    for command in ("behaviour", "collect", "discover"):
        finished = sfc(command, *options, root=root)
        assert finished.status == 2 and "not finite in float16" in finished.stderr.splitlines()[-1]
        assert "Traceback" not in finished.stderr
        assert not [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.fixture(scope="module")
def prepared(model: Model, prompts: list[TokenizedPrompt]) -> PreparedPrompts:
    return PreparedPrompts.of(model, make_batches(prompts, TemplateLayout.of(prompts), 200, model.device))


class _Breaking(Edits):
    def __len__(self) -> int:
        return 1

    def alike(self) -> list[Alike]:
        return [Alike([0], SITE)]

    def interventions(self, batch: Batch, members: Sequence[int]) -> Interventions:
        return Interventions({SITE: lambda x: x * torch.inf})


def test_what_an_edit_makes_not_finite_is_no_answer(model: Model, prepared: PreparedPrompts) -> None:
    broken = _Breaking()
    score = LogOdds.of_tokens(model, ["I"])
    for ask in (
        lambda: engine.scores(prepared, score, broken),
        lambda: engine.next_token_kl(prepared, broken),
        lambda: engine.replies(prepared, score, broken, 2),
    ):
        with pytest.raises(UserError, match="are not finite: its weights or what was changed in it are at fault"):
            ask()
    assert np.isfinite(engine.scores(prepared, score, NO_EDIT)).all()


def test_a_reply_that_becomes_not_finite_is_none(model: Model, prompts: list[TokenizedPrompt]) -> None:
    batch = make_batches(prompts, TemplateLayout.of(prompts), 4000, model.device)[0]
    with pytest.raises(UserError, match="the logits of some replies are not finite"):
        continue_tails(model, flush_right(batch), 3, in_reply={SITE: lambda x: x * torch.nan})


def test_scores_that_are_not_finite_are_none(model: Model, prompts: list[TokenizedPrompt]) -> None:
    batches = make_batches(prompts, TemplateLayout.of(prompts), 4000, model.device)
    with pytest.raises(UserError, match="the scores of some prompts are not finite"):
        score_prompts(model, lambda logits, _batch: logits[:, 0] * torch.nan, batches)


def test_prompts_longer_than_the_positions_are_refused_before_they_run(tmp_path: Path) -> None:
    model = _load(_copy(tmp_path / "model", max_position_embeddings=48))
    assert model.n_positions == 48 and load_outline(model.config).n_positions == 48
    fits, longer = model.tokenize(["x" * 40, "x" * 60])
    assert len(fits.ids) <= 48 < len(longer.ids)
    [batch] = make_batches([longer], TemplateLayout.of([longer]), 200, model.device)
    message = r"has 48 positions, a prompt with its reply needs \d+: lower prompts\.max_tokens"
    with pytest.raises(UserError, match=message):
        last_logits(model, batch)
    with pytest.raises(UserError, match=message):
        generate_ids(model, [fits], 48 - len(fits.ids) + 2, 400)
    assert generate_ids(model, [fits], 48 - len(fits.ids) + 1, 400)


@pytest.mark.parametrize("command", ["behaviour", "collect", "discover", "patch", "probe"])
def test_commands_check_the_positions_before_they_begin(command: str, tmp_path: Path) -> None:
    folder = _copy(tmp_path / "model", max_position_embeddings=128)
    (root := tmp_path / "root").mkdir()
    options = ("--preset", "tiny", "--set", f"model.source={folder}", "--set", "prompts.max_tokens=120")
    finished = sfc(command, *options, root=root)
    assert finished.status == 2 and "has 128 positions" in finished.stderr.splitlines()[-1]
    assert not [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_behaviour_leaves_out_prompts_without_room_and_counts_them(tmp_path: Path) -> None:
    model = _load(_copy(tmp_path / "model", max_position_embeddings=64))
    texts = [*TEXTS, "x" * 80]
    frame = pd.DataFrame({"id": texts, "prompt": texts, "category": "all", "label": "safe"})
    measured = measure_behaviour(model, frame, LogOdds.of_tokens(model, ["I"]), is_refusal, tmp_path, reply_tokens=4)
    assert measured.replies["prompt"].tolist() == TEXTS


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "quantised by a package that is not there": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "cannot load model",
    ),
    "quantised by what is no object": ({"quantization_config": "yes"}, "cannot load model"),
    "code of its own": (
        {"model_type": "sorcery", "auto_map": {"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}},
        "cannot load model",
    ),
    "an unknown kind": ({"model_type": "sorcery"}, "cannot load model"),
    "a kind that generates no text": ({"model_type": "vit"}, "cannot load model"),
    "sizes that are words": ({"hidden_size": "wide"}, "cannot load model"),
    "negative sizes": ({"num_hidden_layers": -2}, "cannot run LlamaForCausalLM"),
    "fewer layers than weights": ({"num_hidden_layers": 1}, "config.json has fewer layers than its files"),
    "more layers than weights": ({"num_hidden_layers": 9}, "its files lack weights"),
    "no heads": ({"num_attention_heads": 0}, "cannot load model"),
    "positions that are none": ({"rope_parameters": {"rope_type": "sorcery"}}, "cannot load model"),
}  # fmt: skip


@pytest.mark.parametrize("problem", BROKEN)
def test_a_model_that_cannot_be_had_is_one_line(problem: str, tmp_path: Path) -> None:
    changes, message = BROKEN[problem]
    folder = _copy(tmp_path / "model", **changes)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CannotLoadModel, match=message) as error:
        _load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700 and str(folder) in str(error.value)
    assert not (tmp_path / "ran").exists(), "code that comes with a model never runs"


def test_the_sizes_of_a_model_that_sees_are_those_of_its_text(tmp_path: Path) -> None:
    tiny_network("gemma3", tmp_path)
    outline = load_outline(ModelConfig(source=str(tmp_path), template="plain", refusal_tokens=["I"]))  # pyright: ignore
    assert (outline.n_layers, outline.d_model, outline.n_positions) == (N_LAYERS, WIDTH, 256)


def test_the_tiny_models_preset_has_room() -> None:
    experiment = load_experiment("tiny")
    assert load_outline(experiment.model).n_positions == 1024 > experiment.prompts.max_tokens
