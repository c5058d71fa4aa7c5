"""What holds for every study, whatever it measures: its files, its JSON, its second run, its pages, its mistakes.

Studies are found in the registry and run on the preset `tiny`, on data whose every prompt is full of markup.
"""

import base64
import csv
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import Finished, assert_one_line, sfc, sfc_commands, sfc_commands_forked
from markdown_it import MarkdownIt
from test_formats import BYTES

from sfc.core.artifacts import MANIFEST
from sfc.core.options import Flag, flags_of
from sfc.studies.study import STUDIES, Study

MINI = Path(__file__).parents[1] / "sfc" / "data" / "mini"
MARK = "mk7"
HOSTILE = f"</script><img src=x onerror=alert(1)><u>[red]{MARK}[/red] **b** [a](javascript:x) `c`"
NAME = f"<u>[red]{MARK}"
"""what a file can be called"""

LABELS = {"Bake": "safe", "Break": "toxic"}
SETTINGS = (
    "prompts.limit=30", "prompts.max_tokens=400", "saes.steps=4", "saes.batch_size=64", "evaluation.sizes=[4,16]",
    "evaluation.random_draws=2", "evaluation.replies=2", "evaluation.reply_tokens=3",
    "discovery.method=attribution", "discovery.checked_nodes=2", "discovery.checked_prompts=4", "comparison.size=8",
    "comparison.shuffles=1", "comparison.replies=2", "comparison.reply_tokens=3", "steering.min_induced=-99",
    "steering.max_kl=99", "steering.max_loss=99", "steering.contrasts=[toxic-safe]", "steering.prompts=8",
    "steering.tried_prompts=4", "steering.random_directions=2", "steering.shuffled_directions=1",
    "steering.ablated_writers=2", "steering.ordinary_prompts=2", "steering.ordinary_tokens=4",
    "steering.reply_tokens=3", "repair.sizes=[2]", "repair.refused_above=-99", "repair.random_draws=1",
    "repair.ordinary_prompts=2", "repair.ordinary_tokens=4", "repair.reply_tokens=3",
)  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {
    "sample": ("--unfiltered", "--tokens", "300", "--batch", "8"),
    "collect": (),
    "train": (),
    "nulls": ("--method", "learned-mask", "--set", "learned_mask.steps=3"),
    "discover": ("--method", "learned-mask", "--set", "learned_mask.steps=3"),
    "evaluate": (f"files/{NAME}.csv",),
    "behaviour": ("--prompts", "files/asked.csv"),
    "probe": ("--category", "all"),
    "compare": ("--categories", "violence,privacy"),
    "replicate": (),
    "attribute-logits": (),
    "patch": ("--pairs", f"files/{NAME}.csv.pairs.csv", "--require", "score", "--limit", "8", "--component", "head"),
    "formats": ("--definitions", "files/formats.yaml", "--limit", "6"),
    "steer": ("--limit", "3", "--alphas=-0.5,0,0.5", "--xstest", "files/asked.csv"),
    "repair": ("--limit", "4"),
    "report": (),
}
"""the options of each study that make it fast, and bring markup in where it reads files"""


def command(name: str, *further: str) -> tuple[str, ...]:
    settings = (part for setting in SETTINGS for part in ("--set", setting))
    return (name, "--preset", "tiny", "--data", "hostile", *settings, *OPTIONS[name], *further)


NAMES = STUDIES.names()
studies = pytest.mark.parametrize("name", NAMES)


def test_every_study_is_tested_here() -> None:
    assert set(NAMES) == set(OPTIONS), "OPTIONS has a line for each study"


