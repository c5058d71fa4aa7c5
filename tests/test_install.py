"""The wheel: it holds everything the package needs, and works in an empty folder of a fresh environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from a copy of the sources, without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "sfc", source / "sfc", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source / "dist"))
    _run(sys.executable, "-m", "pip", "wheel", *options, str(source))
    (made,) = (source / "dist").glob("sfc-*.whl")
    return made


def _run(*command: str, cwd: Path | None = None) -> str:
    # Nothing of this checkout may be found instead of the wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    files = (path for path in (REPOSITORY / "sfc").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {path.relative_to(REPOSITORY).as_posix() for path in files}


@pytest.mark.slow
def test_in_a_fresh_environment_and_an_empty_folder_it_discovers_and_reports(wheel: Path, tmp_path: Path) -> None:
    environment, here = tmp_path / "environment", tmp_path / "here"
    here.mkdir()
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # Dependencies come from this environment; its own editable `sfc` does not, for that is found by its .pth files.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    )
    place = _run(str(python), "-c", "import sfc; print(sfc.__file__)", cwd=here)
    assert Path(place.strip()).is_relative_to(site_packages)

    sfc = str(environment / "bin" / "sfc")
    made = _run(sfc, "discover", "--preset", "tiny", cwd=here).splitlines()
    assert made and all((here / path).is_file() for path in made)
    assert {path.name for path in here.iterdir()} == {"activations", "saes", "circuits"}
    (page, *_) = _run(sfc, "report", "--preset", "tiny", cwd=here).splitlines()
    assert "violence" in (here / page).read_text(encoding="utf-8")
    counts = _run(sfc, "data", cwd=here).splitlines()
    assert all((here / path).is_file() for path in counts)
