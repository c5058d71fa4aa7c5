"""Prompts put to the first circuit's model: which of its features fire where, and what scaling and steering do."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from dash import Dash, Input, Output, State, ctx, dcc, html, no_update, set_props

from sfc.api import open_model, steer
from sfc.behaviors.behavior import Words
from sfc.core.errors import UserError
from sfc.core.experiments import experiment_of
from sfc.core.machine import check_memory
from sfc.explorer.shelf import CHOICE, chosen_circuit, graph_of, undamaged
from sfc.features.labels import labels_of
from sfc.features.session import Firing, PromptSession
from sfc.models.edits import Steering
from sfc.models.loading import Model, free_memory
from sfc.pages.style import axis, styled_figure, words_of
from sfc.pages.text import hover_text, printable
from sfc.run import Run
from sfc.studies.steer.directions import finished_directions

_SHOWN_FEATURES = 30
_LONGEST_LABEL = 44
REPLY_TOKENS = 40
_LONGEST_PROMPT = 1 << 17
"""tokens, where the architecture sets no limit"""
_LONGEST_TOKEN = 128
"""characters: tokens of runs of blanks, or of one letter, are that long in some vocabularies"""


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
        with undamaged(folder):
            graph, labels = graph_of(folder), labels_of(folder)
            names = [name for name, data in graph.nodes(data=True) if data["kind"] == "feature"]
            names.sort(key=lambda name: -abs(graph.nodes[name]["effect"]))
        return {name: printable(f"{name} {labels.get(name, '')}".strip()) for name in names}

    def words(self, folder: Path) -> Words:
        """How what the circuit explains is spoken of."""
        return words_of(graph_of(folder))

    def check(self, folder: Path, prompt: str, changes: Changes) -> None:
        """Check a prompt and what is to be changed, before anything runs.

        Raises:
            UserError: the prompt does not fit the model or the memory, or a change is none that is offered.
        """
        with self._lock:
            _check_length(self._session(folder).model, prompt)
        if changes.direction is not None and changes.direction not in self.directions(folder):
            raise UserError(f"there is nothing named {changes.direction!r} to steer along: choose one of the list")
        if not all(map(math.isfinite, [*changes.factors.values(), changes.alpha])):
            raise UserError("times and alpha must be finite numbers")

    def fires(self, folder: Path, prompt: str) -> Firing:
        """As `PromptSession.fires`, for all features of the circuit."""
        with self._lock:
            return self._session(folder).fires(prompt, list(self.features(folder)))

    def directions(self, folder: Path) -> dict[str, str]:
        """What its model can be steered along, with what it is called: finished directions, and the features."""
        return {name: name for name in finished_directions(_run(*self._source(folder)))} | self.features(folder)

    def score(self, folder: Path, prompt: str, changes: Changes = NOTHING) -> float:
        """As `PromptSession.score_of`."""
        with self._lock:
            return self._session(folder).score_of(prompt, changes.factors, self._steering(folder, changes))

    def reply(self, folder: Path, prompt: str, changes: Changes = NOTHING) -> str:
        """As `PromptSession.reply`."""
        with self._lock:
            steering = self._steering(folder, changes)
            return self._session(folder).reply(prompt, changes.factors, REPLY_TOKENS, steering)

    def _session(self, folder: Path) -> PromptSession:
        return _opened(*self._source(folder))

    def _steering(self, folder: Path, changes: Changes) -> Steering | None:
        if changes.direction is None:
            return None
        return _steered(*self._source(folder), changes.direction, changes.alpha)

    def _source(self, folder: Path) -> tuple[str, Path, str, str]:
        facts = graph_of(folder).graph
        return json.dumps(facts["experiment"]), self._root, str(facts["data"]), self._device


@lru_cache(maxsize=4)
def _run(experiment: str, root: Path, data: str, device: str) -> Run:
    return Run.of(experiment_of(json.loads(experiment)), root, data, device)


@lru_cache(maxsize=1)
def _opened(*source: Any) -> PromptSession:
    return open_model(_run(*source))


@lru_cache(maxsize=8)
def _steered(experiment: str, root: Path, data: str, device: str, direction: str, alpha: float) -> Steering:
    return steer(_run(experiment, root, data, device), direction, alpha)


def _check_length(model: Model, prompt: str) -> None:
    """Raise a `UserError` where a prompt with its reply has more tokens than the model has positions for, or memory."""
    most = (model.n_positions or _LONGEST_PROMPT) - REPLY_TOKENS
    # The text's length comes first: to tokenize megabytes takes minutes.
    n_tokens = len(model.tokenize([prompt])[0].ids) if len(prompt) <= most * _LONGEST_TOKEN else len(prompt)
    if n_tokens > most:
        raise UserError(f"the prompt is too long: this model takes {most:,} tokens beside the reply's {REPLY_TOKENS}")
    attention = 2 * 4 * model.bridge.cfg.n_heads * n_tokens**2  # scores and pattern of one layer, in float32
    check_memory(
        attention,
        f"a prompt of {n_tokens:,} tokens",
        "give a shorter one",
        free_memory(model.device),
    )


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


def prompts_section() -> html.Section:
    """A prompt, the features to scale, and what becomes of score and reply."""
    scaling = [
        html.Label("features", htmlFor="scaled"),
        html.Div(dcc.Dropdown(id="scaled", multi=True, placeholder="none"), className="wide"),
        html.Button("the 10 strongest", id="strongest", n_clicks=0),
        html.Label("times", htmlFor="factor"),
        dcc.Input(id="factor", type="number", value=0, step="any", debounce=True),
        html.Span("0 switches them off"),
    ]
    steering = [
        html.Label("steer along", htmlFor="direction"),
        html.Div(dcc.Dropdown(id="direction", placeholder="nothing"), className="wide"),
        html.Label("alpha", htmlFor="alpha"),
        dcc.Input(id="alpha", type="number", value=0.1, step="any", debounce=True),
        html.Span("of the residual stream's norm; below 0 steers away"),
    ]
    return html.Section(
        [
            html.H2("Put a prompt to the first circuit's model"),
            dcc.Textarea(id="prompt", placeholder="a prompt"),
            html.Div(html.Button("run", id="run", n_clicks=0), className="row"),
            html.Div(scaling, className="row"),
            html.Div(steering, className="row"),
            html.P(id="score", role="status"),
            dcc.Loading(html.Div(id="reply")),
            dcc.Graph(id="firing", config={"displaylogo": False}),
        ]
    )


def answer_prompts(app: Dash, root: Path, model: CircuitModel) -> None:
    """Score and answer what is typed, with features of the first circuit scaled, and steered."""
    choice = [f"first-{name}" for name in CHOICE]
    controls = ["scaled", "factor", "direction", "alpha"]

    @app.callback(
        Output("scaled", "options"), Output("direction", "options"), *(Input(name, "value") for name in choice)
    )
    def offer(*choice: str | None) -> tuple[list[dict[str, str]], ...]:
        circuit = chosen_circuit(root, choice)
        offered = (model.features(circuit.folder), model.directions(circuit.folder)) if circuit else ({}, {})
        return tuple([{"label": title, "value": name} for name, title in names.items()] for names in offered)

    @app.callback(
        Output("scaled", "value"), Input("strongest", "n_clicks"), State("scaled", "options"), prevent_initial_call=True
    )
    def strongest(_clicks: int, options: list[dict[str, str]]) -> list[str]:
        return [option["value"] for option in options[:10]]

    @app.callback(
        Output("score", "children"),
        Output("firing", "figure"),
        Input("run", "n_clicks"),
        *(Input(name, "value") for name in controls),
        *(State(name, "value") for name in ["prompt", *choice]),
        prevent_initial_call=True,
    )
    def score(_clicks: int, *values: Any) -> tuple[Any, Any]:
        (prompt, *choice), changes = values[4:], _changes(*values[:4])
        circuit = chosen_circuit(root, tuple(choice))
        if circuit is None or not prompt:
            return "type a prompt, and run", no_update
        set_props("problem", {"children": ""})
        model.check(circuit.folder, prompt, changes)
        plain = model.score(circuit.folder, prompt)
        words = f"{model.words(circuit.folder).score} {plain:+.2f} nats"
        if changed_by := _words(changes):
            changed = model.score(circuit.folder, prompt, changes)
            words += f"; with {changed_by}: {changed:+.2f} ({changed - plain:+.2f})"
        if ctx.triggered_id != "run":
            return words, no_update
        titles = list(model.features(circuit.folder).values())
        return words, firing_figure(model.fires(circuit.folder, prompt), titles)

    # After the score, which takes a moment only: the reply follows.
    @app.callback(
        Output("reply", "children"),
        Input("score", "children"),
        *(State(name, "value") for name in [*controls, "prompt", *choice]),
        prevent_initial_call=True,
    )
    def reply(_score: str, *values: Any) -> Any:
        prompt, *choice = values[4:]
        circuit = chosen_circuit(root, tuple(choice))
        if circuit is None or not prompt:
            return no_update
        changes = _changes(*values[:4])
        model.check(circuit.folder, prompt, changes)
        return model.reply(circuit.folder, prompt, changes)


def _changes(scaled: list[str] | None, factor: float | None, direction: str | None, alpha: float | None) -> Changes:
    return Changes(dict.fromkeys(scaled or (), float(factor or 0)), direction, float(alpha or 0))


def _words(changes: Changes) -> str:
    """What is done to the model, if anything."""
    words = []
    if changes.factors:
        words.append(f"{len(changes.factors)} features times {next(iter(changes.factors.values())):g}")
    if changes.direction is not None:
        words.append(f"{changes.alpha:+g} along {changes.direction}")
    return " and ".join(words)
