"""What a stranger writes outside the package is used like what comes with it, and is spoken of in its own words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import Finished, assert_one_line, sfc_commands, sfc_process
from conftest import SITES, random_dictionary
from plotly.offline import get_plotlyjs
from safetensors.torch import save_file

STRANGER = Path(__file__).parent / "stranger"
PLUGINS = [STRANGER / f"{name}.py" for name in ("study", "behavior", "method", "nodes", "sae")]
FAST = (
    "behavior=agreement", "prompts.limit=40", "saes.steps=5", "evaluation.sizes=[4,16]", "evaluation.random_draws=2",
    "evaluation.replies=4", "discovery.checked_prompts=4", "discovery.checked_nodes=2",
)  # fmt: skip
TINY = ("--preset", "tiny", *(part for setting in FAST for part in ("--set", setting)))
STEERING = (
    "steering.min_induced=-99", "steering.max_kl=99", "steering.max_loss=99", "steering.contrasts=[]",
    "steering.prompts=8", "steering.tried_prompts=4", "steering.random_directions=2", "steering.shuffled_directions=1",
    "steering.ordinary_prompts=2", "steering.ordinary_tokens=4", "steering.reply_tokens=3",
)  # fmt: skip
COMMANDS = {
    "study": ("scores", *TINY, "--category", "food"),
    "behavior": ("discover", *TINY, "--method", "attribution"),
    "method": ("discover", *TINY, "--method", "aligned", "--set", "aligned.most=8"),
    "nodes": ("discover", *TINY, "--method", "attribution", "--set", "discovery.nodes=principal-components"),
    "sae": (
        "discover", *TINY, "--method", "attribution", "--set", "saes.source=tied",
        "--set", "saes.min_variance_explained=-1e9",
    ),
    "replies": ("behaviour", *TINY),
    "probe": ("probe", *TINY),
    "logits": ("attribute-logits", *TINY),
    "evaluation": ("evaluate", *TINY, "--set", "discovery.method=attribution"),
    "comparison": ("compare", *TINY, "--method", "attribution", "--categories", "food,places"),
    "patching": ("patch", *TINY, "--pairs", "wrapped", "--require", "score", "--limit", "4"),
    "steering": ("steer", *TINY, "--limit", "3", "--alphas=-0.5,0,0.5", *(p for s in STEERING for p in ("--set", s))),
    "saes": ("train", *TINY),
    "exports": ("export", *TINY, "--set", "discovery.method=attribution"),
    "report": ("report", *TINY),
    "batch": ("batch", *TINY, "--stages", "scores,probe"),
    "mistake": ("scores", *TINY, "--category", "fod"),
    "pairs": ("patch", *TINY),
    "unknown": ("discover", *TINY, "--method", "alligned"),
}  # fmt: skip
FORBIDDEN = re.compile(r"\b(?:refus\w*|toxic|safe)\b", re.IGNORECASE)
SHOWN = (".html", ".md", ".graphml", ".gexf", "circuit-tracer.json")


class Ran(NamedTuple):
    """Everything that the commands left behind."""

    root: Path
    commands: dict[str, Finished]

    def file(self, name: str, ending: str) -> Path:
        """The file that a command named last with this ending."""
        (path,) = (Path(line) for line in self.commands[name].stdout.splitlines() if line.endswith(ending))
        return path

    def text(self, name: str, ending: str) -> str:
        return self.file(name, ending).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(root: Path) -> Ran:
    for number, site in enumerate(SITES):
        folder, weights = root / "tied" / site, random_dictionary(site, seed=number).state_dict()
        metadata = {"hook_name": site, "sae_lens_version": "6.0.0"}
        config = {"architecture": "tied", "d_in": 32, "d_sae": 48, "k": 6, "metadata": metadata}
        folder.mkdir(parents=True)
        save_file({name: weights[name] for name in ("W_dec", "b_enc", "b_dec")}, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(config))
    ended = sfc_commands(list(COMMANDS.values()), root, SFC_PLUGINS=os.pathsep.join(map(str, PLUGINS)))
    return Ran(root, dict(zip(COMMANDS, ended, strict=True)))


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_a_plugin_has_at_most_sixty_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("mistake", "pairs", "unknown")])
def test_every_command_works_and_speaks_in_the_behaviors_words(ran: Ran, name: str) -> None:
    ended = ran.commands[name]
    assert ended.status == 0, ended.stderr
    texts = {"terminal": ended.stderr}
    texts |= {path.name: own_text(path) for path in map(Path, ended.stdout.splitlines()) if path.name.endswith(SHOWN)}
    assert len(texts) > 1
    for file, text in texts.items():
        wrong = [text[match.start() - 60 : match.end() + 60] for match in FORBIDDEN.finditer(text)]
        assert not wrong, file


def own_text(path: Path) -> str:
    """The text of a file without plotly's."""
    return path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def test_the_study_has_a_page_a_table_on_the_terminal_a_section_in_the_report_and_a_column_in_a_batch(ran: Ran) -> None:
    assert "opinion prompts" in ran.commands["study"].stderr
    page = ran.text("study", "scores.html")
    assert "<h1>The agreement score · tiny</h1>" in page and "Content-Security-Policy" in page
    assert "I think" in page and 'class="figure"' in page
    report = ran.text("report", "report.md")
    assert "AUROC of the agreement score" in report and "The agreement score" in report
    assert "AUROC of the agreement score" in ran.commands["batch"].stderr


