"""The README's commands do what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_the_make_targets_that_it_names_exist() -> None:
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    named = [command for command in COMMANDS if command.startswith("make ")]
    assert named and all(command in listed for command in named)


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        path, _, heading = target.partition("#")
        assert (REPOSITORY / path).exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", (REPOSITORY / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [text.lower().replace(" ", "-") for text in headings], target


def _offline(command: str) -> bool:
    return command.startswith(("sfc ", "python ")) and "download" not in command and "llama" not in command


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if _offline(command)])
def test_its_commands_run_on_the_tiny_preset(command: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "readme"
    root.mkdir(exist_ok=True)
    program, *arguments = shlex.split(command)
    if program == "sfc":
        program, arguments = str(Path(sys.executable).parent / "sfc"), arguments
    else:
        program, arguments = sys.executable, [str(REPOSITORY / arguments[0]), *arguments[1:]]
    if "--models" in arguments:
        arguments[arguments.index("--models") + 1] = "tiny"
    if "--help" not in arguments:
        arguments += ["--preset", "tiny", "--root", str(root)]
    if "report" in arguments:  # of something
        subprocess.run([program, "probe", *arguments[1:]], capture_output=True, check=True)
    finished = subprocess.run([program, *arguments], capture_output=True, text=True, env={**os.environ})
    assert finished.returncode == 0, finished.stderr
    for path in finished.stdout.splitlines() if "--help" not in arguments else []:
        assert Path(path).exists(), path
