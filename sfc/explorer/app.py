"""The explorer as a Dash application."""

from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, ctx, dcc, html, no_update
from flask import Response, abort, request

from sfc.errors import UserError
from sfc.explorer.bench import Bench, firing_figure
from sfc.explorer.pages import circuit_page
from sfc.explorer.shelf import Shelved, shared_core, shelf

_HOSTS = ("127.0.0.1", "localhost")
_SIDES, _CHOICE = ("first", "second"), ("preset", "category", "method")


def explorer(root: Path, device: str) -> Dash:
    """The application for the circuits below a root folder.

    Raises:
        UserError: there is none.
    """
    circuits = shelf(root)
    if not circuits:
        raise UserError(f"{root / 'circuits'} holds no finished circuit: run `sfc discover` first")
    app = Dash(__name__, title="sfc explore", update_title="", serve_locally=True)
    app.layout = _layout(circuits)
    _serve_pages(app, root)
    _choose(app, circuits)
    _ask(app, circuits, Bench(root, device))
    return app


def _layout(circuits: dict[str, Shelved]) -> html.Main:
    first = next(iter(circuits.values()))
    scaling = [
        html.Label("features", htmlFor="scaled"),
        html.Div(dcc.Dropdown(id="scaled", multi=True, placeholder="none"), className="wide"),
        html.Button("the 10 strongest", id="strongest", n_clicks=0),
        html.Label("times", htmlFor="factor"),
        dcc.Input(id="factor", type="number", value=0, step=0.5, debounce=True),
        html.Span("0 switches them off, above 1 steers towards them"),
    ]
    return html.Main(
        [
            html.H1("Circuits behind refusals"),
            html.Div([_chooser("first", first), _chooser("second", None)], className="sides"),
            html.P(id="core", role="status"),
            html.Div([html.Iframe(id=f"{side}-page", title=f"{side} circuit") for side in _SIDES], className="sides"),
            html.H2("Put a prompt to the first circuit's model"),
            dcc.Textarea(id="prompt", placeholder="a prompt"),
            html.Div(html.Button("run", id="run", n_clicks=0), className="row"),
            html.Div(scaling, className="row"),
            html.P(id="score", role="status"),
            dcc.Loading(html.Div(id="reply")),
            dcc.Graph(id="firing", config={"displaylogo": False}),
        ]
    )


def _chooser(side: str, chosen: Shelved | None) -> html.Div:
    values = {name: getattr(chosen, name) if chosen else None for name in _CHOICE}
    return html.Div(
        [html.Label([f"{side}: {name}", dcc.Dropdown(id=f"{side}-{name}", value=v)]) for name, v in values.items()],
        className="chooser",
    )


def _serve_pages(app: Dash, root: Path) -> None:
    """Pages of circuits, to this machine's own browser alone."""

    @app.server.before_request
    def only_here() -> None:
        # A page elsewhere whose name is made to point at this machine must not read what is here.
        if request.host.partition(":")[0] not in _HOSTS:
            abort(403)

    @app.server.get("/page/<path:key>")
    def page(key: str) -> Response:
        known = shelf(root)
        if key not in known:
            abort(404)
        other = known.get(request.args.get("beside", ""))
        core = shared_core(known[key].folder, other.folder) if other else None
        return Response(circuit_page(known[key].folder, core or ()), mimetype="text/html")


def _choose(app: Dash, circuits: dict[str, Shelved]) -> None:
    for side in _SIDES:

        @app.callback(
            *(Output(f"{side}-{name}", "options") for name in _CHOICE),
            Input(f"{side}-preset", "value"),
            Input(f"{side}-category", "value"),
        )
        def options(preset: str | None, category: str | None) -> tuple[list[str], ...]:
            of_preset = [c for c in circuits.values() if c.preset == preset]
            of_category = [c for c in of_preset if c.category == category]
            groups = (
                [c.preset for c in circuits.values()], [c.category for c in of_preset], [c.method for c in of_category]
            )  # fmt: skip
            return tuple(list(dict.fromkeys(group)) for group in groups)

    @app.callback(
        Output("first-page", "src"),
        Output("second-page", "src"),
        Output("second-page", "hidden"),
        Output("core", "children"),
        *(Input(f"{side}-{name}", "value") for side in _SIDES for name in _CHOICE),
    )
    def show(*choice: str | None) -> tuple[Any, ...]:
        first, second = _chosen(circuits, choice[:3]), _chosen(circuits, choice[3:])
        if first is None:
            return no_update, no_update, no_update, "choose a circuit"
        if second is None:
            return f"/page/{first.key}", "", True, ""
        core = shared_core(first.folder, second.folder)
        words = "other dictionaries: their nodes cannot be compared by name"
        if core is not None:
            words = f"shared core, ringed in both: {len(core)} nodes"
        return f"/page/{first.key}?beside={second.key}", f"/page/{second.key}?beside={first.key}", False, words


def _ask(app: Dash, circuits: dict[str, Shelved], bench: Bench) -> None:
    choice_of_first = [State(f"first-{name}", "value") for name in _CHOICE]
    question = [State("scaled", "value"), State("factor", "value"), State("prompt", "value"), *choice_of_first]

    @app.callback(Output("scaled", "options"), *(Input(f"first-{name}", "value") for name in _CHOICE))
    def features(*choice: str | None) -> list[dict[str, str]]:
        circuit = _chosen(circuits, choice)
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
        circuit = _chosen(circuits, choice)
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
        circuit = _chosen(circuits, choice)
        if circuit is None or not prompt:
            return no_update
        return bench.reply(circuit.folder, prompt, dict.fromkeys(scaled or (), float(factor or 0)))


def _chosen(circuits: dict[str, Shelved], choice: tuple[str | None, ...]) -> Shelved | None:
    return next((c for c in circuits.values() if (c.preset, c.category, c.method) == choice), None)
