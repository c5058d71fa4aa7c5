"""Which circuits are judged, and on which prompts."""

from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from sfc.core.options import Options, option
from sfc.data.read import LABELS


class EvaluateOptions(Options):
    """Which circuits are judged, on whose test prompts."""

    section = "evaluate"
    circuits: list[str] = option(
        [],
        positional=True,
        description="circuit.json files, node lists (.json or .csv), graph files of circuit-tracer; none: the"
        " category's own circuit",
    )
    category: str | None = option(None, description="OR-Bench category, or all, whose test prompts judge them")
    prompts: list[str] = option(
        [],
        description="judge on the prompts of these CSV files instead (column prompt, and label: toxic, hard or safe;"
        " XSTest's columns work). FILE=toxic says what prompts without a label are. A side that no file has is that of"
        " the category's test prompts",
    )
    limit: int = Field(100, ge=1, description="with --prompts: at most this many prompts of each kind, chosen by hash")


class PromptFile(NamedTuple):
    """A file of prompts, and the label of those that have none."""

    path: Path
    label: str | None

    @classmethod
    def of(cls, text: str) -> "PromptFile":
        """What `FILE` or `FILE=toxic` names."""
        path, _, label = text.rpartition("=")
        return cls(Path(path), label) if path and label in LABELS else cls(Path(text), None)
