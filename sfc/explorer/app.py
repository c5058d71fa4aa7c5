"""The explorer as a Dash application."""

from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, dcc, html, no_update, set_props
from flask import Response, abort, request
from werkzeug.exceptions import HTTPException

from sfc.core.errors import UserError
from sfc.core.faults import fault_message, user_message
from sfc.core.progress import printable, say
from sfc.core.reading import read_text
from sfc.explorer.prompts import CircuitModel, answer_prompts, prompts_section
from sfc.explorer.shelf import (
    CHOICE,
    SIDES,
    categories_section,
    chooser,
    chosen_circuit,
    compare_categories,
    finished_pages,
    notes,
    offer_circuits,
    ringed_page,
    shared_core,
    shelf,
)

_HOSTS = ("127.0.0.1", "localhost")
_LONGEST_REQUEST = 4 << 20
"""bytes of what a browser sends at once: a prompt, and what is chosen"""
# Artifacts may be anyone's: whatever their pages hold runs in a world of its own and reaches nothing.
_PAGE_POLICY = (
    "sandbox allow-scripts allow-downloads allow-popups; default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; img-src data: blob:; frame-ancestors 'self'"
)


def explorer(root: Path, device: str) -> Dash:
    """The application for the circuits below a root folder.

    Raises:
        UserError: there are none.
    """
    if not shelf(root):
        left_out = "".join(f" ({note})" for note in notes(root)[:1])
        raise UserError(f"{root / 'circuits'} holds no finished circuit: run `sfc discover` first{left_out}")
    app = Dash(__name__, title="sfc explore", update_title="", serve_locally=True, on_error=_tell)
    app.layout = lambda: _layout(root)  # a function, so that it is made again whenever the page is opened
    app.server.config["MAX_CONTENT_LENGTH"] = _LONGEST_REQUEST
    _serve_pages(app, root)
    offer_circuits(app, root)
    compare_categories(app, root)
    _show(app, root)
    answer_prompts(app, root, CircuitModel(root, device))
    _open_studies(app, root)
    _guard(app)
    return app


def _message(error: Exception) -> str:
    """What is said of an error, here and in the terminal."""
    message = printable(f"error: {user_message(error) or fault_message(error)}")
    say(message)
    return message


def _tell(error: Exception) -> None:
    """What Dash does with an error in a callback: everything stays as it is, and the page says what was wrong."""
    set_props("problem", {"children": _message(error)})


def _guard(app: Dash) -> None:
    """Errors become messages, and every answer says what a browser may do with it."""
    scripts = " ".join(["'self'", *app.csp_hashes()])
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
        " font-src 'self' data:; connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'self'"
    )

    @app.server.errorhandler(Exception)
    def failed(error: Exception) -> Response | HTTPException:
        return error if isinstance(error, HTTPException) else Response(_message(error), 500, mimetype="text/plain")

    @app.server.after_request
    def headers(response: Response) -> Response:
        response.headers.setdefault("Content-Security-Policy", policy)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _layout(root: Path) -> html.Main:
    first = next(iter(shelf(root).values()), None)
    return html.Main(
        [
            html.H1("Circuits behind refusals"),
            html.P(id="problem", role="alert"),
            html.Ul([html.Li(printable(note)) for note in notes(root)], id="damaged"),
            categories_section(),
            html.Div([chooser(root, "first", first), chooser(root, "second", None)], className="sides"),
            html.P(id="core", role="status"),
            html.Div([html.Iframe(id=f"{side}-page", title=f"{side} circuit") for side in SIDES], className="sides"),
            prompts_section(),
            _studies_section(root),
        ]
    )


def _studies_section(root: Path) -> html.Details:
    """The pages of all finished artifacts, one at a time."""
    chosen = dcc.Dropdown(id="study", options=list(finished_pages(root)), placeholder="choose a page")
    return html.Details(
        [
            html.Summary("Pages of everything that is finished"),
            html.Div(html.Label(["artifact", chosen]), className="chooser"),
            html.Iframe(id="study-page", title="page of the chosen artifact", hidden=True),
        ],
        id="studies",
    )


def _open_studies(app: Dash, root: Path) -> None:
    @app.callback(Output("study-page", "src"), Output("study-page", "hidden"), Input("study", "value"))
    def opened(chosen: str | None) -> tuple[str, bool]:
        return (f"/artifact/{chosen}", False) if chosen in finished_pages(root) else ("", True)


def _serve_pages(app: Dash, root: Path) -> None:
    """Pages of circuits and of other artifacts, to this machine's own browser alone."""

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
        return _page(ringed_page(known[key].folder, core or ()))

    @app.server.get("/artifact/<path:key>")
    def artifact(key: str) -> Response:
        known = finished_pages(root)
        if key not in known:
            abort(404)
        return _page(read_text(known[key]))


def _page(text: str) -> Response:
    return Response(text, mimetype="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})


def _show(app: Dash, root: Path) -> None:
    @app.callback(
        Output("first-page", "src"),
        Output("second-page", "src"),
        Output("second-page", "hidden"),
        Output("core", "children"),
        *(Input(f"{side}-{name}", "value") for side in SIDES for name in CHOICE),
    )
    def show(*choice: str | None) -> tuple[Any, ...]:
        set_props("problem", {"children": ""})
        first, second = chosen_circuit(root, choice[:3]), chosen_circuit(root, choice[3:])
        if first is None:
            return no_update, no_update, no_update, "choose a circuit"
        if second is None:
            return f"/page/{first.key}", "", True, ""
        core = shared_core(first.folder, second.folder)
        words = "other dictionaries: their nodes cannot be compared by name"
        if core is not None:
            words = f"shared core, ringed in both: {len(core)} nodes"
        return f"/page/{first.key}?beside={second.key}", f"/page/{second.key}?beside={first.key}", False, words
