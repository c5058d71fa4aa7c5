"""A small root in which everything is finished, what users give to commands beside it, and how attacks are watched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import Finished, sfc

from hostile import inputs
from hostile.sampling import assert_held, at_most, files_below

PRESET = ("--preset", "small.yaml")
DATA = ("--data", "data")
SLOWEST = 300.0
"""seconds that a case may take on a busy machine; one that hangs takes for ever"""


class Home(NamedTuple):
    """A folder with a root and, beside it, what is given to commands."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def given(self) -> Path:
        return self.folder / "given"

    def own(self, study: str) -> Path:
        """The folder of a finished artifact of the root."""
        return next(self.root.glob(f"circuits/small/{study}-*/manifest.json")).parent

    def empty(self) -> None:
        """Remove what earlier cases were given."""
        for path in self.given.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The home, with a finished circuit."""
    return made(tmp_path_factory.mktemp("home"))


def made(folder: Path) -> Home:
    """See `home`."""
    home = Home(folder)
    home.given.mkdir()
    write_data(home.root / "data" / "data")
    (home.root / "small.yaml").write_text(inputs.PRESET, encoding="utf-8")
    finished = sfc("discover", *PRESET, *DATA, "--category", "violence", "--json", root=home.root)
    assert finished.status == 0, finished.stderr
    return home


def write_data(folder: Path) -> None:
    """A small data set."""
    folder.mkdir(parents=True)
    for name, prompts in (("80k", inputs.SAFE), ("hard-1k", inputs.HARD), ("toxic", inputs.TOXIC)):
        (folder / f"or-bench-{name}.csv").write_text(inputs.prompts_csv(prompts), encoding="utf-8")
    (folder / "pairs.csv").write_text(inputs.PAIRS, encoding="utf-8")
    (folder / "topics.csv").write_text(inputs.TOPICS, encoding="utf-8")


def attack(home: Home, *arguments: object, run: Callable[..., Finished] = sfc) -> Finished:
    """Run a command, and check everything that must hold whatever it was given."""
    manifests = {path: path.stat().st_mtime_ns for path in home.root.rglob("manifest.json")}
    given = files_below(home.given)
    with at_most(SLOWEST):
        finished = run(*arguments, root=home.root)
    assert_held(finished)
    assert files_below(home.given) == given, "it wrote into what it was given"
    assert {path.name for path in home.folder.iterdir()} == {"root", "given"}, "it wrote outside its root"
    for path in home.root.rglob("manifest.json"):
        if manifests.get(path) != path.stat().st_mtime_ns:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            missing = [name for name in manifest.get("files", {}).values() if not (path.parent / name).exists()]
            assert not missing, f"{path.parent} counts as finished without {missing}"
            assert finished.status == 0 or manifest.get("study") != arguments[0], f"{path.parent} counts as finished"
    return finished
