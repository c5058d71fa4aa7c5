"""The finished artifacts of a run, as they lie on the disk. A report reads these files and nothing else."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sfc.core.artifacts import MANIFEST, hash_of_file, read_json
from sfc.core.errors import UserError

REPORT, SAES = "report", "saes"
_READ = (".json", ".csv")


class Found(NamedTuple):
    """A finished artifact."""

    kind: str
    """what it is, such as `patching`"""
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What it was made from."""
        return self.manifest.get("inputs", {})

    @property
    def name(self) -> str:
        """Its name without the fingerprint."""
        return self.folder.name.rpartition("-")[0]

    @property
    def place(self) -> str:
        """The folder below the root."""
        return "/".join(self.folder.parts[-2 if self.kind == SAES else -3 :])

    @property
    def result(self) -> Mapping[str, Any]:
        """Its figures: `result.json` where there is one, else those of the manifest."""
        path = self.folder / "result.json"
        return read_json(path) if path.is_file() else self.manifest.get("result", {})

    def table(self, name: str) -> pd.DataFrame:
        """One of its CSV files.

        Raises:
            UserError: it is missing or no table.
        """
        try:
            return pd.read_csv(self.folder / name)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.folder / name} ({error}); make it again with --rebuild") from None


def find_artifacts(folder: Path, model: Mapping[str, Any]) -> tuple[list[Found], list[Found]]:
    """The finished artifacts in a folder, oldest first: those made with this model, and those made with another.

    Args:
        model: what manifests say of the model (`model_identity`).
    """
    folders = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    found = [found_in(each, each.name.partition("-")[0]) for each in folders]
    found = sorted((each for each in found if each.kind != REPORT), key=lambda each: each.manifest.get("created", ""))
    # Circuits name the model where their prompts were run.
    models = [each.inputs.get("model") or _model_of_prompts(each.inputs) for each in found]
    same = [made_with in (None, model) for made_with in models]
    both = list(zip(found, same, strict=True))
    return [each for each, mine in both if mine], [each for each, mine in both if not mine]


def found_in(folder: Path, kind: str) -> Found:
    """A finished artifact's folder, read.

    Raises:
        UserError: its manifest is no JSON.
    """
    return Found(kind, folder, read_json(folder / MANIFEST))


def hashes(found: Found) -> dict[str, str]:
    """SHA-256 of every file of an artifact that a report may read."""
    return {path.name: hash_of_file(path) for path in _files(found.folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix in _READ and path.is_file())


def _model_of_prompts(inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    prompts = inputs.get("prompts")
    return prompts.get("model") if isinstance(prompts, Mapping) else None
