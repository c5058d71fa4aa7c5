"""Every file that a user gives, damaged in every way, to every command that reads it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from hostile.home import DATA, PRESET, Home, attack, write_data
from hostile.inputs import (
    ACTS,
    ANSWERS,
    ANY,
    CHATS_CSV,
    LABELS,
    LINES,
    LIST_CSV,
    LIST_JSON,
    OBJECT,
    PAIRS,
    PROMPTS,
    STUDY,
    TABLE,
    TEXTS,
    TEXTS_CSV,
    TEXTS_JSONL,
    TOPICS,
    TRACER,
    WEIGHTS,
    WRAPPERS,
    YAML,
    Damage,
    damages,
    put,
)
from hostile.inputs import (
    PRESET as SMALL,
)
from hostile.sampling import sample, spread

FORMATS = (Path(__file__).parents[2] / "sfc/studies/formats/formats.yaml").read_text(encoding="utf-8")
HERE = "HERE"
"""in a command: the path of the damaged file"""
ON = (*PRESET, *DATA)
SOURCE = f"corpus.source={HERE}"


class Given(NamedTuple):
    """A file that a user gives, and the commands that read it."""

    name: str
    sound: str
    kinds: tuple[dict[str, Damage], ...]
    commands: tuple[tuple[str, ...], ...]

    def __repr__(self) -> str:
        # The functions among its kinds are named by where they lie in memory, and the sample is drawn by this.
        return self.name


GIVEN = (
    Given("prompts.csv", PROMPTS, (TABLE,), (
        ("behaviour", *ON, "--limit", "2", "--prompts", HERE), ("formats", *ON, "--limit", "2", "--prompts", HERE),
        ("evaluate", *ON, "--prompts", HERE), ("steer", *ON, "--xstest", HERE),
    )),
    Given("pairs.csv", PAIRS, (TABLE,), (("patch", *ON, "--require", "score", "--limit", "4", "--pairs", HERE),)),
    Given("pairs.jsonl", "".join(
        f'{{"toxic": "{toxic}", "safe": "{safe}"}}\n'
        for _, toxic, safe in (line.split(",") for line in PAIRS.splitlines()[1:])
    ), (LINES,), (("patch", *ON, "--require", "score", "--limit", "4", "--pairs", HERE),)),
    Given("wrappers.csv", WRAPPERS, (TABLE,), (("patch", *ON, "--pairs", "wrapped", "--wrappers", HERE),)),
    Given("answers.jsonl", ANSWERS, (LINES,), (
        ("discover", *ON, "--pairs", HERE), ("evaluate", *ON, "--set", f"pairs.file={HERE}", "--behavior", "pairs"),
    )),
    Given("texts.txt", TEXTS, (), (("train", *ON, "--set", SOURCE),)),
    Given("texts.csv", TEXTS_CSV, (TABLE,), (("train", *ON, "--set", SOURCE),)),
    Given("texts.jsonl", TEXTS_JSONL, (LINES,), (("train", *ON, "--set", SOURCE),)),
    Given("chats.csv", CHATS_CSV, (TABLE,), (("train", *ON, "--set", f"corpus.source=chat:{HERE}"),)),
    Given("chats.jsonl", TEXTS_JSONL, (LINES,), (("train", *ON, "--set", f"corpus.source=chat:{HERE}"),)),
    Given("small.yaml", SMALL, (YAML,), (
        ("data", "--preset", HERE, *DATA), ("presets", "--preset", HERE), ("doctor", "--preset", HERE, *DATA),
        ("collect", "--preset", HERE, *DATA, "--dry-run"), ("export", "--preset", HERE, *DATA),
        ("batch", "--models", HERE, *DATA, "--stages", "probe"),
    )),
    Given("study.yaml", STUDY, (YAML,), (("batch", "--file", HERE, *DATA, "--stages", "probe"),)),
    Given("formats.yaml", FORMATS, (YAML,), (("formats", *ON, "--definitions", HERE),)),
    Given("list.json", LIST_JSON, (OBJECT,), (("evaluate", *ON, HERE),)),
    Given("list.csv", LIST_CSV, (TABLE,), (("evaluate", *ON, HERE),)),
    Given("tracer.json", TRACER, (OBJECT,), (("evaluate", *ON, HERE),)),
)  # fmt: skip


def _name(case: tuple) -> str:
    return "-".join(part if isinstance(part, str) else part.name for part in case)


CASES = [
    (given, place, damage)
    for given in GIVEN
    for place, damage in spread(
        range(len(given.commands)), damages(*given.kinds), -(-len(damages(*given.kinds)) // len(given.commands))
    )
]


@pytest.mark.parametrize(
    ("given", "place", "damage"),
    [
        pytest.param(*case, id=f"{case[0].name}-{case[0].commands[case[1]][0]}-{case[2]}")
        for case in sample(CASES, keep=12)
    ],
)
def test_a_damaged_file(home: Home, given: Given, place: int, damage: str) -> None:
    home.empty()
    path = home.given / given.name
    put(path, given.sound.encode(), damage, *given.kinds)
    command = [part.replace(HERE, str(path)) for part in given.commands[place]]
    finished = attack(home, *command)
    if damage in ACTS and command[0] not in ("presets",):
        assert finished.status == 2


DATA_FILES = ("or-bench-80k.csv", "or-bench-hard-1k.csv", "or-bench-toxic.csv")
REFUSED = [
    *ACTS, "empty", "only-blanks", "one-byte", "png", "zeros", "zero-inside", "utf-16", "latin-1", "html", "pointer",
    "header-only", "no-header", "semicolons", "tabs", "ragged", "short-row", "open-quote", "renamed-column",
    "doubled-column", "other-words",
]  # fmt: skip
"""damages of a data set for which there is nothing but an error"""
READERS = (
    "attribute-logits", "sample", "collect", "train", "nulls", "discover", "evaluate", "behaviour", "probe", "compare",
    "replicate", "patch", "formats", "steer", "repair", "report", "batch", "draw", "export", "data", "doctor",
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "damage"),
    sample(spread(READERS, REFUSED, 4), keep=6),
)
def test_a_data_set_that_is_refused(home: Home, command: str, damage: str) -> None:
    home.empty()
    data = home.given / "data"
    write_data(data)
    name = DATA_FILES[(len(command) + len(damage)) % len(DATA_FILES)]
    path = data / name
    put(path, path.read_bytes(), damage, TABLE)
    extra = ("--stages", "probe", "--category", "violence") if command == "batch" else ()
    finished = attack(home, command, *PRESET, "--data", data, *extra)
    assert finished.status == 2 or (damage == "other-words" and "toxic" not in name)


_READ = {
    "data": DATA_FILES, "collect": DATA_FILES, "patch": ("pairs.csv",), "discover": ("pairs.csv", "topics.csv"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "name", "damage"),
    sample(
        [
            (command, name, damage)
            for (command, name), damage in spread(
                [(command, name) for command, names in _READ.items() for name in names], damages(TABLE), 13
            )
        ],
        keep=3,
    ),
)  # fmt: skip
def test_a_data_set_that_is_odd(home: Home, command: str, name: str, damage: str) -> None:
    home.empty()
    data = home.given / "data"
    write_data(data)
    put(data / name, (data / name).read_bytes(), damage, TABLE)
    extra: tuple[str, ...] = ("--require", "score", "--limit", "4") if command == "patch" else ()
    if command == "discover":
        extra = ("--method", "correlation", "--category", "violence")
        extra += ("--set", "discovery.baseline=paired") if name == "pairs.csv" else ()
    attack(home, command, *PRESET, "--data", data, *extra)


@pytest.mark.parametrize(
    ("command", "damage"),
    sample(spread(("draw", "export"), damages(OBJECT), 26), keep=2),
)
def test_damaged_labels_of_a_reader(home: Home, command: str, damage: str) -> None:
    home.empty()
    path = home.own("circuit") / "labels.json"
    try:
        put(path, LABELS.encode(), damage, OBJECT)
        attack(home, command, *ON, "--category", "violence")
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


FOLDERS: dict[str, tuple[Callable[[Home], Path], str, dict[str, tuple[dict[str, Damage], ...]]]] = {
    "saes": (
        lambda home: next(home.root.glob("saes/small-*/manifest.json")).parent,
        "saes.source",
        {
            "blocks.0.hook_resid_post/cfg.json": (OBJECT,),
            "blocks.1.hook_resid_post/sae_weights.safetensors": (WEIGHTS,),
        },
    ),
    "adapter": (
        lambda home: Path(__file__).parents[2] / "sfc/models/adapters/refusal",
        "model.adapter",
        {"adapter_config.json": (OBJECT,), "adapter_model.safetensors": (WEIGHTS,)},
    ),
}
_USERS = {"saes": ("train", "discover"), "adapter": ("probe", "doctor")}
TEXT_ONLY = ("utf-16", "long-field")
"""damages that need text"""
FOLDER_CASES = [
    (folder, command, name, damage)
    for folder, (_, _, files) in FOLDERS.items()
    for name, kinds in files.items()
    for command, damage in spread(
        ("train", "discover") if folder == "saes" else ("probe", "doctor"), damages(*kinds), 26
    )
    if not (name.endswith("safetensors") and damage in TEXT_ONLY)
]


@pytest.mark.parametrize(("folder", "command", "name", "damage"), sample(FOLDER_CASES, keep=4))
def test_a_damaged_file_in_a_folder_that_is_given(
    home: Home, folder: str, command: str, name: str, damage: str
) -> None:
    home.empty()
    sound, key, files = FOLDERS[folder]
    given = home.given / "folder"
    shutil.copytree(sound(home), given)
    put(given / name, (given / name).read_bytes(), damage, *files[name])
    attack(home, command, *ON, "--set", f"{key}={given}", "--category", "violence")


NAMES = (
    "a\nb.csv",
    "\x1b[2J.csv",
    "\u202ecsv.csv",
    "[red]x[bold].csv",
    "a'b\"c.csv",
    "ü" * 120 + ".csv",
    "-x.csv",
    " .csv",
    "a=b.csv",
    "\udcff.csv",
    "%s{0}.csv",
)


@pytest.mark.parametrize(
    ("command", "name"),
    sample(
        spread(("behaviour", "formats", "evaluate", "patch"), NAMES, 6),
        keep=1,
    ),
)
def test_a_file_with_an_odd_name(home: Home, command: str, name: str) -> None:
    home.empty()
    path = home.given / name
    path.write_text(PAIRS if command == "patch" else PROMPTS, encoding="utf-8")
    flag = "--pairs" if command == "patch" else "--prompts"
    extra = ("--require", "score") if command == "patch" else ()
    attack(home, command, *ON, *extra, f"{flag}={path}")


assert TOPICS and ANY
