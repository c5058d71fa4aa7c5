"""What a notebook needs, in few lines: `from sfc import load_preset, discover, plot, run_study, open_model, steer`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
import plotly.graph_objects as go
from pydantic import ValidationError

from sfc.core.artifacts import read_csv
from sfc.core.errors import UserError, first_problem, suggestion
from sfc.core.experiments import load_experiment
from sfc.features.labels import with_own_labels
from sfc.features.session import PromptSession
from sfc.pages.graph import circuit_figure
from sfc.pages.proof import curve_figure
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover import ensure_cards
from sfc.studies.steer.directions import steer
from sfc.studies.study import STUDIES, Finished, ensure

__all__ = [
    "Discovered", "Finished", "discover", "load_preset", "open_model", "plot", "plot_curve", "run_study", "steer",
]  # fmt: skip


@dataclass(frozen=True)
class Discovered:
    """A circuit, and everything that was found out about it."""

    run: Run
    folder: Path
    graph: nx.DiGraph
    curve: pd.DataFrame
    """the figures for every size, on test prompts"""
    result: dict[str, Any]
    """the figures of the reported circuit"""
    cards: dict[str, Any]
    """what its features mean (see `sfc.features.cards`)"""

    @property
    def nodes(self) -> pd.DataFrame:
        """The nodes with their effects and labels, the largest |effect| first."""
        labels = {name: card["label"] for name, card in self.cards["features"].items()}
        columns = ["layer", "kind", "effect", "rank"]
        frame = pd.DataFrame.from_dict(dict(self.graph.nodes(data=True)), orient="index")[columns]
        frame.insert(0, "label", [labels.get(str(name), "") for name in frame.index])
        return frame.sort_values("effect", key=abs, ascending=False)


def load_preset(
    preset: str = "smollm2",
    overrides: Iterable[str] = (),
    root: Path | str = ".",
    data: str = "mini",
    device: str = "auto",
) -> Run:
    """An experiment by the name of its preset or the path of a YAML file, below a folder for its artifacts.

    Args:
        overrides: such as `["discovery.method=attribution"]`.

    Raises:
        UserError: the preset or an override is wrong.
    """
    return Run.of(load_experiment(preset, overrides), Path(root), data, device)


def discover(run: Run, category: str = "violence") -> Discovered:
    """The circuit of a category; what is missing before it is made first, what is there is read.

    Raises:
        UserError: as `sfc discover`.
    """
    folder, graph, cards = ensure_cards(run, category)
    curve, result = read_csv(folder / "curve.csv"), Finished(folder).result
    return Discovered(run, folder, graph, curve, result, with_own_labels(cards, folder))


def run_study(run: Run, name: str, **options: Any) -> Finished:
    """Any study, by the name of its command: made unless it is up to date, after whatever it needs.

    What comes back has its figures (`.result`), its CSV files (`.table("layers.csv")`) and its page (`.page`).

    Args:
        options: the command's options, by the names of their fields: `run_study(run, "probe", category="privacy")`.

    Raises:
        UserError: there is no such study or option, a value is not valid, or as the command.
    """
    study = STUDIES[name]
    sections = {field: section for section, field in study.also}
    sections |= dict.fromkeys(study.options.model_fields, study.options)
    if unknown := next((option for option in options if option not in sections), None):
        raise UserError(f"the study {name!r} has no option {unknown!r}: {suggestion(unknown, sections)}")
    for section in dict.fromkeys(sections[option] for option in options):
        values = {option: value for option, value in options.items() if sections[option] is section}
        try:
            run = run.having(section, **values)
        except ValidationError as error:
            raise UserError(first_problem(error)) from None
    return ensure(study, run)


def plot(circuit: Discovered) -> go.Figure:
    """The graph of a circuit as an interactive figure."""
    return circuit_figure(circuit.graph, cards=circuit.cards["features"])


def plot_curve(circuit: Discovered) -> go.Figure:
    """Faithfulness and completeness of a circuit by its size."""
    return curve_figure(circuit.curve, len(circuit.graph))


def open_model(run: Run) -> PromptSession:
    """Load the model and its dictionaries: which features fire on a prompt, the score and reply with some of them off.

    Raises:
        UserError: the dictionaries are not there yet (`discover` makes them).
    """
    session = Session(run)
    return PromptSession(session.model, session.metric, session.dictionaries)
