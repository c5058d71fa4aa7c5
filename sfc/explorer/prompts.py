"""The section that puts prompts to the first circuit's model."""

from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, ctx, dcc, html, no_update

from sfc.explorer.model import Changes, CircuitModel, firing_figure
from sfc.explorer.shelf import CHOICE, chosen_circuit


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
        return model.reply(circuit.folder, prompt, _changes(*values[:4]))


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
