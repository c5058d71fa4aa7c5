"""Prompts put to the model of a circuit: which of its features fire where, and what switching some off does."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from sfc.api import open_model
from sfc.circuits.circuit import load_circuit
from sfc.config import Experiment
from sfc.features.labels import labels_of
from sfc.features.probe import Firing, Probe
from sfc.run import Run
from sfc.viewer.style import axis, styled_figure
from sfc.viewer.text import hover_text, printable

_SHOWN_FEATURES = 30
_LONGEST_LABEL = 44


class Bench:
    """The model of one circuit at a time; it is loaded when the first prompt is put to it."""

    def __init__(self, root: Path, device: str) -> None:
        self._root, self._device = root, device
        # One prompt at a time: interventions of two runs would meet in the same model.
        self._lock = Lock()
        self._plain: tuple[tuple[Path, str], float] | None = None

    def features(self, folder: Path) -> dict[str, str]:
        """The features of a circuit, the largest |effect| first, with what they are called."""
        graph, labels = _circuit(folder), labels_of(folder)
        names = [name for name, data in graph.nodes(data=True) if data["kind"] == "feature"]
        names.sort(key=lambda name: -abs(graph.nodes[name]["effect"]))
        return {name: printable(f"{name} {labels.get(name, '')}".strip()) for name in names}

    def fires(self, folder: Path, prompt: str) -> Firing:
        """As `Probe.fires`, for all features of the circuit."""
        with self._lock:
            return self._probe(folder).fires(prompt, list(self.features(folder)))

    def plain_score(self, folder: Path, prompt: str) -> float:
        """As `Probe.score_of` with nothing scaled; the last one is remembered, so that scaling costs one run alone."""
        if self._plain is None or self._plain[0] != (folder, prompt):
            self._plain = (folder, prompt), self.score(folder, prompt, {})
        return self._plain[1]

    def score(self, folder: Path, prompt: str, factors: Mapping[str, float]) -> float:
        """As `Probe.score_of`."""
        with self._lock:
            return self._probe(folder).score_of(prompt, factors)

    def reply(self, folder: Path, prompt: str, factors: Mapping[str, float]) -> str:
        """As `Probe.reply`."""
        with self._lock:
            return self._probe(folder).reply(prompt, factors)

    def _probe(self, folder: Path) -> Probe:
        facts = _circuit(folder).graph
        return _opened(json.dumps(facts["experiment"]), self._root, str(facts["data"]), self._device)


@lru_cache(maxsize=4)
def _circuit(folder: Path) -> nx.DiGraph:
    return load_circuit(folder / "circuit.json")


@lru_cache(maxsize=1)
def _opened(experiment: str, root: Path, data: str, device: str) -> Probe:
    return open_model(Run(Experiment.model_validate_json(experiment), root, data, device))


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
