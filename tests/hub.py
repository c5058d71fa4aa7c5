"""A model hub on this machine: repositories that are folders, served as huggingface_hub asks for them."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

_COMMIT = "0" * 40


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve the repositories `root/OWNER/NAME`; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repository = root.joinpath(*parts[2:4])
                files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
                tree = [
                    {"type": "file", "path": str(path.relative_to(repository)), "size": path.stat().st_size, "oid": "0"}
                    for path in files
                ]
                found = tree if "tree" in parts else {"id": "/".join(parts[2:4]), "sha": _COMMIT}
                return self._send(200 if repository.is_dir() else 404, json.dumps(found).encode(), with_body)
            path = root.joinpath(*parts[:2], *parts[4:])
            if parts[2:3] != ["resolve"] or not path.is_file():
                return self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT})
            data = path.read_bytes()
            marks = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": _COMMIT}
            if asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1 if last else None]
            return self._send(206 if asked else 200, data, with_body, marks)

        def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hub(root: Path) -> Iterator[str]:
    """Serve the repositories below `root` to this process, in place of the hub; what is fetched is kept beside them."""
    from huggingface_hub import constants

    with serving(root) as address, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(root.parent / f"{root.name}-cache"))
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        yield address
