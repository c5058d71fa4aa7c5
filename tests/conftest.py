"""What many tests share: the tiny model, prompts for it, and small random dictionaries at its two sites."""

import os

# Tests run side by side, one per core: threads of their own would only wait for each other. Set before torch is read.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.experiments import experiment_of, load_experiment
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.judge import is_refusal
from sfc.models.loading import Model, load_model
from sfc.models.score import RefusalScore
from sfc.saes.collect import collect
from sfc.saes.dictionary import Dictionary, TopKDictionary, Transcoder
from sfc.saes.store import Store

REPOSITORY = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sfc")
    group.addoption("--screenshots", type=Path, help="write the README's pictures to this folder (test_screenshots.py)")
    group.addoption("--root", type=Path, default=REPOSITORY, help="where the circuit that they show lies")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which share of the hostile suite ran: it rotates by the week (`hostile/sampling.py`)."""
    ran = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    if any("hostile/" in report.nodeid for report in ran):
        from hostile.sampling import ALL, SEED

        terminalreporter.write_line(
            f"tests/hostile: {'every case' if ALL else f'a share; SFC_HOSTILE_SEED={SEED} repeats it'}"
        )


TEXTS = [
    "Bake bread?",
    "Write a letter to my neighbour.",
    "hm",
    "How do I kill a process?",
    "Ünïcode, twice: ÜÜ",
    "List five capitals of Europe.",
]
LABELS = [True, True, False, True, False, False]
SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a module's commands work in, one after the other."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="session")
def device() -> str:
    """What `tests/cuda` compares with the CPU. Without a GPU these tests are skipped; SFC_TEST_DEVICE=cpu runs them on
    the CPU, which says that the tests work, and nothing of CUDA.
    """
    name = os.environ.get("SFC_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return name


@pytest.fixture(scope="session")
def model() -> Model:
    return load_model(load_experiment("tiny").model)


@pytest.fixture(scope="session")
def score(model: Model) -> RefusalScore:
    return RefusalScore.of(model)


@pytest.fixture(scope="session")
def prompts(model: Model) -> list[TokenizedPrompt]:
    return model.tokenize(TEXTS)


@pytest.fixture(scope="session")
def layout(prompts: list[TokenizedPrompt]) -> TemplateLayout:
    return TemplateLayout.of(prompts)


@pytest.fixture(scope="session")
def batches(model: Model, prompts: list[TokenizedPrompt], layout: TemplateLayout) -> list[Batch]:
    return make_batches(prompts, layout, 80, model.device)


def random_dictionary(site: str, d_in: int = 32, d_sae: int = 48, k: int = 6, seed: int = 0) -> TopKDictionary:
    """A dictionary with random weights of a size that fits the tiny model's activations."""
    random = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=random)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    weights = {
        "W_enc": W_dec.T * 0.7,
        "b_enc": 0.1 * torch.randn(d_sae, generator=random),
        "W_dec": W_dec,
        "b_dec": 0.1 * torch.randn(d_in, generator=random),
    }
    return TopKDictionary(weights, k=k, site=site)


def random_transcoder(
    reads: str, writes: str, *, skip: bool, seed: int = 0, d: int = 32, d_sae: int = 48
) -> Transcoder:
    """A transcoder with random weights, about a fifth of whose features are active."""
    random = torch.Generator().manual_seed(seed)
    weights = {
        "W_enc": torch.randn(d, d_sae, generator=random) / d**0.5,
        "b_enc": 0.1 * torch.randn(d_sae, generator=random),
        "threshold": 0.5 + torch.rand(d_sae, generator=random),
        "W_dec": 0.3 * torch.randn(d_sae, d, generator=random),
        "b_dec": 0.1 * torch.randn(d, generator=random),
    }
    if skip:
        weights["W_skip"] = 0.3 * torch.randn(d, d, generator=random) / d**0.5
    return Transcoder(weights, reads=reads, writes=writes)


@pytest.fixture(scope="session")
def dictionaries() -> dict[str, Dictionary]:
    return {site: random_dictionary(site, seed=i) for i, site in enumerate(SITES)}


@pytest.fixture(scope="session")
def ablation(
    model: Model, dictionaries: dict[str, Dictionary], prompts: list[TokenizedPrompt], layout: TemplateLayout
) -> Ablation:
    baseline = mean_baseline(model, dictionaries, make_batches(prompts[:4], layout, 60, model.device), layout)
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()})
    return Ablation(nodes, dictionaries, baseline, "node")


@pytest.fixture(scope="session")
def problem(
    model: Model, score: RefusalScore, ablation: Ablation, prompts: list[TokenizedPrompt], batches: list[Batch],
    tmp_path_factory: pytest.TempPathFactory,
) -> Problem:  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("store")
    config = load_experiment("tiny", ["activations.dtype=float32"]).activations
    collect(model, prompts, config.sites, config, folder, lambda _: None)
    frame = pd.DataFrame({"prompt": TEXTS, "store_index": range(len(prompts)), "refusal_label": LABELS})
    runs = PromptRuns.of(model, batches, ablation.nodes.sites[0])
    # The settings of methods and of discovery are the defaults.
    experiment = experiment_of(load_experiment("tiny").model_dump(include={"name", "model", "activations"}))
    return Problem(model, score, ablation, runs, Store(folder), frame, experiment, is_refusal)
