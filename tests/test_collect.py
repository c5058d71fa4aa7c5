"""Collection: the right rows, at any site, whatever happens on the way."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from sfc.core.config import ActivationsConfig
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.core.sites import site_of
from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.interventions import intervening
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.saes.collect import collect
from sfc.saes.store import Store

SITES = [site_of("resid_post", 0), site_of("resid_post", 1)]
KINDS = ("resid_pre", "hook_z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def nothing(_: int) -> None:
    pass


@pytest.fixture(scope="module")
def config() -> ActivationsConfig:
    overrides = ["activations.dtype=float32", "activations.batch_tokens=80", "activations.shard_tokens=90"]
    return load_experiment("tiny", overrides).activations


def contents(folder: Path) -> dict[str, Any]:
    """Every data set of every shard."""
    found = {}
    for path in sorted(folder.glob("shard-*.h5")):
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item, path=path: (
                    found.update({f"{path.name}/{name}": item[()].tobytes()})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    return found


@pytest.fixture(scope="module")
def undisturbed(
    model: Model, prompts: list[TokenizedPrompt], config: ActivationsConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    collect(model, prompts, SITES, config, folder, nothing)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_content_and_suffix_rows_are_as_single_runs_give_them(
    kind: Any, model: Model, prompts: list[TokenizedPrompt], config: ActivationsConfig, tmp_path: Path
) -> None:
    site = site_of(kind, 1)
    steps: list[int] = []
    n_rows = collect(model, prompts, [site], config, tmp_path, steps.append)
    store = Store(tmp_path)
    assert len(list(tmp_path.glob("shard-*.h5"))) > 1 and n_rows == store.n_tokens
    assert sum(steps) == sum(len(prompt.ids) for prompt in prompts)
    values = torch.cat([store.read(site, *block) for block in store.blocks(1000)])
    for index, prompt in enumerate(prompts):
        rows = np.flatnonzero(store.tokens.prompt == index)
        positions = store.tokens.position[rows]
        expected = [p for p in range(1, len(prompt.ids)) if prompt.roles[p] != Role.PREFIX]
        assert sorted(positions) == expected
        assert (store.tokens.token[rows] == prompt.ids[positions]).all()
        assert (store.tokens.role[rows] == prompt.roles[positions]).all()
        seen: list[torch.Tensor] = []
        batch = make_batches([prompt], TemplateLayout.of(prompts), 1, model.device)[0]
        last_logits(model, batch, {site: seen.append})
        torch.testing.assert_close(values[rows], seen[0][0, positions].flatten(1), atol=1e-5, rtol=1e-4)


def test_an_interrupted_collection_goes_on_and_gives_the_same_files(
    model: Model, prompts: list[TokenizedPrompt], config: ActivationsConfig, tmp_path: Path, undisturbed: Path
) -> None:
    class Interrupted(Exception):
        pass

    batches: list[int] = []

    def interrupt(tokens: int) -> None:
        batches.append(tokens)
        if len(batches) % 3 == 0:
            raise Interrupted

    for _ in range(4):
        with pytest.raises(Interrupted):
            collect(model, prompts, SITES, config, tmp_path, interrupt)
    while contents(tmp_path) != contents(undisturbed):
        collect(model, prompts, SITES, config, tmp_path, nothing)
        assert contents(tmp_path) == contents(undisturbed)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in undisturbed.iterdir()}


def _in_a_child(target: Callable[[], Any]) -> Any:
    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    return child


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_moment_costs_no_more_than_the_batches_in_flight(
    seed: int, model: Model, prompts: list[TokenizedPrompt], config: ActivationsConfig, tmp_path: Path,
    undisturbed: Path,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    journalled = 0
    for _ in range(6):
        child = _in_a_child(lambda: collect(model, prompts, SITES, config, tmp_path, lambda _: time.sleep(0.01)))
        time.sleep(random.uniform(0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        lines = sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*.journal"))
        done = lines + sum(_n_batches(path) for path in tmp_path.glob("shard-*.h5"))
        assert done >= journalled, "what was on the disk stays"
        journalled = done
    collect(model, prompts, SITES, config, tmp_path, nothing)
    assert contents(tmp_path) == contents(undisturbed)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in undisturbed.iterdir()}


def _n_batches(path: Path) -> int:
    with h5py.File(path) as file:
        batches: Any = file["batches"]
        return len(batches)


def test_a_full_disk_is_told_and_what_was_finished_stays(
    model: Model, prompts: list[TokenizedPrompt], config: ActivationsConfig, tmp_path: Path, undisturbed: Path
) -> None:
    sizes = sorted(path.stat().st_size for path in undisturbed.glob("*.h5"))
    assert sizes[0] < sizes[-1]

    def with_a_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, sizes[-1] - 1))
        try:
            collect(model, prompts, SITES, config, tmp_path, nothing)
        except UserError as error:
            (tmp_path / "error").write_text(str(error))

    _in_a_child(with_a_limit).join()
    message = (tmp_path / "error").read_text()
    assert "cannot write" in message and "File too large" in message and "goes on" in message
    (tmp_path / "error").unlink()
    finished = contents(tmp_path)
    assert finished and finished.items() < contents(undisturbed).items()
    collect(model, prompts, SITES, config, tmp_path, nothing)
    assert contents(tmp_path) == contents(undisturbed)


def test_sites_are_added_to_a_store_that_stands(
    model: Model, prompts: list[TokenizedPrompt], config: ActivationsConfig, tmp_path: Path, undisturbed: Path
) -> None:
    more = [site_of("hook_z", 1), site_of("resid_mid", 0)]
    collect(model, prompts, SITES[:1], config, tmp_path, nothing)
    collect(model, prompts, [*SITES, *more], config, tmp_path, nothing)
    assert set(Store(tmp_path).sites) == {*SITES, *more}
    together = contents(tmp_path)
    assert contents(undisturbed).items() <= together.items(), "what stood is as it was"
    at_once = tmp_path / "at once"
    at_once.mkdir()
    collect(model, prompts, [*SITES, *more], config, at_once, nothing)
    assert contents(at_once) == together
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.h5")}
    collect(model, prompts, more, config, tmp_path, nothing)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.h5")} == times


def test_activations_that_overflow_are_refused_and_leave_no_shard(
    model: Model, prompts: list[TokenizedPrompt], config: ActivationsConfig, tmp_path: Path
) -> None:
    half = config.model_copy(update={"dtype": "float16"})
    with intervening(model, {SITES[0]: lambda x: 1e6 * x}), pytest.raises(UserError, match="not finite in float16"):
        collect(model, prompts, SITES[:1], half, tmp_path, nothing)
    assert not list(tmp_path.glob("*.h5"))
