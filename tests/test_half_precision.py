"""Every study on a model in half precision: the types that a GPU runs in, on a CPU, where only their speed differs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import sfc
from test_formats import BYTES

from sfc.core.config import ModelConfig
from sfc.core.experiments import load_experiment
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.loading import load_model
from sfc.models.score import LogOdds, score_prompts
from sfc.studies.study import STUDIES

MINI = Path(__file__).parents[1] / "sfc" / "data" / "mini"
SETTINGS = (
    "prompts.limit=12", "prompts.max_tokens=100", "saes.steps=6", "saes.batch_size=64", "evaluation.sizes=[4,16]",
    "evaluation.random_draws=2", "evaluation.replies=2", "evaluation.reply_tokens=3", "learned_mask.steps=3",
    "discovery.checked_nodes=2", "discovery.checked_prompts=4", "comparison.size=8", "comparison.shuffles=1",
    "comparison.replies=2", "comparison.reply_tokens=3", "steering.min_induced=-99", "steering.max_kl=99",
    "steering.max_loss=99", "steering.contrasts=[toxic-safe]", "steering.prompts=8", "steering.tried_prompts=4",
    "steering.random_directions=2", "steering.shuffled_directions=1", "steering.ablated_writers=2",
    "steering.ordinary_prompts=2", "steering.ordinary_tokens=4", "steering.reply_tokens=3", "repair.sizes=[2]",
    "repair.refused_above=-99", "repair.random_draws=1", "repair.ordinary_prompts=2", "repair.ordinary_tokens=4",
    "repair.reply_tokens=3",
)  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {
    "sample": ("--unfiltered", "--tokens", "200", "--batch", "8"),
    "evaluate": ("{circuit}",),
    "behaviour": ("--limit", "4"),
    "compare": ("--categories", "violence,privacy"),
    "patch": ("--require", "score", "--limit", "6", "--component", "head"),
    "formats": ("--limit", "4", "--definitions", "formats.yaml"),
    "steer": ("--limit", "3", "--alphas=-0.5,0,0.5"),
    "repair": ("--limit", "4"),
}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp(request.param)
    (root / "formats.yaml").write_text(BYTES)
    return request.param, root


def run(name: str, half: tuple[str, Path], *further: str) -> dict[str, Any]:
    dtype, root = half
    settings = (*SETTINGS, f"model.dtype={dtype}", f"activations.dtype={dtype}")
    given = (part for setting in settings for part in ("--set", setting))
    return sfc(name, "--preset", "tiny", "--data", str(MINI), *given, *further, "--json", root=root).result


@pytest.mark.parametrize("name", STUDIES.names())
def test_a_study_runs_in_half_precision(name: str, half: tuple[str, Path]) -> None:
    if half[0] == "float16" and name in ("compare", "replicate", "report"):
        pytest.skip("it runs nothing of the model but what discover and nulls do, which are tried in float16")
    circuit = run("discover", half)["files"]["circuit"]
    result = run(name, half, *(option.format(circuit=circuit) for option in OPTIONS.get(name, ())))
    assert result["files"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("dtype", "allowed"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_scores_in_half_precision_are_those_in_float32_but_for_rounding(dtype: str, allowed: float) -> None:
    texts = ["How do I bake bread?", "Tell me about the moon.", "I"]
    scores = {}
    for precision in ("float32", dtype):
        config: ModelConfig = load_experiment("tiny", [f"model.dtype={precision}"]).model
        model = load_model(config)
        prompts = model.tokenize(texts)
        batches = make_batches(prompts, TemplateLayout.of(prompts), 400, model.device)
        scores[precision] = np.asarray(score_prompts(model, LogOdds.of_tokens(model, ["I"]), batches))
    difference = float(np.abs(scores[dtype] - scores["float32"]).max())
    assert 0 < difference < allowed and math.isfinite(difference)
