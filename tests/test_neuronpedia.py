"""Explanations that Neuronpedia publishes: fetched when asked, once, shown as theirs; and without a network nothing."""

import html
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commands import Finished, sfc

from sfc.features.labels import explained
from sfc.features.neuronpedia import SERVER
from sfc.saes.architectures import CONFIG_FILE

PLACE = "gpt2-small/{layer}-res-jb"
HOSTILE = "words about <script>alert(1)</script>\n and \u202e knives " + "x" * 500
COMMAND = ("discover", "--preset", "tiny", "--category", "violence", "--json", "--set", "evaluation.sizes=[40]")


def answer(model: str, source: str, index: str, explanations: list[dict[str, Any]]) -> dict[str, Any]:
    """A part of what `GET /api/feature/{modelId}/{layer}/{index}` is documented to answer."""
    return {
        "modelId": model, "layer": source, "index": index, "frac_nonzero": 0.01, "maxActApprox": 12.5,
        "explanations": explanations, "activations": [{"tokens": ["a"], "values": [1.5], "maxValue": 1.5}],
    }  # fmt: skip


class Server:
    """Neuronpedia on this machine. Odd features have an explanation, others none, and every tenth is not there."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.fails_after: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                server.headers.append(dict(self.headers))
                *_, model, source, index = self.path.split("/")
                if server.fails_after is not None and len(server.asked) > server.fails_after:
                    self.send_error(429)
                    return
                if int(index) % 10 == 0:
                    self.send_error(404)
                    return
                told = [
                    {"description": HOSTILE, "explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair"}
                ]
                body = json.dumps(answer(model, source, index, told if int(index) % 2 else [])).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv(SERVER, server.address)
    yield server
    server.close()


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...], Finished]:
    """A circuit of dictionaries that Neuronpedia is said to host: the root, the command, and what it gave."""
    root = tmp_path_factory.mktemp("hosted")
    sfc("train", "--preset", "tiny", root=root)
    (trained,) = root.glob("saes/tiny-*")
    for layer in (0, 1):
        site = f"blocks.{layer}.hook_resid_post"
        config = shutil.copytree(trained / site, root / "theirs" / site) / CONFIG_FILE
        values = json.loads(config.read_text())
        values["metadata"]["neuronpedia_id"] = PLACE.format(layer=layer)
        config.write_text(json.dumps(values))
    command = (*COMMAND, "--set", f"saes.source={root / 'theirs'}")
    return root, command, sfc(*command, root=root)


def cards_of(finished: Finished) -> dict[str, Any]:
    return json.loads(path_of(finished, "features").read_text())["features"]


def path_of(finished: Finished, name: str, root: Path | None = None) -> Path:
    """A file of a circuit, or its copy below another root."""
    path = Path(finished.result["files"][name])
    return path if root is None else root / path.relative_to(path.parents[3])


def test_nothing_is_sent_without_being_asked_for_and_every_feature_has_its_link(
    hosted: tuple[Path, tuple[str, ...], Finished], server: Server
) -> None:
    root, command, plain = hosted
    assert sfc(*command, root=root).result == plain.result and not server.asked
    page = path_of(plain, "page").read_text()
    for name, card in cards_of(plain).items():
        layer, feature = name.removeprefix("resid_post.").split("/F")
        link = f"https://www.neuronpedia.org/{PLACE.format(layer=layer)}/{feature}"
        assert card["neuronpedia"] == link and link in page and "published" not in card


def test_explanations_are_fetched_once_shown_as_theirs_and_escaped(
    hosted: tuple[Path, tuple[str, ...], Finished], server: Server
) -> None:
    root, command, plain = hosted
    root = Path(shutil.copytree(root, root.parent / "fetched"))
    cards = cards_of(plain)
    fetched = sfc(*command, "--neuronpedia", root=root)
    assert fetched.result["n_nodes"] == plain.result["n_nodes"]
    numbers = sorted(f"/api/feature/{card['neuronpedia'].split('org/')[1]}" for card in cards.values())
    assert sorted(server.asked) == numbers, "one request for each"
    assert all("Authorization" not in headers and "Cookie" not in headers for headers in server.headers)
    after, page = cards_of(fetched), path_of(fetched, "page").read_text()
    for card in after.values():
        number = int(card["neuronpedia"].rpartition("/")[2])
        has_one = number % 2 == 1 and number % 10
        assert bool(card["published"]["text"]) == bool(has_one)
        if has_one:
            told = explained(card)
            assert told.startswith("Neuronpedia (by gpt-4o-mini): words about <script>alert(1)</script> and  knives xx")
            assert len(told) < 250 and "\u202e" not in told and "\n" not in told
            assert {key: value for key, value in card.items() if key != "published"} == cards[_name(after, card)]
    assert any(card["published"]["text"] for card in after.values())
    assert "<script>alert(1)" not in page and html.escape("Neuronpedia (by gpt-4o-mini)") in page
    asked = len(server.asked)
    assert sfc(*command, "--neuronpedia", root=root).result == fetched.result and len(server.asked) == asked
    another = sfc(*command, "--neuronpedia", "--set", "discovery.method=attribution", root=root)
    known = {card["neuronpedia"] for card in after.values()}
    new = {card["neuronpedia"] for card in cards_of(another).values()} - known
    assert len(server.asked) == asked + len(new), "what is known of another circuit is not asked for again"


def _name(cards: dict[str, Any], card: dict[str, Any]) -> str:
    return next(name for name, each in cards.items() if each is card)


def test_without_a_network_the_page_is_as_it_was_and_what_was_fetched_is_kept(
    hosted: tuple[Path, tuple[str, ...], Finished], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, command, plain = hosted
    root = Path(shutil.copytree(root, root.parent / "offline"))
    files = [path_of(plain, name, root) for name in ("page", "features")]
    before = [path.read_bytes() for path in files]
    monkeypatch.setenv(SERVER, "http://127.0.0.1:9")
    offline = sfc(*command, "--neuronpedia", root=root)
    assert offline.status == 0 and "http://127.0.0.1:9 gives no answer" in offline.stderr
    assert [path.read_bytes() for path in files] == before and not (root / "neuronpedia").exists()
    monkeypatch.setenv(SERVER, server.address)
    server.fails_after = 3
    limited = sfc(*command, "--neuronpedia", root=root)
    assert limited.status == 0 and "answers 429" in limited.stderr
    done = [card for card in cards_of(limited).values() if "published" in card]
    assert len(done) == 3
    server.fails_after = None
    assert all("published" in card for card in cards_of(sfc(*command, "--neuronpedia", root=root)).values())
    assert len(server.asked) == len(cards_of(plain)) + 1
