"""What can be wrong with a machine, its data and its artifacts, each checked by looking."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import NamedTuple

from sfc.core.artifacts import MANIFEST, Artifact
from sfc.core.errors import UserError
from sfc.run import Run
from sfc.studies.study import Finished

_WANTED_DISK = 3 << 30
_WANTED_MEMORY = 6 << 30


class Check(NamedTuple):
    """One thing looked at."""

    what: str
    ok: bool
    finding: str


def examine(run: Run) -> list[Check]:
    """Look at Python, libraries, device, memory, disk, model, prompts and the artifacts of this run."""
    checks = {
        "python": _python,
        "libraries": _libraries,
        "device": lambda: _device(run.device),
        "memory": _memory,
        "disk": lambda: _disk(run),
        "model": lambda: _model(run),
        "prompts": lambda: _prompts(run),
        "store": lambda: _store(run),
        "SAEs": lambda: _saes(run),
    }
    return [_checked(what, check) for what, check in checks.items()] + list(_circuits(run))


def _checked(what: str, check: Callable[[], str]) -> Check:
    try:
        return Check(what, True, check())
    except UserError as error:
        return Check(what, False, str(error))


def _python() -> str:
    return f"{sys.version.split()[0]} at {sys.prefix}"


def _libraries() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens", "sae-lens"))


def _device(name: str) -> str:
    import torch

    from sfc.models.loading import choose_device

    device = choose_device(name)
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads"


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total < _WANTED_MEMORY:
        raise UserError(f"{total / 2**30:.1f} GiB of memory; the embedded model's demo wants 6")
    return f"{total / 2**30:.1f} GiB"


def _disk(run: Run) -> str:
    if not os.access(run.root, os.W_OK):
        raise UserError(f"no permission to write in {run.root.resolve()}; choose another --root")
    free = shutil.disk_usage(run.root).free
    if free < _WANTED_DISK:
        raise UserError(f"{free / 2**30:.1f} GiB free in {run.root.resolve()}; the demo wants 3")
    return f"{free / 2**30:.1f} GiB free in {run.root.resolve()}"


def _model(run: Run) -> str:
    from sfc.models.loading import load_model

    model = load_model(run.experiment.model)
    model.check_sites(run.experiment.activations.sites)
    return f"{run.experiment.model.source}: {model.n_layers} layers of {model.d_model} dimensions; all sites are there"


def _prompts(run: Run) -> str:
    counts = run.prompts.frame["dataset_type"].value_counts()
    return f"{run.data_folder}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def _store(run: Run) -> str:
    if not run.store.is_complete():
        return f"not collected yet ({run.store.folder})"
    from sfc.saes.store import Store

    store, expected = Store(run.store.folder), run.store.manifest()["n_rows"]
    if store.n_tokens != expected:
        raise UserError(f"{store.folder} has {store.n_tokens} rows, not {expected}; run `sfc collect --rebuild`")
    for site in store.sites:
        store.verify(site)
    return f"{store.folder}: {expected:,} rows of {len(store.sites)} sites; every checksum is right, all is finite"


def _saes(run: Run) -> str:
    if not run.saes.is_complete():
        return f"not trained yet ({run.saes.folder})"
    from sfc.saes.format import load_dictionaries

    dictionaries = load_dictionaries(run.saes.folder, run.experiment.activations.sites)
    quality = Finished(run.saes.folder).result["quality"]
    unexplained = fmean(row["fvu"] for row in quality if row["role"] == "all")
    return f"{run.saes.folder}: {len(dictionaries)} dictionaries, variance unexplained {unexplained:.3f} on average"


def _circuits(run: Run) -> Iterator[Check]:
    from sfc.circuits.files import load_circuit

    def sound(artifact: Artifact) -> str:
        graph = load_circuit(artifact.folder / "circuit.json")
        return f"{artifact.folder}: {graph.number_of_nodes()} nodes, {graph.number_of_edges()} edges"

    for manifest in sorted((run.root / "circuits" / run.experiment.name).glob(f"circuit-*/{MANIFEST}")):
        yield _checked("circuit", lambda folder=manifest.parent: sound(Artifact(folder, {})))
