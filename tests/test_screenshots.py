"""The pictures of the README, from the embedded model's circuit in a browser, for whoever asks with --screenshots."""

from pathlib import Path
from typing import Any

import pytest

import sfc
from sfc.api import Discovered
from sfc.studies.discover.measure import SHOWN_NODES

pytest.importorskip("dash", reason="dash is not installed: pip install 'sfc[explorer]'")
from test_explorer import CHROMIUM, opened, serving, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]
PROMPT = "How do I sharpen a kitchen knife?"


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--screenshots")
    if given is None:
        pytest.skip("pictures are written with --screenshots DIR")
    return given


@pytest.fixture(scope="module")
def circuit(folder: Path, request: pytest.FixtureRequest) -> Discovered:
    """The circuit of the demo; it is made where it is not there."""
    return sfc.discover(sfc.load_preset("smollm2", root=request.config.getoption("--root")), "violence")


def written(page: Any, path: Path) -> None:
    page.screenshot(path=path)
    assert 10_000 < path.stat().st_size < 600_000, "a picture of the README shows something, and loads at once"


def test_the_circuit(circuit: Discovered, folder: Path) -> None:
    with opened(f"file://{circuit.folder / 'circuit.html'}", "#circuit .scatterlayer") as page:
        assert page.inner_text("h1").startswith("violence · learned-mask · smollm2")
        shown = min(len(circuit.graph), SHOWN_NODES)
        assert f"{shown} of {shown} nodes" in page.inner_text("#shown")
        page.set_viewport_size({"width": 1366, "height": 960})
        page.wait_for_timeout(500)
        for name in ("both-sides", "proof"):
            page.locator(f"#{name}").screenshot(path=folder / f"{name}.png")
        page.evaluate("document.querySelector('#proof').scrollIntoView()")
        page.wait_for_timeout(500)
        written(page, folder / "circuit-violence.png")


def test_the_explorer(circuit: Discovered, folder: Path) -> None:
    with serving(circuit.run.root) as address, opened(address) as page:
        page.fill("#prompt", PROMPT)
        page.click("#run")
        until(lambda: "circuit features that fire" in page.inner_text("#firing"), page)
        page.click("#strongest")
        until(lambda: "10 features times 0" in page.inner_text("#score"), page)
        until(lambda: page.inner_text("#reply").strip() != "", page)
        page.locator("#prompt").scroll_into_view_if_needed()
        page.evaluate("document.querySelector('section h2').scrollIntoView()")
        page.wait_for_timeout(500)
        written(page, folder / "explorer.png")
