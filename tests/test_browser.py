"""A circuit's page in a real browser: what a reader does, what then stands there, and that nothing leaves it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_circuits import HOSTILE, make_cards, make_circuit, make_curve, make_result, write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

N_NODES = 60
PATIENCE = 180_000
"""milliseconds: a page holds megabytes of JavaScript, and the machine may be busy"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def circuit():
    """A circuit of 60 nodes; its strongest feature alone is about tulips, and all texts are hostile."""
    graph = make_circuit(np.linspace(3, -2, N_NODES).tolist(), edge_weight="nats", roles={"effect_content": "prompt"})
    for node in graph.nodes.values():
        node.update(effect_content=node["effect"], raises=HOSTILE[:6], lowers=HOSTILE[6:9])
    cards = make_cards(graph, [text for text in HOSTILE if text != "\ud800"])
    cards["features"][next(iter(graph))]["label"] = "tulips <b>&amp;"
    return graph, cards


@pytest.fixture(scope="module")
def address(circuit, tmp_path_factory: pytest.TempPathFactory) -> str:
    graph, cards = circuit
    path = tmp_path_factory.mktemp("page") / "circuit.html"
    write_page(
        path, graph, make_curve(size=[5, 20, 40, 5000]), make_result(category="<script>alert(1)</script>"), cards
    )
    return f"file://{path}"


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    """The page, opened; after each test no request may have been made and no error have reached the console."""
    context = chromium.new_context(viewport={"width": 1366, "height": 800}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append("a dialog: a prompt's text was run"), dialog.dismiss()))
    page.goto(address)
    page.wait_for_function("document.getElementById('shown').textContent !== ''", polling=100)
    yield page
    outside = [url for url in requests if url != address and not url.startswith(("data:", "blob:"))]
    context.close()
    assert not outside and not problems


def drawn(page: Any) -> dict[str, float]:
    """The nodes that have a place in the graph, with their opacity."""
    return dict(
        page.evaluate(
            "document.getElementById('circuit').data.filter(t => t.meta && t.meta.part === 'nodes').flatMap("
            "t => t.ids.map((id, i) => [id, t.marker.opacity[i], t.x[i]])).filter(p => p[2] !== null)"
            ".map(p => p.slice(0, 2))"
        )
    )


def n_edges(page: Any) -> int:
    return page.evaluate(
        "document.getElementById('circuit').data.filter(t => t.meta && t.meta.part === 'edges')"
        ".flatMap(t => t.x).filter(x => x !== null).length / 2"
    )


def marker(page: Any) -> list[float]:
    return page.evaluate(
        "(() => { const t = document.getElementById('curve').data.find(t => t.meta && t.meta.part === 'shown');"
        " return [t.x[1], t.y[1]]; })()"
    )


def click_on(page: Any, name: str) -> None:
    """Click on a node where it stands in the graph."""
    x, y = page.evaluate(
        """name => {
            const graph = document.getElementById('circuit');
            graph.scrollIntoView({ block: 'center' });
            const trace = graph.data.find(t => (t.ids || []).includes(name)), i = trace.ids.indexOf(name);
            const { xaxis, yaxis } = graph._fullLayout, box = graph.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.d2p(trace.x[i]), box.top + yaxis._offset + yaxis.d2p(trace.y[i])];
        }""",
        name,
    )
    page.mouse.move(x, y)
    page.wait_for_timeout(150)
    page.mouse.click(x, y)


def test_the_slider_moves_the_graph_and_the_marker_on_the_curve_together(page, circuit) -> None:
    graph, _ = circuit
    assert drawn(page).keys() == set(graph) and n_edges(page) == graph.number_of_edges()
    assert marker(page) == [N_NODES, None], "the curve was not measured at this size"
    page.focus("#size")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    first = {name for name, data in graph.nodes(data=True) if data["rank"] < 20}
    assert drawn(page).keys() == first and n_edges(page) == graph.subgraph(first).number_of_edges()
    assert marker(page) == [20, 0.5]
    assert "20 nodes: faithfulness 0.5 · completeness, normalised 0.6" in page.inner_text("#size-figures")
    page.keyboard.press("End")
    assert marker(page)[0] == N_NODES


def test_a_click_opens_a_nodes_card_and_its_neighbourhood_stands_out(page, circuit) -> None:
    graph, _ = circuit
    name = next(iter(graph))
    assert page.is_hidden("#card")
    click_on(page, name)
    page.wait_for_selector("#card:not([hidden])")
    card = page.inner_text("#card")
    for part in (name, "tulips <b>&amp;", "<script>alert(1)</script>", "3 nats", "toxic · violence"):
        assert part in card, part
    bright = {node for node, opacity in drawn(page).items() if opacity == 1}
    assert bright == {name, *graph.successors(name), *graph.predecessors(name)}
    assert n_edges(page) == graph.degree(name)
    page.keyboard.press("Escape")
    assert page.is_hidden("#card") and set(drawn(page).values()) == {1}


