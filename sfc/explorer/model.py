"""Prompts put to the model of a circuit: which of its features fire where, and what scaling and steering do."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from sfc.api import open_model, steer
from sfc.behaviors.behavior import Words
from sfc.circuits.files import load_circuit
from sfc.core.experiments import experiment_of
from sfc.features.labels import labels_of
from sfc.features.session import Firing, PromptSession
from sfc.models.edits import Steering
from sfc.pages.style import axis, styled_figure, words_of
from sfc.pages.text import hover_text, printable
from sfc.run import Run
from sfc.studies.steer.directions import finished_directions

_SHOWN_FEATURES = 30
_LONGEST_LABEL = 44


class Changes(NamedTuple):
    """What is done to the model."""

    factors: Mapping[str, float] = {}
    """what features are multiplied with, by name"""
    direction: str | None = None
    """what is steered along, as `sfc.steer` takes it; None: nothing"""
    alpha: float = 0.0


NOTHING = Changes()


class CircuitModel:
    """The model of one circuit at a time; it is loaded when the first prompt is put to it."""

    def __init__(self, root: Path, device: str) -> None:
        self._root, self._device = root, device
        # One prompt at a time: interventions of two runs would meet in the same model.
        self._lock = Lock()

    def features(self, folder: Path) -> dict[str, str]:
        """The features of a circuit, the largest |effect| first, with what they are called."""
        graph, labels = _circuit(folder), labels_of(folder)
        names = [name for name, data in graph.nodes(data=True) if data["kind"] == "feature"]
        names.sort(key=lambda name: -abs(graph.nodes[name]["effect"]))
        return {name: printable(f"{name} {labels.get(name, '')}".strip()) for name in names}

    def words(self, folder: Path) -> Words:
        """How what the circuit explains is spoken of."""
        return words_of(_circuit(folder))

    def fires(self, folder: Path, prompt: str) -> Firing:
        """As `PromptSession.fires`, for all features of the circuit."""
        with self._lock:
            return self._probe(folder).fires(prompt, list(self.features(folder)))

    def directions(self, folder: Path) -> dict[str, str]:
        """What its model can be steered along, with what it is called: finished directions, and the features."""
        return {name: name for name in finished_directions(_run(*self._source(folder)))} | self.features(folder)

    def score(self, folder: Path, prompt: str, changes: Changes = NOTHING) -> float:
        """As `PromptSession.score_of`."""
        with self._lock:
            return self._probe(folder).score_of(prompt, changes.factors, self._steering(folder, changes))

    def reply(self, folder: Path, prompt: str, changes: Changes = NOTHING) -> str:
        """As `PromptSession.reply`."""
        with self._lock:
            steering = self._steering(folder, changes)
            return self._probe(folder).reply(prompt, changes.factors, steering=steering)

    def _probe(self, folder: Path) -> PromptSession:
        return _opened(*self._source(folder))

    def _steering(self, folder: Path, changes: Changes) -> Steering | None:
        if changes.direction is None:
            return None
        return _steered(*self._source(folder), changes.direction, changes.alpha)

    def _source(self, folder: Path) -> tuple[str, Path, str, str]:
        facts = _circuit(folder).graph
        return json.dumps(facts["experiment"]), self._root, str(facts["data"]), self._device


@lru_cache(maxsize=4)
def _circuit(folder: Path) -> nx.DiGraph:
    return load_circuit(folder / "circuit.json")


@lru_cache(maxsize=4)
def _run(experiment: str, root: Path, data: str, device: str) -> Run:
    return Run.of(experiment_of(json.loads(experiment)), root, data, device)


@lru_cache(maxsize=1)
def _opened(*source: Any) -> PromptSession:
    return open_model(_run(*source))


@lru_cache(maxsize=8)
def _steered(experiment: str, root: Path, data: str, device: str, direction: str, alpha: float) -> Steering:
    return steer(_run(experiment, root, data, device), direction, alpha)


def firing_figure(firing: Firing, titles: Sequence[str]) -> go.Figure:
    """The features that fire most on a prompt, a row each, shaded by their share of their own largest value here."""
    peaks = firing.values.max(0, initial=0)
    order = [int(number) for number in np.argsort(-peaks, kind="stable")[:_SHOWN_FEATURES] if peaks[number] > 0][::-1]
    figure = styled_figure(
        f"{len(order)} of {int((peaks > 0).sum())} circuit features that fire", 120 + 19 * len(order)
    )
    values = firing.values[:, order].T
    names = [hover_text(titles[number][:_LONGEST_LABEL]) for number in order]
    figure.add_trace(
        go.Heatmap(
            z=values / np.maximum(peaks[order], 1e-9)[:, None] if order else [],
            customdata=values,
            x=list(range(len(firing.tokens))),
            y=list(range(len(order))),
            colorscale=[[0, "#ffffff"], [1, "#d55e00"]],
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate="%{customdata:.3g}<extra></extra>",
        )
    )
    tokens = [hover_text(printable(token)) for token in firing.tokens]
    figure.update_layout(
        margin={"l": 330, "t": 44, "b": 90},
        xaxis=axis("", tickvals=list(range(len(tokens))), ticktext=tokens, tickangle=-50, showgrid=False),
        yaxis=axis("", tickvals=list(range(len(order))), ticktext=names, showgrid=False),
    )
    return figure
