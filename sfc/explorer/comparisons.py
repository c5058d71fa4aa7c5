"""The finished comparisons of categories below a root folder, and the circuits that their cells stand for."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from sfc.artifacts import MANIFEST, read_json
from sfc.explorer.shelf import Shelved, shelf


class Compared(NamedTuple):
    """A finished `sfc compare`."""

    name: str
    """of its folder"""
    preset: str
    result: dict[str, Any]
    """what `compare --json` prints"""
    command: str
    """that made it"""
    folder: Path

    @property
    def categories(self) -> list[str]:
        """In the order of the clustering."""
        return [self.result["categories"][number] for number in self.result["order"]]


def comparisons(root: Path) -> dict[str, Compared]:
    """The finished comparisons below `root/circuits`, by the names of their folders."""
    found = {}
    for path in sorted((root / "circuits").glob(f"*/comparison-*/{MANIFEST}")):
        manifest, folder = read_json(path), path.parent
        result = manifest["result"]
        found[folder.name] = Compared(folder.name, result["preset"], result, manifest["command"], folder)
    return found


def overlaps_of(compared: Compared) -> Float[np.ndarray, "categories categories"]:
    """The overlaps of halves by Jaccard's index, in the order of `result["categories"]`."""
    places = {category: number for number, category in enumerate(compared.result["categories"])}
    table = pd.read_csv(compared.folder / compared.result["files"]["overlap"])
    between = np.full((len(places), len(places)), np.nan)
    first, second = (table[side].map(places).to_numpy() for side in ("a", "b"))
    between[first, second] = between[second, first] = table["jaccard_halves"]
    return between


def circuit_like(root: Path, compared: Compared, category: str) -> Shelved | None:
    """A finished circuit of a category over the comparison's dictionaries, by its method and of its population."""
    wanted = _made_from(compared.folder)
    of_category = (c for c in shelf(root).values() if (c.preset, c.category) == (compared.preset, category))
    return next((circuit for circuit in of_category if _made_from(circuit.folder) == wanted), None)


def command_for(compared: Compared, category: str) -> str:
    """The command that makes what `circuit_like` looks for; `--set` of the comparison's own has to be added."""
    _, method, population = _made_from(compared.folder)
    options = ["--preset", compared.preset, "--category", category, "--method", method, "--population", population]
    return shlex.join(["sfc", "discover", *options])


def _made_from(folder: Path) -> tuple[Any, str, str]:
    inputs = read_json(folder / MANIFEST)["inputs"]
    return inputs["saes"], inputs["discovery"]["method"], inputs["discovery"]["population"]
