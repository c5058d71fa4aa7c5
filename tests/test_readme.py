"""The README's commands do what it says, and the documentation's links and examples are true."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import Forked, run_commands
from test_steer_command import LENIENT

from sfc.core.experiments import load_experiment

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [
    path
    for pattern in ("*.md", "*/README.md", "docs/*.md", "sfc/**/README.md")
    for path in sorted(REPOSITORY.glob(pattern))
]


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines for a shell, without comments."""
    lines = [line.split("#")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def anchors(page: Path) -> set[str]:
    """What links may name after a `#`: headings as GitHub makes addresses of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_make_targets_that_it_names_exist() -> None:
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    named = [command for command in commands(README) if command.startswith("make ")]
    assert named and all(command in listed for command in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked), target


def test_every_page_of_the_documentation_can_be_reached_from_the_readme() -> None:
    linked = {(REPOSITORY / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)]+)\)", README)}
    assert set((REPOSITORY / "docs").glob("*.md")) <= linked


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # it names what is gone
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:sfc|tests|tools|scripts|benchmarks)/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_the_example_of_a_preset_is_one(tmp_path: Path) -> None:
    [text] = blocks(README, "yaml")
    path = tmp_path / "my-model.yaml"
    path.write_text(text, encoding="utf-8")
    experiment = load_experiment(str(path))
    assert experiment.model.source == yaml.safe_load(text)["model"]["source"]


def test_examples_of_extensions_are_parts_of_the_files_that_are_tested() -> None:
    text = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    sections = [section for section in text.split("\n## ") if "```python" in section]
    assert len(sections) == 5
    for section in sections:
        [path] = re.findall(r"\]\(\.\./(tests/stranger/\w+\.py)\)", section)
        lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
        for wanted in blocks(section, "python")[0].splitlines():
            if wanted.strip() not in ("", "...", "# …"):
                assert wanted in lines, f"{path} has no line {wanted!r}"


FAST = (
    "learned_mask.steps=3", "evaluation.null_draws=0", "comparison.size=20", "comparison.shuffles=1",
    "comparison.replies=2",
)  # fmt: skip


def _offline(command: str) -> bool:
    return command.startswith(("sfc ", "python ")) and "download" not in command and "llama" not in command


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands(README) if _offline(command)])
def test_its_commands_run_on_the_tiny_preset(command: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "readme"
    root.mkdir(exist_ok=True)
    program, *arguments = shlex.split(command)
    script = None if program == "sfc" else REPOSITORY / arguments.pop(0)
    if "--help" not in arguments:
        arguments += ["--preset", "tiny", "--root", str(root)]
    if "steer" in arguments:
        arguments += LENIENT
    if re.search(r"discover|compare", command):
        arguments += [part for setting in FAST for part in ("--set", setting)]
    if "report" in arguments:  # of something
        Forked(run_commands, [["probe", *arguments[1:]]], cwd=root).communicate()
    process = Forked(run_commands, [arguments], "pass", script, cwd=root)
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    for path in told.splitlines() if "--help" not in arguments else []:
        assert Path(path).exists(), path
