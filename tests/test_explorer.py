"""The explorer: what it offers, whom it answers, and in a real browser what becomes of a prompt."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sfc
from sfc.api import Discovered
from sfc.core.errors import UserError
from sfc.explorer.shelf import (
    Compared,
    circuit_like,
    command_for,
    comparisons,
    finished_pages,
    overlaps_of,
    shared_core,
    shelf,
)
from sfc.features.session import Firing
from sfc.run import Run
from sfc.studies.compare import ComparisonOptions
from sfc.studies.study import STUDIES, ensure

pytest.importorskip("dash", reason="dash is not installed: pip install 'sfc[explorer]'")
from werkzeug.serving import make_server

from sfc.explorer.app import explorer
from sfc.explorer.prompts import CircuitModel, firing_figure

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "Bake bread? <script>alert(1)</script>"


def by(method: str, root: Path) -> Run:
    settings = ["evaluation.sizes=[16, 64]", "evaluation.target=-100", "evaluation.null_draws=0"]
    fewer = ["comparison.size=20", "comparison.shuffles=1", "comparison.replies=2"]
    return sfc.load_preset("tiny", [f"discovery.method={method}", *settings, *fewer], root=root)


@pytest.fixture(scope="module")
def circuits(tmp_path_factory: pytest.TempPathFactory) -> list[Discovered]:
    """Two circuits over the same dictionaries."""
    root = tmp_path_factory.mktemp("root")
    return [sfc.discover(by(method, root), "violence") for method in ("attribution", "magnitude")]


@pytest.fixture(scope="module")
def root(circuits: list[Discovered]) -> Path:
    return circuits[0].run.root


def test_the_shelf_holds_the_finished_circuits(circuits: list[Discovered], root: Path) -> None:
    found = shelf(root)
    assert {shelved.folder for shelved in found.values()} == {circuit.folder for circuit in circuits}
    assert {(s.preset, s.category, s.method.split(" ")[0]) for s in found.values()} == {
        ("tiny", "violence", "attribution"), ("tiny", "violence", "magnitude")
    }  # fmt: skip


def test_without_circuits_the_user_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `sfc discover` first"):
        explorer(tmp_path, "cpu")


def test_the_core_is_what_both_have_and_the_pages_ring_it(circuits: list[Discovered], root: Path) -> None:
    first, second = circuits
    core = set(first.graph) & set(second.graph)
    assert shared_core(first.folder, second.folder) == core != set()
    client = explorer(root, "cpu").server.test_client()
    keys = [circuit.folder.relative_to(root / "circuits").as_posix() for circuit in circuits]
    alone = client.get(f"/page/{keys[0]}", base_url="http://127.0.0.1").get_data(as_text=True)
    beside = client.get(f"/page/{keys[0]}?beside={keys[1]}", base_url="http://127.0.0.1").get_data(as_text=True)
    assert '"in both circuits"' not in alone and '"in both circuits"' in beside
    assert "default-src 'none'" in beside


def test_it_answers_only_who_calls_it_by_its_own_name_and_serves_only_circuits(root: Path) -> None:
    client = explorer(root, "cpu").server.test_client()
    assert client.get("/", base_url="http://example.org").status_code == 403
    assert client.get("/", base_url="http://localhost:8050").status_code == 200
    for key in ("nowhere", "../../../etc/passwd", "tiny/%2e%2e/%2e%2e"):
        assert client.get(f"/page/{key}", base_url="http://127.0.0.1").status_code == 404


def test_the_pages_of_all_finished_studies_can_be_opened(circuits: list[Discovered], root: Path) -> None:
    probed = sfc.run_study(circuits[0].run, "probe", category="privacy")
    key = probed.folder.relative_to(root).as_posix()
    assert {*map(str, finished_pages(root))} >= {key, circuits[0].folder.relative_to(root).as_posix()}
    app = explorer(root, "cpu")
    client = app.server.test_client()
    served = client.get(f"/artifact/{key}", base_url="http://127.0.0.1")
    assert served.get_data(as_text=True) == probed.files["page"].read_text(encoding="utf-8")
    assert answer(app, "study-page", {"study.value": key}, {})["study-page"] == {
        "src": f"/artifact/{key}", "hidden": False
    }  # fmt: skip
    for wrong in ("nowhere", "circuits/tiny/../../../etc", "circuits/tiny"):
        assert client.get(f"/artifact/{wrong}", base_url="http://127.0.0.1").status_code == 404


def test_features_that_fire_are_listed_the_strongest_on_top() -> None:
    import numpy as np

    values = np.array([[0, 0, 0], [1.0, 0, 4.0], [2.0, 0, 1.0]], dtype=np.float32)
    figure = firing_figure(Firing(["<b>", "a", "\n"], values), ["one", "silent", "<i>three"])
    assert figure.layout["yaxis"]["ticktext"] == ("one", "&lt;i&gt;three")
    assert figure.layout["xaxis"]["ticktext"] == ("&lt;b&gt;", "a", "↵")
    np.testing.assert_allclose(figure.data[0].z, [[0, 0.5, 1], [0, 1, 0.25]])


@pytest.fixture(scope="module")
def compared(root: Path) -> Compared:
    """Two categories compared, of which one has a circuit."""
    ensure(STUDIES["compare"], by("attribution", root).having(ComparisonOptions, categories=["violence", "privacy"]))
    [found] = comparisons(root).values()
    return found


@pytest.fixture(scope="module")
def both(compared: Compared, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the comparison and a circuit of each of its categories."""
    copied = tmp_path_factory.mktemp("both") / "root"
    shutil.copytree(root, copied)
    sfc.discover(by("attribution", copied), "privacy")
    return copied


