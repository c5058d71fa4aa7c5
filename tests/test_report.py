"""`sfc report`: every number is an artifact's, text stays text, and what is there is reported whatever it is."""

import json
import math
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
import pytest
from commands import sfc, unlist
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_formats import BYTES

from sfc.pages.blocks import Commands, Formula, Paragraph, Section, Table, cell, grid_table
from sfc.pages.plain import markdown_report, markdown_text
from sfc.pages.text import printable
from sfc.studies.study import STUDIES, Finished

TINY = ("--preset", "tiny", "--set", "prompts.limit=14")
NUMBER = r"−?\d[\d,]*(?:\.\d+)?(?:e[−+]\d+)?"
WHOLE_CELL = re.compile(rf"({NUMBER})(?: to ({NUMBER}))?(?: \(({NUMBER}) to ({NUMBER})\))?")
HOSTILE = "</script><img src=x onerror=alert(1)>|**b** [a](javascript:x) `c` <!-- &lt; https://evil.example"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an artifact of every kind."""
    root = tmp_path_factory.mktemp("root")
    (root / "bytes.yaml").write_text(BYTES, encoding="utf-8")
    for command in (
        ("discover",),
        ("formats", "--definitions", root / "bytes.yaml", "--limit", 6),
        ("behaviour", "--limit", 5),
        ("probe",),
        ("attribute-logits",),
        ("patch", "--require", "score", "--limit", 10, "--cumulative"),
    ):
        finished = sfc(*command, *TINY, root=root)
        assert finished.status == 0, finished.stderr
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    root = Path(shutil.copytree(made, tmp_path / "root"))
    unlist(root)
    return root


def _report(root: Path) -> str:
    result = sfc("report", *TINY, "--json", root=root).result
    assert (root / result["files"]["page"]).is_file()
    return (root / result["files"]["markdown"]).read_text(encoding="utf-8")


def _folder(root: Path, kind: str) -> Path:
    return next((root / "circuits" / "tiny").glob(f"{kind}-*/manifest.json")).parent


def _numbers(value: Any) -> set[str]:
    """Every number in a JSON value as a report would write it, and how long its lists are."""
    if isinstance(value, dict):
        return set().union(*map(_numbers, value.values()))
    if isinstance(value, list):
        return {cell(len(value))}.union(*map(_numbers, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {cell(value), cell(float(value)), grid_table("", "", {(0, 0): float(value)}).rows[0][1]}
    return set()


def _of_artifacts(root: Path) -> set[str]:
    allowed: set[str] = set()
    for path in root.rglob("*.json"):
        allowed |= _numbers(json.loads(path.read_text(encoding="utf-8")))
    for path in root.rglob("*.csv"):
        allowed |= _numbers(pd.read_csv(path).to_dict("records"))
    return allowed


def _cells(report: str) -> list[str]:
    rows = [line for line in report.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [text.strip() for row in rows for text in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_every_number_in_a_table_is_an_artifacts(root: Path) -> None:
    report, allowed = _report(root), _of_artifacts(root)
    found = [match for text in _cells(report) if (match := WHOLE_CELL.fullmatch(text))]
    numbers = [number for match in found for number in match.groups() if number]
    assert len(numbers) > 300
    graph = nx.node_link_graph(json.loads((_folder(root, "circuit") / "circuit.json").read_text()), edges="edges")
    nodes = dict(graph.nodes(data=True)).values()
    allowed |= {cell(n) for n in pd.Series([node["layer"] for node in nodes]).value_counts()}
    allowed |= {cell(math.fsum(node.get(role, 0) for node in nodes)) for role in graph.graph["roles"]}
    [quality] = (pd.read_csv(path).set_index("role") for path in (root / "saes").glob("*/quality.csv"))
    allowed |= {cell(float(quality.loc["all", "fvu"].mean()))}
    assert [number for number in numbers if number not in allowed] == []


def test_it_has_every_part_and_says_how_to_reproduce_it(root: Path) -> None:
    report = _report(root)
    titles = re.findall(r"^## (.*?)(?: \(\w{8}\))?$", report, re.MULTILINE)
    folders = [*(root / "circuits" / "tiny").glob("*-*/"), *(root / "saes").glob("tiny-*/")]
    folders = [folder for folder in folders if not folder.name.startswith("report-")]
    found = [Finished(folder) for folder in folders]
    of_studies = {
        study.name: [
            each.page.title.removesuffix(" · tiny") for each in found if each.manifest.get("study") == study.name
        ]
        for study in STUDIES
    }
    known = [title for of_study in of_studies.values() for title in of_study]
    assert {"behaviour", "probe"} <= {name for name, of_study in of_studies.items() if of_study}
    assert titles[:2] == ["Summary", "How it was measured"]
    assert titles[2 : 2 + len(known)] == known, "in the order in which studies are registered"
    assert titles[-3:] == ["Limits", "Artifacts", "Commands that reproduce it"]
    assert len(titles) == 5 + len(folders)
    assert "(F(C) - F(0)) / (F(M) - F(0))" in report and "torch" in report
    manifest = json.loads((_folder(root, "patching") / "manifest.json").read_text())
    assert manifest["command"].startswith("sfc patch --require score") and f"    {manifest['command']}" in report
    page = next(root.glob("circuits/tiny/report-*/report.html")).read_text(encoding="utf-8")
    assert page.count('class="figure"') >= 2 * len(found)


def _change_json(path: Path, *keys: Any, to: Any) -> None:
    whole = value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = to
    path.write_text(json.dumps(whole), encoding="utf-8")


def _change_csv(path: Path, column: str, to: float) -> None:
    table = pd.read_csv(path)
    table[column] = table[column].astype(float)
    table.loc[0, column] = to
    table.to_csv(path, index=False)


CHANGES = {
    ("discover", "result"): lambda root: _change_json(
        _folder(root, "circuit") / "result.json", "faithfulness", to=0.777
    ),
    ("discover", "curve"): lambda root: _change_csv(_folder(root, "circuit") / "curve.csv", "faithfulness", 0.777),
    ("discover", "node"): lambda root: _change_json(
        _folder(root, "circuit") / "circuit.json", "nodes", 0, "effect", to=77.7
    ),
    ("train", "result"): lambda root: _change_json(
        next(root.glob("saes/tiny-*/result.json")), "quality", 0, "fvu", to=0.777
    ),
    ("behaviour", "groups"): lambda root: _change_csv(_folder(root, "behaviour") / "groups.csv", "rate", 0.777),
    ("behaviour", "result"): lambda root: _change_json(_folder(root, "behaviour") / "result.json", "auroc", to=0.777),
    ("probe", "layers"): lambda root: _change_csv(_folder(root, "probe") / "layers.csv", "separation", 7.77),
    ("probe", "seed"): lambda root: _change_json(_folder(root, "probe") / "manifest.json", "inputs", "seed", to=777),
    ("attribute-logits", "components"): lambda root: _change_csv(
        _head_first(_folder(root, "logits")), "difference", 0.777
    ),
    ("attribute-logits", "result"): lambda root: _change_json(
        _folder(root, "logits") / "result.json", "auroc", to=0.777
    ),
    ("patch", "effects"): lambda root: _change_csv(_folder(root, "patching") / "effects.csv", "effect", 0.777),
    ("patch", "result"): lambda root: _change_json(_folder(root, "patching") / "result.json", "n_components", to=777),
}
"""what is changed, by study and file"""


def _head_first(folder: Path) -> Path:
    table = pd.read_csv(folder / "components.csv")
    table.sort_values("kind", key=lambda kind: kind != "head", kind="stable").to_csv(
        folder / "components.csv", index=False
    )
    return folder / "components.csv"


@pytest.mark.parametrize("change", [change for change in CHANGES if change[0] in STUDIES], ids="-".join)
def test_a_number_that_changes_in_an_artifact_changes_in_the_report(change: tuple[str, str], root: Path) -> None:
    before = _cells(_report(root))
    CHANGES[change](root)
    new = set(_cells(_report(root))) - set(before)
    assert {text.lstrip("+") for text in new} & {"0.777", "7.77", "77.7", "777"}


def test_text_of_others_stays_text(root: Path) -> None:
    circuit = _folder(root, "circuit") / "circuit.json"
    for place in (("raises",), ("lowers",)):
        _change_json(circuit, "nodes", 0, *place, to=[HOSTILE])
    _change_json(_folder(root, "patching") / "result.json", "lost", to={HOSTILE: 3})
    groups = pd.read_csv(_folder(root, "behaviour") / "groups.csv")
    groups.assign(category=HOSTILE).to_csv(_folder(root, "behaviour") / "groups.csv", index=False)
    report = _report(root)
    rendered = _render(report)
    assert "<img" not in rendered and "<strong>b</strong>" not in rendered and "<a " not in rendered
    assert (
        "<code>c</code>" not in rendered
        and "https://evil" not in report
        and unescape(rendered).count("onerror=alert(1)") > 2
    )
    page = next(root.glob("circuits/tiny/report-*/report.html")).read_text(encoding="utf-8")
    assert "<img src=x" not in page and "</script><img" not in page


def _render(markdown: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("*_`[]()<>|#&~!\\-+=1. \n:/@w"), max_size=40))
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    rendered = _render(markdown_report("t", [Section("s", [Paragraph(text)])]))
    body = rendered.split("</h2>")[1]
    shown = unescape(body).replace("\u200b", "").strip()
    wanted = re.sub(r"\s+", " ", printable(text)).strip()
    tags = re.findall(r"<[^>]*>", body)
    assert set(tags) <= {"<p>", "</p>"}
    assert re.sub(r"\s+", " ", shown.removeprefix("<p>").removesuffix("</p>")).strip() == wanted.replace("\u200b", "")


@given(st.text(max_size=30))
def test_a_cell_is_one_cell(text: str) -> None:
    rendered = _render(markdown_report("t", [Section("s", [Table("", ("a", "b"), [(text, "1")])])]))
    assert rendered.count("<td") == 2 and rendered.count("<tr>") == 2


def test_code_cannot_end_its_block() -> None:
    hostile = "a\n```\n<b>"
    rendered = _render(markdown_report("t", [Section("s", [Commands([hostile]), Formula("f", hostile)])]))
    assert "<b>" not in rendered and rendered.count("<pre>") == 2
    assert markdown_text("a | b") == "a \\| b"


def test_what_nobody_foresaw_is_reported_as_it_is(root: Path) -> None:
    folder = root / "circuits" / "tiny" / "steering-violence-12345678"
    folder.mkdir()
    model = json.loads((_folder(root, "probe") / "manifest.json").read_text())["inputs"]["model"]
    result = {"layer": 1, "rates": {"refused": 0.625}, "sweep": [{"alpha": 2.5, "rate": 0.125}]}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "manifest.json").write_text(json.dumps({"study": "gone", "inputs": {"model": model, "seed": 4}}))
    report = _report(root)
    assert "## Steering: violence (12345678)" in report and "| rates: refused | 0.625 |" in report
    assert "| 2.50 | 0.125 |" in report and "The command is not known of: circuits/tiny/steering" in report


def test_what_another_model_made_is_left_out_and_named(root: Path) -> None:
    manifest = _folder(root, "probe") / "manifest.json"
    _change_json(manifest, "inputs", "model", to={"config": "another"})
    report = _report(root)
    assert "## Refusal direction" not in report and "another model made it: circuits/tiny/probe-violence" in report


def test_a_damaged_artifact_is_one_line(root: Path) -> None:
    path = _folder(root, "behaviour") / "result.json"
    path.write_text(json.dumps({"preset": "tiny"}), encoding="utf-8")
    finished = sfc("report", *TINY, root=root)
    last = finished.stderr.splitlines()[-1]
    assert finished.status == 2 and "behaviour-test" in last and "lacks 'auroc'" in last and "--rebuild" in last
    (_folder(root, "probe") / "layers.csv").unlink()
    path.write_text(json.dumps({"preset": "tiny", "auroc": None}), encoding="utf-8")
    finished = sfc("report", *TINY, root=root)
    assert finished.status == 2 and "layers.csv" in finished.stderr.splitlines()[-1]


def test_nothing_to_report_is_one_line(tmp_path: Path) -> None:
    finished = sfc("report", "--preset", "tiny", root=tmp_path)
    assert finished.status == 2 and "nothing to report" in finished.stderr.splitlines()[-1]
