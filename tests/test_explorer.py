"""The explorer: what it offers, whom it answers, and in a real browser what becomes of a prompt."""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sfc
from sfc.api import Discovered
from sfc.errors import UserError
from sfc.explorer.shelf import shared_core, shelf
from sfc.features.probe import Firing

pytest.importorskip("dash", reason="dash is not installed: pip install 'sfc[explorer]'")
from werkzeug.serving import make_server

from sfc.explorer.app import explorer
from sfc.explorer.bench import firing_figure

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "Bake bread? <script>alert(1)</script>"


@pytest.fixture(scope="module")
def circuits(tmp_path_factory: pytest.TempPathFactory) -> list[Discovered]:
    """Two circuits over the same dictionaries."""
    root = tmp_path_factory.mktemp("root")
    methods = ("attribution", "magnitude")
    settings = ["evaluation.sizes=[16, 64]", "evaluation.target_faithfulness=-100"]
    runs = [sfc.load_preset("tiny", [f"discovery.method={m}", *settings], root=root) for m in methods]
    return [sfc.discover(run, "violence") for run in runs]


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


def test_features_that_fire_are_listed_the_strongest_on_top() -> None:
    import numpy as np

    values = np.array([[0, 0, 0], [1.0, 0, 4.0], [2.0, 0, 1.0]], dtype=np.float32)
    figure = firing_figure(Firing(["<b>", "a", "\n"], values), ["one", "silent", "<i>three"])
    assert figure.layout["yaxis"]["ticktext"] == ("one", "&lt;i&gt;three")
    assert figure.layout["xaxis"]["ticktext"] == ("&lt;b&gt;", "a", "↵")
    np.testing.assert_allclose(figure.data[0].z, [[0, 0.5, 1], [0, 1, 0.25]])


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_a_prompt_is_scored_and_answered_and_features_switched_off(address: str, circuits: list[Discovered]) -> None:
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
        page.wait_for_selector("#prompt")
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
        page.click("#second-preset")
        page.keyboard.press("Enter")
        browser.close()
    assert not problems
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)
