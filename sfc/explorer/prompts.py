"""The section that puts prompts to the first circuit's model."""

from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, ctx, dcc, html, no_update

from sfc.explorer.bench import Bench, firing_figure
from sfc.explorer.choosers import CHOICE, chosen_circuit


def prompts_section() -> html.Section:
    """A prompt, the features to scale, and what becomes of score and reply."""
    scaling = [
        html.Label("features", htmlFor="scaled"),
        html.Div(dcc.Dropdown(id="scaled", multi=True, placeholder="none"), className="wide"),
        html.Button("the 10 strongest", id="strongest", n_clicks=0),
        html.Label("times", htmlFor="factor"),
        dcc.Input(id="factor", type="number", value=0, step=0.5, debounce=True),
        html.Span("0 switches them off, above 1 steers towards them"),
    ]
    return html.Section(
        [
            html.H2("Put a prompt to the first circuit's model"),
            dcc.Textarea(id="prompt", placeholder="a prompt"),
            html.Div(html.Button("run", id="run", n_clicks=0), className="row"),
            html.Div(scaling, className="row"),
            html.P(id="score", role="status"),
            dcc.Loading(html.Div(id="reply")),
            dcc.Graph(id="firing", config={"displaylogo": False}),
        ]
    )


def answer_prompts(app: Dash, root: Path, bench: Bench) -> None:
    """Score and answer what is typed, with features of the first circuit scaled."""
    choice_of_first = [State(f"first-{name}", "value") for name in CHOICE]
    question = [State("scaled", "value"), State("factor", "value"), State("prompt", "value"), *choice_of_first]

    @app.callback(Output("scaled", "options"), *(Input(f"first-{name}", "value") for name in CHOICE))
    def features(*choice: str | None) -> list[dict[str, str]]:
        circuit = chosen_circuit(root, choice)
        names = bench.features(circuit.folder) if circuit else {}
        return [{"label": title, "value": name} for name, title in names.items()]

    @app.callback(
        Output("scaled", "value"), Input("strongest", "n_clicks"), State("scaled", "options"), prevent_initial_call=True
    )
    def strongest(_clicks: int, options: list[dict[str, str]]) -> list[str]:
        return [option["value"] for option in options[:10]]

    @app.callback(
        Output("score", "children"),
        Output("firing", "figure"),
        Input("run", "n_clicks"),
        Input("scaled", "value"),
        Input("factor", "value"),
        *question[2:],
        prevent_initial_call=True,
    )
    def score(
        _clicks: int, scaled: list[str] | None, factor: float | None, prompt: str | None, *choice: str | None
    ) -> tuple[Any, Any]:
        circuit = chosen_circuit(root, choice)
        if circuit is None or not prompt:
            return "type a prompt, and run", no_update
        plain = bench.plain_score(circuit.folder, prompt)
        words = f"refusal score {plain:+.2f} nats"
        if scaled:
            changed = bench.score(circuit.folder, prompt, dict.fromkeys(scaled, float(factor or 0)))
            words += f"; with {len(scaled)} features times {factor or 0:g}: {changed:+.2f} ({changed - plain:+.2f})"
        if ctx.triggered_id != "run":
            return words, no_update
        titles = list(bench.features(circuit.folder).values())
        return words, firing_figure(bench.fires(circuit.folder, prompt), titles)

    # After the score, which takes a moment only: the reply follows.
    @app.callback(Output("reply", "children"), Input("score", "children"), *question, prevent_initial_call=True)
    def reply(
        _score: str, scaled: list[str] | None, factor: float | None, prompt: str | None, *choice: str | None
    ) -> Any:
        circuit = chosen_circuit(root, choice)
        if circuit is None or not prompt:
            return no_update
        return bench.reply(circuit.folder, prompt, dict.fromkeys(scaled or (), float(factor or 0)))
