"""Artifacts: fingerprints, manifests, locks, and writes that happen whole or not at all."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfc.core.artifacts import Artifact, fingerprint, locked, read_json, replacing, write_csv, write_json, write_text
from sfc.core.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.text(), JSON)
def test_fingerprints_change_with_content_and_not_with_order(inputs: dict, key: str, value: object) -> None:
    assert fingerprint(inputs) == fingerprint(dict(reversed(inputs.items())))
    if key not in inputs:
        assert fingerprint({**inputs, key: value}) != fingerprint(inputs)
    assert fingerprint({"value": value}) != fingerprint({"value": [value]})


def test_an_artifact_is_complete_when_its_manifest_speaks_of_the_same_inputs(tmp_path: Path) -> None:
    artifact = Artifact.of(tmp_path, "x", {"a": (1, 2)})
    with artifact.being_made() as folder:
        assert not artifact.is_complete()
        artifact.finish(figure=3)
    assert folder.name == f"x-{artifact.fingerprint}" and artifact.is_complete()
    assert artifact.manifest()["figure"] == 3 and "torch" in artifact.manifest()["versions"]
    other = Artifact(folder, {"a": 5})
    assert not other.is_complete()


def test_rebuilding_removes_what_was_there_and_resuming_does_not(tmp_path: Path) -> None:
    artifact = Artifact.of(tmp_path, "x", {})
    with artifact.being_made() as folder:
        (folder / "part").touch()
    with artifact.being_made() as folder:
        assert (folder / "part").exists()
    with artifact.being_made(rebuild=True) as folder:
        assert not (folder / "part").exists()


def test_a_failure_leaves_finished_parts_but_no_empty_folder(tmp_path: Path) -> None:
    artifact = Artifact.of(tmp_path, "x", {})
    with pytest.raises(RuntimeError), artifact.being_made():
        raise RuntimeError
    assert not artifact.folder.exists()
    with pytest.raises(RuntimeError), artifact.being_made() as folder:
        (folder / "part").touch()
        raise RuntimeError
    assert (folder / "part").exists() and not artifact.is_complete()
    with artifact.being_made():
        pass


def test_a_second_process_is_told_and_stops(tmp_path: Path) -> None:
    artifact = Artifact.of(tmp_path, "x", {})
    code = (
        "from pathlib import Path; from sfc.core.artifacts import Artifact\n"
        f"with Artifact.of(Path({str(tmp_path)!r}), 'x', {{}}).being_made(): pass"
    )
    with artifact.being_made() as folder:
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert second.returncode == 1 and f"another process is working on {folder}" in second.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(UserError), locked(tmp_path / "lock"), locked(tmp_path / "lock"):
        pass


def test_a_write_that_fails_leaves_nothing_behind_and_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "old"


def test_json_holds_no_nan_and_says_which_file_is_broken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b\.json is not JSON"):
        read_json(tmp_path / "b.json")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=4))
def test_tables_keep_any_text(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        write_csv(path, pd.DataFrame({"text": texts, "refused": True}))
        read = pd.read_csv(path, keep_default_na=False, dtype={"text": str})
    assert read["text"].tolist() == texts and read["refused"].tolist() == [True] * len(texts)


def test_floats_keep_as_many_digits_as_asked(tmp_path: Path) -> None:
    third = pd.Series([1 / 3], dtype="float32")
    table = pd.DataFrame({"n": [123456], "small": [1.23456e-7], "x": third, "no": [np.nan]})
    table["na"] = pd.array([pd.NA], "Float64")
    write_csv(tmp_path / "table.csv", table, digits=3)
    assert (tmp_path / "table.csv").read_text() == '"n","small","x","no","na"\n123456,1.23e-07,0.333,"",""\n'
    write_csv(tmp_path / "table.csv", table)
    assert pd.read_csv(tmp_path / "table.csv")["small"][0] == 1.23456e-7
