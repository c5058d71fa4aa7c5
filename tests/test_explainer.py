"""Explanations of features by an endpoint: what is sent and what is not, how answers are scored, and how it fails."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import sfc

from sfc.core.errors import UserError
from sfc.features.contexts import Evidence
from sfc.features.explainer import KEY, Endpoint, LabelOptions, explain
from sfc.features.labels import caption, explained

N = 80
MADE_ON = np.arange(N) % 2 == 0
FIRES = np.arange(N) % 5 == 0
EVIDENCE = Evidence("a rule", 0.9, np.arange(N), FIRES * np.linspace(2, 1, N), MADE_ON, True)
SECRET = "sk-not-to-be-shown"
Reply = Callable[[str, str], Any]


def text_of(row: int, whole: bool) -> str:
    assert whole, "at the template a context is a prompt"
    return f"text <{row}> {'steal' if FIRES[row] else 'paint'}"


def honest(instruction: str, text: str) -> str:
    """Explains, and judges by the word that it finds; with words around its list, as models have."""
    if "JSON list" not in instruction:
        return "  theft\n and stealing "
    return f"Here you are: {json.dumps([int('steal' in line) for line in text.splitlines()])}"


class Server:
    """An endpoint on this machine that remembers what it was sent."""

    def __init__(self) -> None:
        self.reply: Reply = honest
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                system, user = (message["content"] for message in body["messages"])
                server.asked.append((system, user))
                server.headers.append({"path": self.path, **self.headers})
                answer = server.reply(system, user)
                if isinstance(answer, str):
                    answer = (200, {}, json.dumps({"choices": [{"message": {"content": answer}}]}).encode())
                status, headers, payload = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def do_GET(self) -> None:
                server.asked.append(("GET", self.path))
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def endpoint(server: Server, suffix: str = "", seconds: float = 20) -> Endpoint:
    return Endpoint(LabelOptions(explainer=server.address + suffix, explainer_model="m", explainer_seconds=seconds))


def test_an_explanation_is_made_of_one_half_and_judged_on_the_other(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, SECRET)
    explanation = explain(endpoint(server), EVIDENCE, text_of)
    assert explanation == {"text": "theft and stealing", "score": 1.0, "model": "m"}
    (_, examples), (judge, texts) = server.asked
    shown, judged = ([int(text.split("<")[1].split(">")[0]) for text in of.splitlines()] for of in (examples, texts))
    assert MADE_ON[shown].all() and not MADE_ON[judged].any()
    assert FIRES[shown].sum() == (FIRES & MADE_ON).sum() and (~FIRES[shown]).sum() == 5
    assert FIRES[judged].sum() == (FIRES & ~MADE_ON).sum() and (~FIRES[judged]).sum() == 10
    assert "theft and stealing" in judge and "9: text <0> steal" in examples
    assert all(line.startswith(f"{n}. text") for n, line in enumerate(texts.splitlines(), 1)), "no value is told"
    assert {(h["path"], h["Authorization"]) for h in server.headers} == {("/v1/chat/completions", f"Bearer {SECRET}")}


def test_a_wrong_explanation_scores_low_and_one_that_says_nothing_as_chance(server: Server) -> None:
    server.reply = lambda system, text: (
        json.dumps([int("paint" in line) for line in text.splitlines()]) if "JSON list" in system else "painting"
    )
    assert explain(endpoint(server), EVIDENCE, text_of)["score"] == 0.0
    server.reply = lambda system, text: json.dumps([1] * len(text.splitlines())) if "JSON list" in system else "all"
    assert explain(endpoint(server), EVIDENCE, text_of)["score"] == 0.5


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/chat/completions"])
def test_the_address_may_name_the_api_or_not_and_without_a_key_none_is_sent(
    server: Server, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    endpoint(server, suffix).ask("a", "b")
    assert server.headers[0]["path"] == "/v1/chat/completions" and "Authorization" not in server.headers[0]


def test_a_feature_that_never_fires_is_not_asked_about(server: Server) -> None:
    explanation = explain(endpoint(server), EVIDENCE._replace(values=np.zeros(N)), text_of)
    assert explanation["score"] is None and not server.asked


@pytest.mark.parametrize("verdicts", ["", "yes", "[1, 0]", "[1, 0, ", '["a"]', "[NaN" + ", 1" * 17 + "]", "{}"])
def test_an_answer_that_is_no_list_of_verdicts_gives_no_score(server: Server, verdicts: str) -> None:
    server.reply = lambda system, _: verdicts if "JSON list" in system else "theft"
    assert explain(endpoint(server), EVIDENCE, text_of) == {"text": "theft", "score": None, "model": "m"}


def test_what_comes_back_is_one_short_line_of_visible_text(server: Server) -> None:
    hostile = "<script>alert(1)</script>\n\x00\x1b[31m\u202e\ud800" + "x" * 5000
    server.reply = lambda system, _: "[]" if "JSON list" in system else hostile
    text = explain(endpoint(server), EVIDENCE, text_of)["text"]
    assert text.startswith("<script>alert(1)</script> [31mxxx") and len(text) == 200 and text.isprintable()
    told = explained({"explanation": {"text": text, "score": None, "model": "m"}})
    assert told.startswith("explanation by the model m: <script>") and told.endswith("not scored")
    assert explained({}) == "" and caption({"label": "a"}) == "a"


FAILURES: dict[str, tuple[Reply, str]] = {
    "an error": (lambda *_: (500, {}, b"no"), "answers 500"),
    "no JSON": (lambda *_: (200, {}, b"<html>"), "gives no answer"),
    "another API": (lambda *_: (200, {}, b'{"output": "x"}'), "does not answer as OpenAI's API does"),
    "no text": (lambda *_: (200, {}, b'{"choices": [{"message": {"content": null}}]}'), "answers without a text"),
    "endless": (lambda *_: (200, {}, b"x" * (3 << 20)), "more than"),
    "elsewhere": (lambda *_: (307, {"Location": "/stolen"}, b""), "answers 307"),
    "silence": (lambda *_: time.sleep(3) or (200, {}, b""), "timed out"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line_without_the_key(server: Server, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    server.reply, expected = FAILURES[name]
    with pytest.raises(UserError, match=expected) as raised:
        endpoint(server, seconds=1).ask("a", "b")
    assert SECRET not in str(raised.value) and "\n" not in str(raised.value)
    assert len(server.asked) == 1, "no redirect is followed"


def test_addresses_and_keys_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("ftp://example.org", "file:///etc/passwd", "localhost:80", "http://u:p@example.org", "http://"):
        with pytest.raises(UserError, match=KEY):
            LabelOptions(explainer=address)
    monkeypatch.setenv(KEY, f"{SECRET}\r\nX: y")
    with pytest.raises(UserError, match="characters") as raised:
        Endpoint(LabelOptions(explainer="http://127.0.0.1:1"))
    assert SECRET not in str(raised.value)


def test_a_circuit_is_explained_after_it_is_found_and_goes_on_where_it_stopped(tmp_path: Path, server: Server) -> None:
    quick = ["--set", "discovery.method=attribution", "--set", "evaluation.replies=0", "--set", "evaluation.sizes=[4]"]
    command = ["discover", "--preset", "tiny", *quick, "--json"]
    plain = sfc(*command, root=tmp_path).result
    cards = json.loads(Path(plain["files"]["features"]).read_text())["features"]
    assert not server.asked and not any("explanation" in card for card in cards.values())
    assert all(card["label"] for card in cards.values())

    server.reply = lambda system, text: honest(system, text) if len(server.asked) <= 2 else (503, {}, b"")
    failed = sfc(*command, "--explainer", server.address, root=tmp_path)
    assert failed.status == 2 and "answers 503" in failed.stderr and "Traceback" not in failed.stderr
    server.reply = lambda system, text: "[]" if "JSON list" in system else "<b>bold</b>"
    asked = len(server.asked)
    assert sfc(*command, "--explainer", server.address, root=tmp_path).result["files"] == plain["files"]
    cards = json.loads(Path(plain["files"]["features"]).read_text())["features"]
    texts = [card["explanation"]["text"] for card in cards.values()]
    fires = [text != "never fires here" for text in texts]
    assert texts.count("theft and stealing") == 1 and len(server.asked) - asked == 2 * (sum(fires) - 1)
    page = Path(plain["files"]["page"]).read_text()
    assert "explanation by the model default: " in page and "<b>bold" not in page
    before = len(server.asked)
    assert sfc(*command, "--explainer", server.address, root=tmp_path).result["files"] == plain["files"]
    assert len(server.asked) == before, "what is explained is up to date"