def test_the_circuit_of_the_behavior_speaks_its_words(ran: Ran) -> None:
    page = ran.text("behavior", "circuit.html")
    for words in (
        "raises the agreement score", "lowers the agreement score", "nats of agreement score",
        "behind the model&#x27;s agreement",
        "opinion and question prompts against counterfactual", "Replies that agree",
    ):  # fmt: skip
        assert words in page, words
    tracer = json.loads(ran.text("exports", "circuit-tracer.json"))
    assert [node["clerp"] for node in tracer["nodes"] if node["feature_type"] == "logit"] == ["agreement score"]
    assert tracer["metadata"]["generation_settings"]["baseline"] == "counterfactual"
    graph = json.loads(ran.text("behavior", "circuit.json"))["graph"]
    assert (graph["population"], graph["behavior"]) == ("opinion and question", "agreement")


def test_replies_are_judged_by_the_behavior(ran: Ran) -> None:
    assert "how many agree" in ran.commands["replies"].stderr
    assert "agreed with" in ran.text("replies", "behaviour.html")


def test_the_method_ranks_by_its_own_settings_and_names_its_signs(ran: Ran) -> None:
    page, circuit = ran.text("method", "circuit.html"), json.loads(ran.text("method", "circuit.json"))
    assert "points to opinion prompts" in page and "points to question prompts" in page
    assert circuit["graph"]["effect_unit"] == "cosine" and len(circuit["nodes"]) <= 8


def test_the_nodes_are_principal_components(ran: Ran) -> None:
    nodes = json.loads(ran.text("nodes", "circuit.json"))["nodes"]
    numbers = [int(node["id"].rpartition("/F")[2]) for node in nodes if node["kind"] == "feature"]
    assert numbers and max(numbers) < 16
    assert "principal-components" in ran.file("nodes", "circuit.json").parent.name


def test_dictionaries_of_the_architecture_are_used(ran: Ran) -> None:
    folders = [path.parent for path in ran.root.glob("saes/*/*/cfg.json") if '"tied"' in path.read_text()]
    assert len(folders) == len(SITES)
    nodes = json.loads(ran.text("sae", "circuit.json"))["nodes"]
    assert all(int(node["id"].rpartition("/F")[2]) < 48 for node in nodes if node["kind"] == "feature")


def test_mistakes_end_with_one_line(ran: Ran) -> None:
    assert_one_line(ran.commands["mistake"], "no topic 'fod'", "food")
    assert_one_line(ran.commands["pairs"], "'agreement' has no pairs of prompts")
    assert_one_line(ran.commands["unknown"], "no method 'alligned'", "aligned")


def test_an_installed_package_registers_by_its_entry_points(tmp_path: Path) -> None:
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sfc.plugins]\nscores = stranger_scores\n")
    (tmp_path / "stranger_scores.py").write_text((STRANGER / "study.py").read_text(encoding="utf-8"))
    listed = subprocess.run(
        [sys.executable, "-c", "from sfc.studies.study import STUDIES; print(STUDIES.names())"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, cwd=STRANGER.parents[1],
    )  # fmt: skip
    assert "'scores'" in listed.stdout, listed.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "is not a Python file"),
        ("1 / 0", "ZeroDivisionError"),
        ("import nowhere", "nowhere"),
        ("}", "SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_named(text: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    if text:
        path.write_text(text)
    assert_one_line(sfc_process("presets", root=tmp_path, SFC_PLUGINS=str(path)), "broken.py", expected)