def test_search_finds_labels_tokens_and_names(page, circuit) -> None:
    graph, _ = circuit
    name = next(iter(graph))
    page.fill("#search", "TULIPS")
    assert {node for node, opacity in drawn(page).items() if opacity == 1} == {name}
    assert "1 stand out" in page.inner_text("#shown")
    page.click("#matches button")
    assert name in page.inner_text("#card") and page.evaluate("document.activeElement.id") == "card"
    page.fill("#search", "onerror")
    assert sum(opacity == 1 for opacity in drawn(page).values()) > 50, "all features have this token"
    page.fill("#search", "nowhere in it")
    assert not page.query_selector_all("#matches li") and set(drawn(page).values()) == {0.12}


@pytest.mark.parametrize(
    ("filter", "value", "keeps"),
    [
        ("sign", "-1", lambda node, card: node["effect"] < 0),
        ("site", "blocks.21.hook_resid_post", lambda node, card: node["layer"] == 21),
        ("group", "safe", lambda node, card: bool(card) and card["fires_on"] == "safe"),
        ("group", "error", lambda node, card: node["kind"] == "error"),
    ],
)
def test_filters_leave_the_nodes_they_name(page, circuit, filter: str, value: str, keeps) -> None:
    graph, cards = circuit
    page.select_option(f"#{filter}", value)
    wanted = {name for name, node in graph.nodes(data=True) if keeps(node, cards["features"].get(name))}
    assert wanted and drawn(page).keys() == wanted
    page.click("#reset")
    assert drawn(page).keys() == set(graph)


def test_everything_can_be_done_with_the_keyboard(page, circuit) -> None:
    graph, _ = circuit
    page.focus("#circuit")
    page.keyboard.press("ArrowRight")
    assert next(iter(graph)) in page.inner_text("#card code")
    page.keyboard.press("ArrowRight")
    layer = graph.nodes[page.inner_text("#card code")]["layer"]
    assert layer == 20
    page.keyboard.press("ArrowUp")
    assert graph.nodes[page.inner_text("#card code")]["layer"] == 20
    page.keyboard.press("ArrowLeft")
    assert graph.nodes[page.inner_text("#card code")]["layer"] == 19
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert "node" in reached and "close" in reached


def test_no_text_becomes_markup(page) -> None:
    page.click("[data-node] button")
    assert page.evaluate("document.querySelectorAll('#card script, #card img, #card b, h1 script').length") == 0
    assert "<script>alert(1)</script>" in page.inner_text("h1")


@pytest.mark.parametrize(("format", "begins"), [("svg", b"<svg"), ("png", b"\x89PNG")])
def test_the_graph_is_saved_as_a_picture(page, tmp_path: Path, format: str, begins: bytes) -> None:
    with page.expect_download() as download:
        page.click(f"#save-{format}")
    download.value.save_as(tmp_path / "picture")
    assert download.value.suggested_filename == f"circuit.{format}"
    assert (tmp_path / "picture").read_bytes().startswith(begins)


def test_a_page_without_cards_or_edges_works_too(chromium, tmp_path: Path) -> None:
    graph = make_circuit([1.0])
    write_page(tmp_path / "page.html", graph, make_curve(), make_result())
    page = chromium.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"file://{tmp_path / 'page.html'}")
    page.wait_for_function("document.getElementById('shown').textContent !== ''", polling=100)
    assert page.inner_text("#shown") == "1 of 1 nodes and 0 edges shown"
    click_on(page, next(iter(graph)))
    assert "raises the refusal score" in page.inner_text("#card")
    page.close()


def test_hostile_data_is_json_in_the_page(address: str) -> None:
    source = Path(address.removeprefix("file://")).read_text(encoding="utf-8")
    data = source.split('id="circuit-cards">')[1].split("</script>")[0]
    assert "<" not in data and json.loads(data)["nodes"]


def test_the_picture_by_position_is_drawn_and_its_lines_say_what_passes(chromium: Any, tmp_path: Path) -> None:
    roles = {"effect_content": "prompt", "effect_suffix_0": "<b>x</b>", "effect_suffix_1": "\n"}
    graph = make_circuit(np.linspace(3, -2, 24).tolist(), n_columns=4, edge_weight="nats", roles=roles)
    for node in graph.nodes.values():
        node.update(dict.fromkeys(roles, node["effect"] / 3))
    for _, _, data in graph.edges(data=True):
        data.update(weight_content_to_suffix_0=data["weight"], weight_suffix_0_to_suffix_1=-data["weight"] / 2)
    write_page(tmp_path / "circuit.html", graph, make_curve(), make_result(), make_cards(graph, ["kill"]))
    page = chromium.new_page(viewport={"width": 1366, "height": 800})
    page.set_default_timeout(PATIENCE)
    page.goto(f"file://{tmp_path / 'circuit.html'}")
    page.wait_for_selector("#roles .scatterlayer")
    page.locator("#roles").scroll_into_view_if_needed()
    assert page.locator("#roles .yaxislayer-above text, #roles .yaxislayer-below text").all_text_contents() == [
        "prompt", "“<b>x</b>” −2", "“↵” −1",
    ]  # fmt: skip
    page.evaluate("Plotly.Fx.hover('roles', [{curveNumber: document.getElementById('roles').data.findIndex("
                  "t => t.meta && t.meta.part === 'edge hovers'), pointNumber: 0}])")  # fmt: skip
    assert "→" in (page.text_content("#roles .hoverlayer") or "")
    page.close()
