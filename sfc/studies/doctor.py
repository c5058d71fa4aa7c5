"""What can be wrong with a machine, its data and its artifacts, each checked by looking."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from sfc.circuits.files import load_circuit
from sfc.core.contents import MANIFEST, check_contents, check_kept, check_sizes
from sfc.core.errors import UserError
from sfc.core.machine import check_memory, size
from sfc.models.sources import embedded_model_folder, tiny_model_folder
from sfc.run import Run
from sfc.studies.study import Finished

_LIBRARIES = ("torch", "transformers", "transformer-lens", "sae-lens")
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
        "python": lambda: f"{sys.version.split()[0]} at {sys.prefix}",
        "libraries": lambda: ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
        "device": lambda: _device(run.device),
        "memory": _memory,
        "disk": lambda: _disk(run),
        "model": lambda: _model(run),
        "model cache": lambda: _model_cache(run),
        "prompts": lambda: _prompts(run),
        "store": lambda: _store(run),
        "SAEs": lambda: _saes(run),
    }
    return [_checked(what, check) for what, check in checks.items()] + list(_artifacts(run))


def _checked(what: str, check: Callable[[], str]) -> Check:
    try:
        return Check(what, True, check())
    except UserError as error:
        return Check(what, False, str(error))


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


def _model_cache(run: Run) -> str:
    made = {"embedded": embedded_model_folder, "tiny": tiny_model_folder}
    if run.experiment.model.source not in made:
        return "not used by this model"
    folder = made[run.experiment.model.source]()
    return f"{folder}: {check_kept(folder, fully=True)} files, all as they were written"


def _prompts(run: Run) -> str:
    counts = run.prompts.frame["dataset_type"].value_counts()
    return f"{run.data_folder}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def _store(run: Run) -> str:
    if not run.store.is_complete():
        return f"not collected yet ({run.store.folder})"
    return f"{run.store.folder}: {run.store.manifest()['n_rows']:,} rows, {_sound(run.store.folder)}"


def _saes(run: Run) -> str:
    if not run.saes.is_complete():
        return f"not trained yet ({run.saes.folder})"
    from sfc.saes.format import Dictionaries

    dtype = run.experiment.saes.dtype
    dictionaries = Dictionaries(run.saes.folder, run.experiment.activations.sites, dtype=dtype)
    check_memory(dictionaries.memory, f"{len(dictionaries)} dictionaries", "--set saes.dtype=bfloat16")
    list(dictionaries.values())
    takes = f"{len(dictionaries)} dictionaries, {size(dictionaries.memory)} in {dtype}"
    quality = Finished(run.saes.folder).result["quality"]
    unexplained = fmean(row["fvu"] for row in quality if row["role"] == "all")
    sound = _sound(run.saes.folder)
    return f"{run.saes.folder}: {takes}, variance unexplained {unexplained:.3f}; {sound}"


def _artifacts(run: Run) -> Iterator[Check]:
    """Every finished artifact below the root, whatever it is of, but for the store and the SAEs of the run."""
    places = ("activations/*", "corpora/*", "saes/*", "circuits/*/*")
    manifests = (path for place in places for path in sorted(run.root.glob(f"{place}/{MANIFEST}")))
    for folder in (path.parent for path in manifests):
        if folder not in (run.store.folder, run.saes.folder):
            yield _checked(folder.name.rpartition("-")[0], lambda folder=folder: f"{folder}: {_sound(folder)}")


def _sound(folder: Path) -> str:
    """How many files of an artifact are as they were written: all.

    Raises:
        UserError: one of them is missing or damaged.
    """
    check_sizes(folder)
    n_files, n_rows = check_contents(folder), 0
    if any(folder.glob("shard-*.h5")):
        from sfc.saes.store import Store, read_prompts

        store = Store(folder)
        n_rows = store.n_tokens
        for site in store.sites:
            store.verify(site)
        if len(read_prompts(folder)) <= store.tokens.prompt.max():
            raise UserError(f"{folder} has rows of prompts that its table lacks; make it again with --rebuild")
    if (circuit := folder / "circuit.json").is_file():
        load_circuit(circuit)
    if n_files is None:
        return "of an earlier version, whose files have no hashes; make it again with --rebuild to have them checked"
    return f"{n_files} files as they were written" + (f", {n_rows:,} rows with right checksums" if n_rows else "")