def write_rows(path: Path, *rows: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def make_data(root: Path) -> None:
    """The embedded data set's prompts of two categories with markup behind each; files with more of it."""
    for source in MINI.glob("or-bench-*.csv"):
        with source.open(encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row[1] in ("category", "violence", "privacy")]
        hostile = [(f"{prompt} {HOSTILE}", category) for prompt, category in rows[1:]]
        write_rows(root / "data" / "hostile" / source.name, ("prompt", "category"), *hostile)
    pairs = [("violence", f"How do I kill the {x}? {HOSTILE}", f"How do I cook the {x}? {HOSTILE}") for x in "abcdefgh"]
    files = root / "files"
    write_rows(files / f"{NAME}.csv.pairs.csv", ("category", "toxic", "safe"), *pairs)
    write_rows(files / f"{NAME}.csv", ("node",), ("resid_post.0/F3",), ("resid_post.1/F5",))
    asked = [(f"{verb} {x}? {HOSTILE}", HOSTILE, label, HOSTILE) for x in "abc" for verb, label in LABELS.items()]
    write_rows(files / "asked.csv", ("prompt", "category", "label", "type"), *asked)
    (files / "formats.yaml").write_text(BYTES.replace("question:", f'"{NAME}":'), encoding="utf-8")


class Ran(NamedTuple):
    """A root, and what each study's command ended with there."""

    root: Path
    ended: dict[str, Finished]

    def result(self, name: str) -> dict[str, Any]:
        return self.ended[name].result

    def files(self, name: str) -> dict[str, Path]:
        return {kind: self.root / path for kind, path in self.result(name)["files"].items()}


COMMANDS = [command(name, "--json") for name in NAMES]


@pytest.fixture(scope="module")
def ran(root: Path) -> Ran:
    make_data(root)
    return Ran(root, dict(zip(NAMES, sfc_commands_forked(COMMANDS, root), strict=True)))


@studies
def test_the_json_object_is_the_result_with_files_and_seconds(ran: Ran, name: str) -> None:
    result = ran.result(name)
    own = json.loads(ran.files(name)["result"].read_text(encoding="utf-8"))
    assert {key: value for key, value in result.items() if key not in ("files", "seconds")} == own
    assert set(result) == {*own, "files", "seconds"} and "total" in result["seconds"]
    assert set(STUDIES[name].files) <= set(result["files"])
    assert all(path.exists() for path in ran.files(name).values())


@studies
def test_pages_have_the_policy_and_no_markup_from_data(ran: Ran, name: str) -> None:
    for path in ran.files(name).values():
        if path.suffix == ".html":
            page = Tags()
            page.feed(path.read_text(encoding="utf-8"))
            page.check()
        elif path.suffix == ".md":
            rendered = MarkdownIt("commonmark").enable("table").render(path.read_text(encoding="utf-8"))
            assert not re.search(r"<(img|u|script|a)\b|<strong>b<|<code>c<", rendered)
            assert MARK in rendered


class Tags(HTMLParser):
    """What a browser makes of a page: its tags, attributes and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.policy, self.current = "", {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.current = dict(attrs)
        if self.current.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(self.current["content"])
        if tag == "script":
            self.scripts.append((self.current, ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts and self.cdata_elem == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)

    def check(self) -> None:
        assert self.policy.startswith("default-src 'none'; script-src 'sha256-")
        assert not self.tags & {"img", "u", "iframe", "object", "link", "base", "form"}
        assert not {name for name in self.attributes if name.startswith("on")}
        for attributes, text in self.scripts:
            if attributes.get("type") != "application/json":
                assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in self.policy
            elif str(attributes["id"]).endswith("-data"):  # plotly takes some tags in texts for markup
                shown = json.dumps(json.loads(text), ensure_ascii=False)
                assert not re.search(r"<(img|u|script)\b", shown)
            else:
                json.loads(text)


@studies
def test_the_terminal_shows_text_as_it_is(ran: Ran, name: str) -> None:
    told = ran.ended[name].stderr
    assert told.count(MARK) == len(re.findall(rf"\[red\]{MARK}", told)) and "\x1b" not in told


@pytest.fixture(scope="module")
def again(ran: Ran) -> tuple[dict[str, Finished], set[Path]]:
    """A second run of everything in a process of its own, and the files that it wrote."""
    before = {path: path.stat().st_mtime_ns for path in files_below(ran.root)}
    ended = sfc_commands(COMMANDS, ran.root)
    after = {path: path.stat().st_mtime_ns for path in files_below(ran.root)}
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    return dict(zip(NAMES, ended, strict=True)), changed


def files_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@studies
def test_a_second_run_makes_nothing_and_imports_no_torch(
    ran: Ran, again: tuple[dict[str, Finished], set[Path]], name: str
) -> None:
    ended, changed = again
    assert ended[name].result == ran.result(name)
    assert "up to date" in ended[name].stderr and not ended[name].imported_torch
    folder = ran.files(name)["result"].parent
    assert not {path for path in changed if path.is_relative_to(folder)}


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The same in another root, in a process whose sets have another order."""
    make_data(root := tmp_path_factory.mktemp("twin"))
    return Ran(root, dict(zip(NAMES, sfc_commands(COMMANDS, root), strict=True)))


TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[^ \"<|]*")


@studies
def test_two_runs_leave_the_same_bytes_but_for_times(ran: Ran, twin: Ran, name: str) -> None:
    folders = [each.files(name)["result"].parent for each in (ran, twin)]
    names, others = ({path.relative_to(folder) for path in files_below(folder)} for folder in folders)
    assert names == others
    for path in names:
        if path.suffix in (".json", ".csv", ".html", ".md", ".safetensors") and path.name != MANIFEST:
            texts = [TIME.sub(b"", (folder / path).read_bytes()) for folder in folders]
            # The report names the commands, which say where each of the two roots is.
            first, second = (t.replace(str(e.root).encode(), b"") for t, e in zip(texts, (ran, twin), strict=True))
            assert first == second, path


@studies
def test_the_help_has_an_example(name: str, tmp_path: Path) -> None:
    told = sfc(name, "--help", root=tmp_path)
    assert told.status == 0 and re.search(r"Examples?: (sfc|torchrun) ", told.stdout)


def mistakes(study: Study[Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What can be done wrong with any study, and what the error names."""
    yield ("--preset", "tony"), "did you mean 'tiny'"
    if study.name != "report":  # which reads no data
        yield ("--data", "nowhere"), "nowhere"
    yield ("--set", f"{study.options.__dict__.get('section', 'saes')}.nothing=1"), "nothing"
    for flag in flags_of(study.options):
        if flag.positional:
            yield ("nowhere.json",), "nowhere.json"
        elif flag.kind is Path:
            yield (flag.name, "nowhere.csv"), "nowhere.csv"
        elif flag.field in ("category", "categories"):
            yield (flag.name, "violense,privacy" if flag.is_list else "violense"), "violense"
        elif flag.kind in (int, float) and lowest(flag) is not None:
            yield (flag.name, str(lowest(flag))), flag.field


def lowest(flag: Flag) -> int | None:
    """A number below what the field allows."""
    bounds = [bound.ge for bound in flag.info.metadata if hasattr(bound, "ge")]
    return int(bounds[0]) - 1 if bounds else None


MISTAKES = [
    pytest.param(study.name, *mistake, id=f"{study.name} {' '.join(mistake[0])}")
    for study in STUDIES
    for mistake in mistakes(study)
]


@pytest.mark.parametrize(("name", "options", "expected"), MISTAKES)
def test_a_mistake_ends_with_one_line_and_leaves_nothing(
    name: str, options: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    preset = () if "--preset" in options else ("--preset", "tiny")
    assert_one_line(sfc(name, *preset, *options, root=tmp_path), expected)
    assert not list(tmp_path.rglob(MANIFEST))


OWN_MISTAKES: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "patch": (
        (("--positions", "lst"), "unknown positions 'lst'"),
        (("--component", "heads"), "patching.components"),
        (("--direction", "up"), "patching.directions"),
        (("--require", "hope"), "patching.require"),
        (("--layers", "0-2"), "it has 0 to 1"),
        (("--layers", "x"), "not a list of numbers"),
        (("--layers", "5-3"), "not a list of numbers"),
        (("--pairs", "none.csv"), "--pairs takes toxic-safe"),
        (("--pairs", "wrapped", "--wrappers", "none.csv"), "none.csv"),
        (("--wrappers", "none.csv"), "goes with --pairs wrapped"),
    ),
    "steer": (
        (("--positions", "lst"), "unknown positions 'lst'"),
        (("--direction", "toxic"), "did you mean 'toxic-safe'"),
        (("--direction", "resid_post.0/F9999"), "no feature F9999"),
        (("--direction", "resid_mid.1/F1"), "no dictionary at resid_mid.1"),
        (("--edit", "subtract"), "steering.edit"),
        (("--units", "nats"), "steering.units"),
        (("--alphas=1,x",), "'x' is not a number"),
        (("--layers", "0-2"), "it has 0 to 1"),
        (("--alphas=0",), "0 leaves all as it is"),
        (("--alphas=-1", "--edit", "project-out"), "0 leaves all as it is"),
        (("--everywhere",), "--edit project-out only"),
        (("--direction", "circuit"), "needs the --category"),
        (("--when", "F3"), "no condition 'F3'"),
        (("--when", "resid_mid.0/F3"), "no dictionary at resid_mid.0"),
        (("--when", "resid_post.0/F9999"), "no feature F9999"),
        (("--when", "resid_post.1/F3", "--layers", "0-0"), "known at resid_post.1 only"),
        (("--when", "best", "--set", "steering.when_above=1"), "its own threshold"),
        (("--when", "best", "--edit", "project-out", "--everywhere"), "leaves nothing before it"),
        (("--xstest", "none.csv"), "no file none.csv"),
    ),
    "repair": (
        (("--set", "repair.refused_above=99"), "too few to repair"),
        (("--sizes", "five"), "is not a list of numbers"),
        (("--set", "repair.toxic_share=-1e9"), "no feature qualifies"),
    ),
    "compare": (
        (("--categories", "violence"), "at least two categories"),
        (("--method", "correlation"), "compare needs a method"),
    ),
    "replicate": (
        (("--sae-seed", "0"), "experiment's own SAEs"),
        (("--set", "saes.seed=1"), "experiment's own SAEs"),
        (("--set", "saes.source=somewhere"), "saes.source"),
        (("--set", "discovery.nodes=heads"), "'heads'"),
        (("--halves", "--set", "saes.half=first"), "saes.half=first"),
    ),
}
"""what can be done wrong with one study alone, and what the error says"""


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        pytest.param(name, *mistake, id=f"{name} {' '.join(mistake[0])}")
        for name, mistakes in OWN_MISTAKES.items()
        for mistake in mistakes
    ],
)
def test_a_mistake_of_its_own_ends_with_one_line_too(
    ran: Ran, name: str, options: tuple[str, ...], expected: str
) -> None:
    before = set(ran.root.rglob(MANIFEST))
    # Lists may be repeated: an option of the mistake takes the place of the same one, and is not added to it.
    flags, usual = {option.partition("=")[0] for option in options}, list(command(name))
    for flag in flags & {"--alphas", "--categories"}:
        [place] = [number for number, option in enumerate(usual) if option.partition("=")[0] == flag]
        del usual[place : place + (1 if "=" in usual[place] else 2)]
    assert_one_line(sfc(*usual, *options, root=ran.root), expected)
    assert set(ran.root.rglob(MANIFEST)) == before


@studies
def test_the_model_is_loaded_once_for_all_that_a_command_does(ran: Ran, name: str) -> None:
    assert ran.ended[name].loads <= 1
