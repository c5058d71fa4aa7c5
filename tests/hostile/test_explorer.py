"""The explorer over damaged artifacts, and asked by whoever reaches its port; all through HTTP."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from hostile.home import PRESET, Home, attack
from hostile.inputs import OBJECT, TABLE, damages, put
from hostile.sampling import CONTROLS, at_most, sample, spread

pytest.importorskip("dash", reason="dash is not installed: pip install 'sfc[explorer]'")
from test_explorer import answer

from sfc.core.errors import UserError
from sfc.explorer.app import explorer
from sfc.explorer.shelf import shelf

HERE = {"base_url": "http://127.0.0.1"}


def circuit_key(root: Path) -> str:
    return next(iter(shelf(root)))


def layout(app: Any) -> str:
    response = app.server.test_client().get("/_dash-layout", **HERE)
    assert response.status_code == 200
    return json.dumps(response.get_json(), ensure_ascii=False)


def asked(app: Any, root: Path, prompt: str, **controls: Any) -> dict[str, Any]:
    """What a browser is answered that puts a prompt to the first circuit's model."""
    values = {"scaled": None, "factor": 0, "direction": None, "alpha": 0.1, **controls}
    circuit = shelf(root)[circuit_key(root)]
    chosen = {f"first-{name}": getattr(circuit, name) for name in ("preset", "category", "method")}
    inputs = {"run.n_clicks": 1, **{f"{name}.value": value for name, value in values.items()}}
    return answer(app, "score.children", inputs, {f"{k}.value": v for k, v in {"prompt": prompt, **chosen}.items()})


@pytest.mark.parametrize(
    ("prompt", "controls", "told"),
    [
        ("word " * 400, {}, "the prompt is too long: this model takes 984 tokens"),
        ("x" * 1_000_000, {}, "the prompt is too long"),
        ("hello", {"direction": "../../etc"}, "to steer along"),
        ("hello", {"direction": "resid_post.0/F999999", "alpha": 1}, "to steer along"),
        ("hello", {"scaled": ["resid_post.0/F999999"]}, "error: "),
        ("hello", {"scaled": ["\x1b[2J"]}, "error: "),
        ("hello", {"scaled": ["resid_post.0/F1"], "factor": float("inf")}, "finite"),
        ("hello", {"alpha": float("nan")}, "finite"),
    ],
)
def test_an_error_of_the_user_is_a_message(home: Home, prompt: str, controls: dict[str, Any], told: str) -> None:
    app = explorer(home.root, "cpu")
    with at_most(120):
        answered = asked(app, home.root, prompt, **controls)
    message = answered["problem"]["children"]
    assert message.startswith("error: ") and told in message and not CONTROLS.search(message)
    assert "score" not in answered or "children" not in answered["score"]


def test_what_went_well_takes_the_message_away(home: Home) -> None:
    answered = asked(explorer(home.root, "cpu"), home.root, "hello")
    assert answered["problem"]["children"] == "" and "nats" in answered["score"]["children"]


FILES = {
    "manifest.json": (OBJECT,), "circuit.json": (OBJECT,), "result.json": (OBJECT,), "features.json": (OBJECT,),
    "curve.csv": (TABLE,), "circuit.html": (), "labels.json": (OBJECT,),
}  # fmt: skip
DAMAGED = [(name, damage) for name, kinds in FILES.items() for _, damage in spread((name,), damages(*kinds), 60)]


@pytest.mark.parametrize(("name", "damage"), sample(DAMAGED, keep=5))
def test_a_damaged_artifact_is_skipped_with_a_note(home: Home, tmp_path: Path, name: str, damage: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(home.root / "circuits", root / "circuits")
    folder = root / "circuits" / circuit_key(root)
    sound = folder.with_name("circuit-violence-sound-00000000")
    shutil.copytree(folder, sound)
    path = folder / name
    put(path, path.read_bytes() if path.exists() else b"{}", damage, *FILES[name])
    with at_most(60):
        app = explorer(root, "cpu")
        offered, keys = layout(app), [circuit.folder for circuit in shelf(root).values()]
        assert sound in keys
        assert folder in keys or f"left out: {folder}" in offered or not path.exists()
        client = app.server.test_client()
        for address in ("page", "artifact/circuits"):
            page = client.get(f"/{address}/{folder.relative_to(root / 'circuits').as_posix()}", **HERE)
            text = page.get_data(as_text=True)
            assert page.status_code in (200, 404, 500) and "Traceback" not in text
            assert page.status_code != 500 or (text.startswith("error: ") and "unexpected" not in text)


def test_with_damaged_circuits_alone_the_user_is_told_which(home: Home, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(home.root / "circuits", root / "circuits")
    for path in root.rglob("circuit.json"):
        path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"no finished circuit.*left out: .*circuit-violence"):
        explorer(root, "cpu")


BODIES = (
    b"", b"{", b"null", b"[]", b"3", b'{"output": null}', b'{"output": "score.children"}', b"[" * 100_000, b"\xff\xfe",
    b'{"output": "x.y", "inputs": [], "outputs": [], "state": [], "changedPropIds": []}',
    b'{"output": ' + b"9" * 6000 + b"}",
    json.dumps({"output": "problem.children", "inputs": [{"id": "prompt", "property": "value", "value": {}}]}).encode(),
)  # fmt: skip
ADDRESSES = (
    "/_dash-update-component", "/page/%00", "/page/..%2f..%2fetc%2fpasswd", "/artifact/%1b[2J", "/artifact//etc/passwd",
    "/page/" + "a" * 3000, "/assets/../../app.py", "/_dash-component-suites/../../etc/passwd", "/page/x?beside=%00",
    "/nowhere",
)  # fmt: skip


@pytest.mark.parametrize(("address", "body"), sample(spread(ADDRESSES, (None, *BODIES), 6), keep=4))
def test_a_request_that_nobody_means(home: Home, address: str, body: bytes | None) -> None:
    client = explorer(home.root, "cpu").server.test_client()
    with at_most(60):
        if body is None:
            response = client.get(address, **HERE)
        else:
            response = client.post(address, data=body, content_type="application/json", **HERE)
    text = response.get_data(as_text=True)
    assert "Traceback" not in text and "root:" not in text and not CONTROLS.search(text.replace("\r", ""))


def test_a_request_of_megabytes_is_refused(home: Home) -> None:
    client = explorer(home.root, "cpu").server.test_client()
    body = json.dumps({"output": "x" * (5 << 20)})
    assert client.post("/_dash-update-component", data=body, content_type="application/json", **HERE).status_code == 413


def test_all_that_is_served_and_every_page_below_the_root_has_a_policy(home: Home) -> None:
    key = circuit_key(home.root)
    client = explorer(home.root, "cpu").server.test_client()
    for address in ("/", "/_dash-layout", "/nowhere", f"/page/{key}", f"/artifact/circuits/{key}"):
        policy = client.get(address, **HERE).headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'self'" in policy
        assert ("sandbox" in policy) == (key in address) and ("unsafe-inline' 'sha" not in policy)
    pages = list(home.root.rglob("*.html"))
    assert pages
    for page in pages:
        head = page.read_text(encoding="utf-8")[:2000]
        assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in head, page


def test_a_port_that_is_taken_is_one_line(home: Home) -> None:
    home.empty()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finished = attack(home, "explore", *PRESET, "--port", taken.getsockname()[1])
    assert finished.status == 2 and "choose another with --port" in finished.stderr
