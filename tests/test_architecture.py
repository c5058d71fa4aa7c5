"""The house: a room imports only what stands above it, and only the interventions module registers hooks."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sfc"
ROOMS = (
    "core", "stats", "data", "models", "saes", "circuits", "features", "pages", "run", "pipeline", "pipeline_study",
    "tables", "studies", "api", "explorer", "cli_options", "cli_study", "cli",
)  # fmt: skip


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Rooms that a module imports when it is imported itself (not inside functions, which is how cycles are cut)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sfc"):
            names = [node.module] if node.module != "sfc" else [f"sfc.{alias.name}" for alias in node.names]
            modules |= {name.split(".")[1] for name in names}
    return modules


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_above_it(path: Path) -> None:
    room = _room(path)
    if room in ("__init__", "pipeline", "pipeline_study"):
        return
    later = set(ROOMS[ROOMS.index(room) + 1 :])
    assert not _imports(path) & later


def test_every_room_is_known() -> None:
    found = {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found <= set(ROOMS)


def test_only_one_module_registers_hooks() -> None:
    users = [path.name for path in PACKAGE.rglob("*.py") if "register_forward" in path.read_text(encoding="utf-8")]
    assert users == ["interventions.py"]


def test_nothing_unpickles() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in text and "torch.load(" not in text, path
