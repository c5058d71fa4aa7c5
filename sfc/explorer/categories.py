"""The section that compares categories: a heat map whose cells open pairs of circuits."""

from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update

from sfc.explorer.choosers import choose_circuit
from sfc.explorer.comparisons import Compared, circuit_like, command_for, comparisons, overlaps_of
from sfc.viewer.comparison import overlap_figure


def categories_section() -> html.Details:
    """The heat map of one finished comparison; hidden where the first circuit's preset has none."""
    return html.Details(
        [
            html.Summary("Overlap of categories: a cell opens the circuits of its row and its column"),
            html.Div(html.Label(["comparison", dcc.Dropdown(id="comparison", clearable=False)]), className="chooser"),
            html.P(id="verdict"),
            html.P(id="opened", role="status"),
            dcc.Graph(id="overlap", config={"displaylogo": False}),
        ],
        id="categories",
        open=True,
        hidden=True,
    )


def compare_categories(app: Dash, root: Path) -> None:
    """Offer the comparisons of the first circuit's preset, draw the chosen one, and open what is clicked."""

    @app.callback(
        Output("comparison", "options"),
        Output("comparison", "value"),
        Output("categories", "hidden"),
        Input("first-preset", "value"),
        State("comparison", "value"),
    )
    def offer(preset: str | None, chosen: str | None) -> tuple[list[str], str | None, bool]:
        names = [name for name, compared in comparisons(root).items() if compared.preset == preset]
        return names, chosen if chosen in names else next(iter(names), None), not names

    @app.callback(
        Output("overlap", "figure"),
        Output("verdict", "children"),
        Input("comparison", "value"),
        prevent_initial_call=True,
    )
    def draw(name: str | None) -> tuple[Any, Any]:
        if name is None:
            return no_update, ""
        compared = comparisons(root)[name]
        words = f"{compared.result['verdict']} Circuits of {compared.result['size']} nodes, made by "
        return overlap_figure(compared.result, overlaps_of(compared)), [words, html.Code(compared.command)]

    @app.callback(
        Output("opened", "children"),
        Output("overlap", "clickData"),  # emptied, or a second click on a cell would not be noticed
        Input("overlap", "clickData"),
        State("comparison", "value"),
        prevent_initial_call=True,
    )
    def open_cell(clicked: dict[str, Any] | None, name: str | None) -> tuple[Any, Any]:
        if clicked is None or name is None:
            return no_update, no_update
        compared, point = comparisons(root)[name], clicked["points"][0]
        return _open_pair(root, compared, str(point["y"]), compared.categories[int(point["x"])]), None


def _open_pair(root: Path, compared: Compared, row: str, column: str) -> Any:
    """Set both sides' dropdowns, and say so; a cell of the diagonal opens its circuit alone."""
    circuits = {category: circuit_like(root, compared, category) for category in dict.fromkeys((row, column))}
    missing = [category for category, circuit in circuits.items() if circuit is None]
    if missing:
        words = "Circuits that are not there yet; with the other options of this comparison they come from"
        return [words, *(html.Code(command_for(compared, category)) for category in missing)]
    choose_circuit(root, "first", circuits[row])
    choose_circuit(root, "second", circuits[column] if column != row else None)
    return " beside ".join(circuits)
