"""Plans: what a command would take is said without doing it, and grows as the work does."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import sfc, sfc_commands
from hypothesis import given
from hypothesis import strategies as st

from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.core.machine import bytes_of
from sfc.core.work import Amounts
from sfc.data.render import TokenizedPrompt
from sfc.models.loading import Model, load_model, load_outline
from sfc.models.sources import tiny_model_folder
from sfc.models.work import Shape, packed, shapes_of, sizes_of, some_of, tokens_of
from sfc.run import Run
from sfc.studies.plan import Plan, fitted, memory_blocks, plan, report
from sfc.studies.study import STUDIES

PLANNED = ("sample", "collect", "train", "nulls", "discover", "evaluate", "behaviour", "compare", "patch", "steer")
SMALL = ("--preset", "tiny", "--set", "prompts.limit=8", "--set", "saes.steps=20", "--set", "saes.batch_size=64")


def planned(command: str, root: Path, *overrides: str, preset: str = "tiny", device: str = "auto") -> Plan:
    return plan(STUDIES[command], Run.of(load_experiment(preset, overrides), root, device=device), is_timed=False)


def amounts(of: Plan, study: str) -> Amounts:
    """All work of one stage."""
    steps = next(stage.steps for stage in of.stages if stage.study == study)
    return sum((step.amounts for step in steps or ()), start=Amounts())


counts = st.floats(0, 1e6)
works = st.builds(Amounts, *[counts] * len(fields(Amounts)))


@given(works, works, works, st.integers(0, 5))
def test_seconds_add_up_and_grow_with_the_work(a: Amounts, b: Amounts, speed: Amounts, times: int) -> None:
    assert (a + b).at(speed) == pytest.approx(a.at(speed) + b.at(speed))
    assert (a * times).at(speed) == pytest.approx(times * a.at(speed))


@pytest.mark.parametrize("command", PLANNED)
def test_every_long_command_says_what_it_takes(command: str, tmp_path: Path) -> None:
    overrides = ["comparison.categories=[violence,privacy]"]
    of = planned(command, tmp_path, *overrides)
    assert of.stages[-1].study == command and of.peak[0] > of.base > 0
    assert amounts(of, command).forward > 0 and amounts(of, command).calls > 0
    assert not list(tmp_path.iterdir()), "a plan makes nothing"


def test_what_is_up_to_date_needs_no_look_at_the_model(tmp_path: Path) -> None:
    assert sfc("collect", *SMALL, root=tmp_path).status == 0
    [asked] = sfc_commands([("collect", *SMALL, "--dry-run", "--json")], tmp_path)
    assert asked.result["stages"][0]["up_to_date"] and not asked.imported_torch
    assert sfc("plan", "--command", "collect", "--rebuild", *SMALL, "--json", root=tmp_path).result["seconds"] > 0


def test_the_model_is_loaded_once_in_a_command(tmp_path: Path) -> None:
    names = [step.step for _, step in planned("discover", tmp_path).steps]
    assert names.count("load the model") == 1
    studies = [stage.study for stage in planned("discover", tmp_path).stages]
    assert studies == ["collect", "train", "nulls", "discover"]


def test_more_prompts_features_and_steps_are_more_work(tmp_path: Path) -> None:
    few = planned("discover", tmp_path, "prompts.limit=10")
    for setting, study in (
        ("prompts.limit=20", "collect"), ("prompts.limit=20", "discover"), ("saes.steps=120", "train"),
        ("learned_mask.steps=40", "discover"), ("discovery.checked_nodes=60", "discover"),
    ):  # fmt: skip
        more = planned("discover", tmp_path, *({"prompts.limit=10", setting} if "limit" not in setting else {setting}))
        for name, count in vars(amounts(few, study)).items():
            assert vars(amounts(more, study))[name] >= count, (setting, name)
        assert amounts(more, study) != amounts(few, study), setting
    wide = planned("discover", tmp_path, "prompts.limit=10", "saes.expansion=64")
    assert wide.peak[0] > few.peak[0] and wide.kept > few.kept


def test_what_is_collected_is_known_to_the_row_and_to_the_byte_but_for_hdf5s_tables(tmp_path: Path) -> None:
    command = ("collect", *SMALL, "--site", "hook_z.1", "--json")
    said = sfc(*command, "--dry-run", root=tmp_path).result
    assert not list(tmp_path.iterdir())
    made = sfc(*command, root=tmp_path).result
    (_, step), (stage,) = said["stages"][0]["steps"], said["stages"]
    assert f"{made['n_prompts']:,} prompts, {made['n_rows']:,} rows" in step["step"]
    assert stage["folder"] == made["files"]["store"]
    shards = sum(path.stat().st_size for path in Path(made["files"]["store"]).glob("*.h5"))
    assert 0 <= said["disk_bytes"] - shards < 40_000
    again = sfc(*command, "--dry-run", root=tmp_path)
    assert again.result["stages"][0]["up_to_date"] and again.result["seconds"] == 0
    assert "is up to date" in again.stderr


def test_what_training_leaves_on_the_disk_is_known(tmp_path: Path) -> None:
    planned = sfc("plan", "--command", "train", *SMALL, "--json", root=tmp_path)
    assert planned.result["seconds"] > 0 and "start" in planned.stderr
    assert sfc("train", *SMALL, "--json", root=tmp_path).status == 0
    made = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert planned.result["disk_bytes"] == pytest.approx(made, rel=0.05)


def test_batches_are_those_that_are_run(model: Model, prompts: list[TokenizedPrompt]) -> None:
    shapes = shapes_of(prompts, 80)
    assert sum(shape.rows for shape in shapes) == len(prompts)
    assert all(shape.tokens <= 80 or shape.rows == 1 for shape in shapes)
    assert tokens_of(shapes) >= sum(len(prompt.ids) for prompt in prompts)
    assert tokens_of(some_of(shapes, 3)) <= tokens_of(shapes)
    assert packed([Shape(2, 10)], 5, blocks=3, batch_tokens=40) == Amounts(calls=3 * 3, forward=5 * 20 * 3, logits=10)
    sizes = sizes_of(load_outline(model.config), "float32")
    assert (
        sizes.parameters
        == sum(weight.numel() for weight in load_model(model.config).hf.parameters()) - sizes.vocabulary
    )
    assert sizes.n_layers == model.n_layers


def test_a_card_that_is_not_here_is_planned_for_without_times(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is such a card here")
    of = plan(STUDIES["train"], Run.of(load_experiment("tiny"), tmp_path, device="cuda"))
    said = report(of)
    assert said["seconds"] is None and said["device"] == "cuda" and said["device_bytes"] > 0
    assert any("no such device" in note for note in of.notes)


def gemma_with_dictionaries_at_all_layers(folder: Path) -> list[str]:
    """Gemma 2 2B's configuration with any tokenizer, and settings that take Gemma Scope's dictionaries everywhere."""
    sizes: dict[str, Any] = {
        "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "num_hidden_layers": 26, "intermediate_size": 9216, "vocab_size": 256000,
    }  # fmt: skip
    transformers.Gemma2Config(**sizes).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model_folder()).save_pretrained(folder)
    kinds = {"hook_z": "att", "mlp_out": "mlp", "resid_post": "res"}
    sources = {
        kind: f"gemma-scope-2b-pt-{name}-canonical/layer_{{layer}}/width_16k/canonical" for kind, name in kinds.items()
    }
    return [
        f"model.source={folder}", "model.template=plain", f"activations.kind={json.dumps(list(kinds))}",
        f"activations.layers={list(range(26))}", f"saes.source={json.dumps(sources)}", "prompts.limit=12",
        "prompts.max_tokens=100",
    ]  # fmt: skip


def test_dictionaries_at_three_sites_of_26_layers_fit_a_card_of_24_gb(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    overrides = gemma_with_dictionaries_at_all_layers(folder)
    card, dictionaries, weights = bytes_of("24GB"), 26 * 2 * 16384 * (2 * 2304 + 2048) * 2, 2 * 2_614_341_888
    of = planned("train", tmp_path, *overrides, preset="gemma2-2b-it", device="cuda")
    assert dictionaries + weights < of.peak[0] < card and fitted(of, STUDIES["train"], card) == []
    assert any("16,384 features" in note for note in of.notes)
    # What is recorded of counterfactuals at 78 sites comes on top.
    of = planned("discover", tmp_path, *overrides, preset="gemma2-2b-it", device="cuda")
    settings = fitted(of, STUDIES["discover"], card)
    assert of.peak[0] > card and settings and not any("activations.layers" in setting for setting in settings)
    lighter = planned("discover", tmp_path, *overrides, *settings, preset="gemma2-2b-it", device="cuda")
    assert dictionaries + weights < lighter.peak[0] <= card


def test_settings_bring_a_plan_under_a_given_memory(tmp_path: Path) -> None:
    large = ("activations.batch_tokens=65536", "saes.dtype=bfloat16", "model.dtype=bfloat16")
    of = planned("collect", tmp_path, *large)
    wanted = of.base + round(0.6 * (of.peak[0] - of.base))
    settings = fitted(of, STUDIES["collect"], wanted)
    assert settings and settings[0].startswith("activations.batch_tokens=")
    lighter = planned("collect", tmp_path, *large, *settings)
    assert lighter.peak[0] - lighter.base <= wanted - of.base < of.peak[0] - of.base
    assert f"--set {settings[0]}" in str(memory_blocks(of, wanted, settings))
    assert fitted(of, STUDIES["collect"], bytes_of("1MB")) is None
    assert "No setting" in str(memory_blocks(of, bytes_of("1MB"), None))


def test_sizes_of_memory() -> None:
    assert bytes_of("24GB") == bytes_of("24") == bytes_of("24 GiB") == 24 << 30
    assert bytes_of("512M") == 1 << 29 and bytes_of("1.5t") == 3 << 39
    for text in ("", "much", "-1GB", "0", "1e9", "24 parsecs"):
        with pytest.raises(UserError, match="24GB"):
            bytes_of(text)


def test_mistakes_end_with_one_clear_line(tmp_path: Path) -> None:
    for arguments, said in (
        (("--command", "discovr"), "did you mean 'discover'"),
        (("--memory", "lots"), "write for example 24GB"),
        (("--device", "abacus"), "cannot be used"),
        (("--preset", "tiny", "--set", f"model.source={tmp_path}"), "cannot load model"),
    ):
        ended = sfc("plan", "--preset", "tiny", *arguments, root=tmp_path)
        assert ended.status == 2 and said in ended.stderr and len(ended.stderr.splitlines()) == 1, ended.stderr


def test_a_study_that_does_not_say_what_it_takes_has_no_dry_run(tmp_path: Path) -> None:
    assert "--dry-run" not in sfc("probe", "--help", root=tmp_path).stdout
    assert "--dry-run" in sfc("patch", "--help", root=tmp_path).stdout
