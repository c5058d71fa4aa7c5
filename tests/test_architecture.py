"""The house: rooms in their order, no import circle, one module that registers hooks, no torch where none is needed.

Imports inside functions count like those at the top; those under `if TYPE_CHECKING` do not, since nothing runs them.
A name in a registry ("sfc.circuits.spaces:heads") is not an import, as an entry point is none.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "sfc"
ROOMS = (
    "core", "stats", "data", "models", "saes", "circuits", "behaviors", "run", "session", "features", "pages",
    "studies", "api", "explorer", "cli_options", "cli", "__main__",
)  # fmt: skip
MOST_LINES = 400
PATHS = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module's name, `sfc.core.config`; that of its package for `__init__.py`."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PATHS}


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    tree, imported = ast.parse(MODULES[module].read_text(encoding="utf-8")), set()
    for node in running(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in MODULES else str(node.module) for name in names} & set(MODULES)
    return imported - {module}


def running(node: ast.AST) -> Iterator[ast.AST]:
    """The node and everything below it but what is there for type checkers alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield from running(child)


GRAPH = nx.DiGraph((module, imported) for module in MODULES for imported in imports_of(module))


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"sfc"}))
def test_a_module_imports_only_rooms_above_its_own(module: str) -> None:
    place = ROOMS.index(room_of(module))
    below = {name for name in imports_of(module) if name == "sfc" or ROOMS.index(room_of(name)) > place}
    assert not below


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert [sorted(circle) for circle in nx.strongly_connected_components(GRAPH) if len(circle) > 1] == []


def test_modules_have_one_reason_to_exist() -> None:
    long = {str(path.relative_to(PACKAGE)) for path in PATHS if len(path.read_text().splitlines()) > MOST_LINES}
    assert not long, "split what is two things"


def test_only_one_module_registers_hooks() -> None:
    users = [path.name for path in PATHS if "register_forward" in path.read_text(encoding="utf-8")]
    assert users == ["interventions.py"]


def test_nothing_unpickles() -> None:
    for path in PATHS:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in text and "torch.load(" not in text, path


@pytest.mark.parametrize(
    "program",
    ["import sfc", "import sfc.cli", "from sfc.core.registry import load_plugins; load_plugins()"],
    ids=["the package", "the command line", "everything registered"],
)
def test_torch_is_imported_by_what_runs_a_model_alone(program: str) -> None:
    told = "; import sys; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program + told], capture_output=True, text=True, cwd=REPOSITORY)
    assert ran.stdout == "False\n", ran.stderr
