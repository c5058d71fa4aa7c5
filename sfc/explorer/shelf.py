"""The circuits that lie below a root folder, as the explorer offers them."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sfc.artifacts import MANIFEST, read_json
from sfc.circuits.circuit import load_circuit


class Shelved(NamedTuple):
    """A finished circuit."""

    key: str
    """its folder below `circuits/`"""
    preset: str
    category: str
    method: str
    """with the fingerprint, which tells apart what has other settings"""
    folder: Path


def shelf(root: Path) -> dict[str, Shelved]:
    """The finished circuits below `root/circuits`, by key, in the order of their names."""
    found = {}
    for manifest in sorted((root / "circuits").glob(f"*/circuit-*/{MANIFEST}")):
        folder, result = manifest.parent, read_json(manifest).get("result")
        if isinstance(result, dict) and (folder / "circuit.json").is_file():
            key = folder.relative_to(root / "circuits").as_posix()
            method = f"{result['method']} · {folder.name.rpartition('-')[2]}"
            found[key] = Shelved(key, str(result["preset"]), str(result["category"]), method, folder)
    return found


def shared_core(first: Path, second: Path) -> set[str] | None:
    """The nodes that two circuits have in common; None where their dictionaries differ."""
    inputs = [read_json(folder / MANIFEST).get("inputs", {}).get("saes") for folder in (first, second)]
    if inputs[0] is None or inputs[0] != inputs[1]:
        return None
    return set(_graph(first)) & set(_graph(second))


@lru_cache(maxsize=8)
def _graph(folder: Path) -> Any:
    return load_circuit(folder / "circuit.json")
