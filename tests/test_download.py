"""`download` against a local server that speaks just enough of the hub's protocol."""

import csv
import hashlib
import io
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from sfc.core.errors import UserError
from sfc.data.download import SOURCES, Source, download


def content_of(source: Source, rows: int | None = None) -> bytes:
    """A file with the columns and (unless told otherwise) the number of rows that the source must have."""
    handle = io.StringIO(newline="")
    writer = csv.writer(handle)
    writer.writerow(source.columns)
    for number in range(source.rows if rows is None else rows):
        writer.writerow([f"{column} {number}" for column in source.columns])
    return handle.getvalue().encode()


class Hub(ThreadingHTTPServer):
    """Files by path, a log of requests, and a number of bytes after which the next answers break off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_after: list[int] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(match.group(1)) if wanted and (match := re.match(r"bytes=(\d+)-", wanted)) else 0
        revision = self.path.split("/resolve/")[1].split("/")[0]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            body = content[start:]
            if self.server.cut_after:
                body = body[: self.server.cut_after.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running server, and sources of few rows (but for one) so that the tests take no time."""
    sizes = {"or-bench-80k.csv": 4000}
    small = [source._replace(rows=sizes.get(source.file, 20)) for source in SOURCES]
    monkeypatch.setattr("sfc.data.download.SOURCES", tuple(small))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client waits between its attempts
    server = Hub()
    server.files = {source.url(""): content_of(source) for source in small}
    server.files = {path.removeprefix("https://huggingface.co"): data for path, data in server.files.items()}
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def path_of(hub: Hub, file: str) -> str:
    return next(path for path in hub.files if path.endswith(file))


def test_sources_are_what_the_project_says() -> None:
    assert [(source.target, source.rows) for source in SOURCES] == [
        ("or-bench/or-bench-80k.csv", 80_359),
        ("or-bench/or-bench-hard-1k.csv", 1_319),
        ("or-bench/or-bench-toxic.csv", 655),
        ("xstest/xstest_prompts.csv", 450),
    ]
    assert all(re.fullmatch("[0-9a-f]{40}", source.revision) for source in SOURCES)


def test_everything_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    results = download(tmp_path, hub.endpoint)
    assert [result.fetched for result in results] == [True] * 4
    assert all(result.path.read_bytes() == hub.files[path_of(hub, result.path.name)] for result in results)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {source.target for source in SOURCES}
    asked = len(hub.requests)
    assert [result.fetched for result in download(tmp_path, hub.endpoint)] == [False] * 4
    assert len(hub.requests) == asked


def test_only_what_is_missing_or_wrong_is_fetched(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, hub.endpoint)
    (tmp_path / "or-bench/or-bench-toxic.csv").write_text("prompt,category\nonly one,hate\n")
    (tmp_path / "xstest/xstest_prompts.csv").unlink()
    hub.requests.clear()
    assert [result.fetched for result in download(tmp_path, hub.endpoint)] == [False, False, True, True]
    assert hub.fetched() == ["or-bench-toxic.csv", "xstest_prompts.csv"]


def test_a_connection_that_breaks_is_taken_up_where_it_stopped(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut_after = [50_000]
    results = download(tmp_path, hub.endpoint)
    assert results[0].path.read_bytes() == hub.files[path_of(hub, "or-bench-80k.csv")]
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith("80k.csv")]
    assert ranges == [None, "bytes=50000-"]


def test_a_run_that_was_cut_short_goes_on_with_the_next_file(hub: Hub, tmp_path: Path) -> None:
    lost = path_of(hub, "or-bench-toxic.csv")
    content = hub.files.pop(lost)
    with pytest.raises(UserError, match=r"could not fetch or-bench-toxic\.csv"):
        download(tmp_path, hub.endpoint)
    left = sorted(path.name for path in (tmp_path / "or-bench").iterdir())
    assert left == ["or-bench-80k.csv", "or-bench-hard-1k.csv"]
    hub.files[lost] = content
    hub.requests.clear()
    assert [result.fetched for result in download(tmp_path, hub.endpoint)] == [False, False, True, True]
    assert hub.fetched() == ["or-bench-toxic.csv", "xstest_prompts.csv"]


def test_wrong_number_of_rows(hub: Hub, tmp_path: Path) -> None:
    hub.files[path_of(hub, "hard-1k.csv")] = content_of(SOURCES[1], rows=7)
    mine = tmp_path / "or-bench/or-bench-hard-1k.csv"
    mine.parent.mkdir()
    mine.write_text("prompt,category\nmine,hate\n")
    with pytest.raises(UserError, match=r"http.*or-bench-hard-1k\.csv has 7 rows instead of 20: try again"):
        download(tmp_path, hub.endpoint)
    assert mine.read_text() == "prompt,category\nmine,hate\n"
    assert not (tmp_path / "or-bench/or-bench-toxic.csv").exists()


@pytest.mark.parametrize("reason", ["no network", "no such file"])
def test_failure_says_where_to_put_the_file(hub: Hub, tmp_path: Path, reason: str) -> None:
    endpoint = "http://127.0.0.1:9" if reason == "no network" else hub.endpoint
    hub.files.clear()
    with pytest.raises(UserError) as caught:
        download(tmp_path, endpoint)
    message = str(caught.value)
    assert ("Connect" if reason == "no network" else "404") in message
    assert "\n" not in message
    assert f"{endpoint}/datasets/bench-llm/or-bench/resolve/e36d8b80e81837c8a8f264bbb2a49f1b32c7e272/" in message
    assert f"save it as {tmp_path / 'or-bench/or-bench-80k.csv'}" in message


def test_a_folder_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "or-bench").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write to .*or-bench \(File exists\)"):
        download(tmp_path, hub.endpoint)


def test_nothing_is_written_through_a_link(hub: Hub, tmp_path: Path) -> None:
    outside, data = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    data.mkdir()
    (data / "or-bench").symlink_to(outside)
    with pytest.raises(UserError, match=r"or-bench-80k\.csv leads out of .* by a link"):
        download(data, hub.endpoint)
    assert list(outside.iterdir()) == [] and hub.requests == []


def test_a_page_instead_of_the_file(hub: Hub, tmp_path: Path) -> None:
    hub.files[path_of(hub, "80k.csv")] = b"<html>Please log in</html>\nto go on\n"
    with pytest.raises(UserError, match=r"is not the file that was expected \(.*no column 'prompt'"):
        download(tmp_path, hub.endpoint)
    assert list((tmp_path / "or-bench").iterdir()) == []
