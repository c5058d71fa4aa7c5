"""Every option of every command with values that nobody means, and every setting of every section."""

from typing import Any

import pytest
from typer.main import get_command

from hostile.home import DATA, PRESET, Home, attack
from hostile.sampling import sample, spread
from sfc.cli import command_line
from sfc.core.experiments import load_experiment
from sfc.studies.study import STUDIES

NUMBERS = ("-1", "-5", "0.5", "1e8", "1e400", "nan", "-inf", "9" * 40, "0x10", "1_0")
TEXTS = (
    "", " ", "-1", "\x1b[2J\x1b]0;t\x07", "\u202etxt", "\x9b31m", "a" * 5000, "/dev/zero", "/", "../../../etc/passwd",
    "null", "[", "{a: &a [*a]}", "nan", "\udcff", "[red]x[/red]", "%s{0}", ",,", "=", "a,b", "1e8", "9" * 40, "\n",
    "é" * 300,
)  # fmt: skip
QUICK = ("--stages", "probe", "--limit", "2")
ELSEWHERE = ("download", "explore")
"""commands that need a network, or serve until they are ended"""
SHARED = ("--preset", "--data", "--device", "--behavior", "--set", "--seed")


def _is_number(parameter: Any) -> bool:
    return any(name in str(parameter.type_descriptor).upper() for name in ("INT", "FLOAT"))


def _options() -> list[tuple[str, str, str]]:
    """Commands, options and values: two for each of a command's own, one for those that all commands have."""
    commands: Any = get_command(command_line())
    found = [
        (name, parameter.opts[0] if parameter.param_type_name == "option" else "", _is_number(parameter))
        for name, command in commands.commands.items()
        for parameter in command.params
        if not getattr(parameter, "is_flag", False) and parameter.opts[0] not in ("--root", "--help")
        if name not in ELSEWHERE
    ]
    own = [option for option in found if option[1] not in SHARED and option[0] != "sample"]
    cases = [
        *spread([option for option in own if option[2]], NUMBERS, 2),
        *spread([option for option in own if not option[2]], TEXTS, 2),
        *spread([option for option in found if option[1] in SHARED and option[2]], NUMBERS, 1),
        *spread([option for option in found if option[1] in SHARED and not option[2]], TEXTS, 1),
    ]
    return [(command, option, value) for (command, option, _), value in cases]


def _id(value: str) -> str:
    return ascii(value)[1:-1][:30]


@pytest.mark.parametrize(("command", "option", "value"), sample(_options(), keep=12), ids=_id)
def test_an_option_that_nobody_means(home: Home, command: str, option: str, value: str) -> None:
    home.empty()
    given = [f"{option}={value}"] if option else ["--", value]
    quick = QUICK if command == "batch" else ()
    sound = (
        [*PRESET, *DATA, "--category", "violence"] if command in ("discover", "draw", "export") else [*PRESET, *DATA]
    )
    if command == "sample" and option != "--behavior":
        given.append("--behavior=none")  # else it writes for minutes where the value itself is sound
    attack(home, command, *sound, *quick, *given)


SETTINGS = (
    "-1", "0", "1e8", "1.5", "9" * 40, ".nan", ".inf", "null", "[]", "{}", "''", "[[1]]", "[null]", "true", "\x1b[2J",
    '"\\ud800"', "2020-13-45", "!!int x", "*a", "../..", "a" * 3000,
)  # fmt: skip


def _settings() -> list[tuple[str, str]]:
    experiment = type(load_experiment("tiny"))
    keys = []
    for name, field in experiment.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        keys += [f"{name}.{key}" for key in inner] if inner else [name]
    return spread((*keys, "", ".", "model.", "saes.k.x", "a.b.c.d"), SETTINGS, 1)


@pytest.mark.parametrize("port", ("-1", "0", "65536", "1e8", "nan", "x", "", "9" * 40))
def test_a_port_that_there_is_not(home: Home, port: str) -> None:
    assert attack(home, "explore", f"--port={port}").status == 2


@pytest.mark.parametrize(("key", "value"), sample(_settings(), keep=20), ids=_id)
def test_a_setting_that_nobody_means(home: Home, key: str, value: str) -> None:
    attack(home, "data", *PRESET, *DATA, "--set", f"{key}={value}")


ABSURD = {
    "train": (
        "saes.expansion=100000000", "saes.expansion=1e8", "saes.expansion=1000000", "saes.k=1000000000",
        "saes.k='0.0001%'", "saes.batch_size=1000000000000", "saes.buffer_rows=10000000000000",
        "saes.layers_at_once=1000000000", "saes.warmup_steps=1000000000", "saes.learning_rate=9.0e+15",
        "saes.l1_weight=9.0e+15", "saes.auxiliary_weight=9.0e+15", "saes.dead_after=1000000000000000",
        "saes.checkpoint_seconds=1e-300", "saes.held_out=1", "saes.held_out=0", "saes.decay_share=1",
    ),
    "collect": (
        "activations.batch_tokens=1000000000000000", "activations.shard_tokens=1000000000000000",
        "activations.batch_tokens=1", "activations.shard_tokens=1", "prompts.max_tokens=1000000000000000",
        "prompts.max_tokens=8", "prompts.limit=1000000000000000", "activations.layers=[0,1,2]",
        "activations.layers=[99999999]", "activations.kind=[]", "model.dtype=float16", "model.template=''",
        "model.template='{prompt}{prompt}'", "model.template='{{ prompt'", "model.refusal_tokens=['']",
        "model.refusal_tokens=['no such token at all']", "model.source=/dev/null", "model.source='../..'",
        "model.revision='../..'", "model.system_prompt='\u2042probe\u2042'", "prompts.discovery=0", "prompts.test=1",
    ),
    "discover": (
        "evaluation.sizes=[1000000000]", "evaluation.sizes=[]", "evaluation.replies=1000000000",
        "evaluation.sizes=[0]", "evaluation.target=9.0e+15", "evaluation.min_denominator=9.0e+15",
        "learned_mask.prompts=1000000000", "learned_mask.price=9.0e+15", "discovery.pairs_per_prompt=1000000000",
        "discovery.edge_nodes=1000000000", "discovery.edge_tokens=1000000000", "discovery.edges_per_node=1000000000",
        "discovery.checked_nodes=1000000000", "discovery.nodes=nothing",
        "labels.explainer='file:///etc/passwd'", "labels.explainer='\x1b[2J'",
    ),
    "behaviour": (
        "behaviour.limit=1000000000000000", "behaviour.limit=0",
    ),
    "patch": (
        "patching.limit=1000000000000000", "patching.position_sets=['last-999999999']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("study", sample([study.name for study in STUDIES if study.name != "sample"], keep=1))
def test_nothing_can_be_measured(home: Home, study: str) -> None:
    home.empty()
    given = ["--pairs", "toxic-safe", "--require", "score"] if study == "patch" else []
    for setting in ("evaluation.min_denominator=9.0e+15", "evaluation.null_draws=1", "prompts.limit=20"):
        given += ["--set", setting]
    attack(home, study, *PRESET, *DATA, *given)


@pytest.mark.parametrize(
    ("command", "setting"),
    sample([(command, setting) for command, settings in ABSURD.items() for setting in settings], keep=2),
    ids=_id,
)
def test_a_size_that_no_machine_has(home: Home, command: str, setting: str) -> None:
    home.empty()
    category = ("--category", "violence") if command == "discover" else ()
    attack(home, command, *PRESET, *DATA, *category, "--set", setting)