def answer(app: Any, output: str, inputs: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What the application answers a browser in which these properties stand, one `id.property` each."""
    key = next(key for key in app.callback_map if output in key)

    def listed(properties: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [dict(zip(("id", "property"), k.split("."), strict=True), value=v) for k, v in properties.items()]

    outputs = [dict(zip(("id", "property"), each.split("."), strict=True)) for each in key.strip(".").split("...")]
    sent = {"output": key, "outputs": outputs, "inputs": listed(inputs), "state": listed(state)}
    response = app.server.test_client().post(
        "/_dash-update-component", json={**sent, "changedPropIds": list(inputs)}, base_url="http://127.0.0.1"
    )
    assert response.status_code == 200
    return {**response.get_json()["response"], **response.get_json().get("sideUpdate", {})}


def click(root: Path, compared: Compared, row: str, column: str) -> dict[str, Any]:
    point = {"points": [{"y": row, "x": compared.categories.index(column)}]}
    return answer(explorer(root, "cpu"), "opened", {"overlap.clickData": point}, {"comparison.value": compared.name})


def test_the_heat_map_is_that_of_the_comparisons_page(compared: Compared, root: Path) -> None:
    import pandas as pd

    app = explorer(root, "cpu")
    offered = answer(app, "comparison", {"first-preset.value": "tiny"}, {"comparison.value": None})
    assert offered["comparison"] == {"options": [compared.name], "value": compared.name}
    assert offered["categories"] == {"hidden": False}
    assert answer(app, "comparison", {"first-preset.value": "x"}, {"comparison.value": None})["categories"]["hidden"]
    table = pd.read_csv(compared.folder / "overlap.csv").set_index(["a", "b"])["jaccard_halves"]
    overlaps = overlaps_of(compared)
    assert compared.result["categories"] == ["privacy", "violence"]
    assert overlaps[0].tolist() == [table["privacy", "privacy"], table["privacy", "violence"]]
    assert overlaps[1].tolist() == [table["privacy", "violence"], table["violence", "violence"]]
    drawn = answer(app, "overlap.figure", {"comparison.value": compared.name}, {})
    assert compared.result["verdict"] in str(drawn["verdict"]) and compared.command in str(drawn["verdict"])
    page = (compared.folder / "comparison.html").read_text(encoding="utf-8")
    of_page = json.loads(page.split('id="overlap-data">')[1].split("</script>")[0])
    assert json.loads(json.dumps(drawn["overlap"]["figure"])) == of_page


def test_a_cell_opens_its_rows_circuit_beside_its_columns(compared: Compared, both: Path) -> None:
    pair = click(both, compared, "privacy", "violence")
    assert [pair[f"{side}-preset"]["value"] for side in ("first", "second")] == ["tiny", "tiny"]
    assert [pair[f"{side}-category"]["value"] for side in ("first", "second")] == ["privacy", "violence"]
    assert all(pair[f"{side}-method"]["value"].startswith("attribution") for side in ("first", "second"))
    alone = click(both, compared, "violence", "violence")
    assert (alone["first-category"]["value"], alone["second-category"]["value"]) == ("violence", None)


def test_where_a_circuit_is_missing_the_command_is_named(compared: Compared, root: Path) -> None:
    assert circuit_like(root, compared, "privacy") is None
    answered = click(root, compared, "violence", "privacy")
    assert "first-category" not in answered and "second-category" not in answered
    command = "sfc discover --preset tiny --category privacy --method attribution --population toxic"
    assert command_for(compared, "privacy") == command
    assert command in str(answered["opened"]) and "--category violence" not in str(answered["opened"])


@contextmanager
def serving(root: Path) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, explorer(root, "cpu").server, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def until(holds: Callable[[], bool], page, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, page.inner_text("body")[-500:]
        page.wait_for_timeout(100)


@contextmanager
def opened(address: str, awaited: str = "#prompt") -> Iterator[Any]:
    """A page that has what is awaited; no request may have left the machine and no error have reached the console."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    requests: list[str] = []
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1366, "height": 900})
        page.set_default_timeout(180_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("dialog", lambda dialog: (problems.append("a dialog"), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector(awaited)
        page.wait_for_load_state("networkidle")  # what is still being drawn would move under the pointer
        yield page
        browser.close()
    assert not problems
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)


in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@in_browser
def test_a_prompt_is_scored_and_answered_and_features_switched_off(root: Path, circuits: list[Discovered]) -> None:
    with serving(root) as address, opened(address) as page:
        until(lambda: len(page.frames) > 1 and "circuit" in page.frames[1].url, page)
        until(lambda: "nodes and" in page.frames[1].inner_text("#shown"), page)
        page.fill("#prompt", PROMPT)
        page.click("#run")
        until(lambda: "nats" in page.inner_text("#score"), page)
        plain = float(re.findall(r"[+-]\d+\.\d+", page.inner_text("#score"))[0])
        assert plain == pytest.approx(sfc.open_model(circuits[0].run).score_of(PROMPT), abs=0.006)
        until(lambda: "circuit features that fire" in page.inner_text("#firing"), page)
        page.click("#strongest")
        until(lambda: "10 features times 0" in page.inner_text("#score"), page)
        until(lambda: page.inner_text("#reply") != "", page)
        page.click("#direction")
        page.locator(".dash-options-list-option-checkbox").first.click(force=True)
        until(lambda: "10 features times 0 and +0.1 along resid_post" in page.inner_text("#score"), page)
        page.fill("#alpha", "-0.3")
        page.keyboard.press("Enter")
        until(lambda: "-0.3 along resid_post" in page.inner_text("#score"), page)
        name = re.findall(r"along (\S+):", page.inner_text("#score"))[0]
        steering = sfc.steer(circuits[0].run, name, -0.3)
        off = dict.fromkeys(list(CircuitModel(root, "cpu").features(circuits[0].folder))[:10], 0.0)
        changed = float(re.findall(r": ([+-]\d+\.\d+)", page.inner_text("#score"))[0])
        assert changed == pytest.approx(sfc.open_model(circuits[0].run).score_of(PROMPT, off, steering), abs=0.006)
        page.click("#second-preset")
        page.keyboard.press("Enter")


def click_on_cell(page: Any, row: int, column: int) -> None:
    """Click on the middle of the heat map's cell where it stands."""
    x, y = page.evaluate(
        """([row, column]) => {
            const graph = document.querySelector('#overlap .js-plotly-plot');
            graph.scrollIntoView({ block: 'center' });
            const { xaxis, yaxis2: yaxis } = graph._fullLayout, box = graph.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.d2p(column), box.top + yaxis._offset + yaxis.d2p(row)];
        }""",
        [row, column],
    )
    page.mouse.move(x, y)
    page.wait_for_timeout(150)
    page.mouse.click(x, y)


@in_browser
def test_a_click_on_a_cell_opens_its_circuits_side_by_side(both: Path, compared: Compared) -> None:
    def shown() -> list[str]:
        # a frame goes away while the next page is loaded into it
        return [f.title() for f in page.frames[1:] if "/page/" in f.url]

    with serving(both) as address, opened(address) as page:
        page.wait_for_selector("#overlap .heatmaplayer .hm image", state="attached")
        assert compared.result["verdict"] in page.inner_text("#verdict")
        assert "Overlap of circuits" in page.inner_text("#overlap")
        for row, column in ((0, 1), (1, 0)):
            wanted = [compared.categories[row], compared.categories[column]]
            click_on_cell(page, row, column)
            until(lambda wanted=wanted: [title.split(" · ")[0] for title in shown()] == wanted, page)
            assert page.inner_text("#opened") == " beside ".join(wanted)
            assert "shared core" in page.inner_text("#core")
            for side, category in zip(("first", "second"), wanted, strict=True):
                assert category in page.inner_text(f"#{side}-category") and "tiny" in page.inner_text(f"#{side}-preset")
                assert "attribution" in page.inner_text(f"#{side}-method")
        click_on_cell(page, 1, 1)
        until(lambda: page.is_hidden("#second-page"), page)
        assert page.inner_text("#opened") == compared.categories[1]
