"""Experiments: presets load, overrides apply, and mistakes are one line that names them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sfc.core.config import SaeConfig
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment, preset_names
from sfc.core.sites import kind_of


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_under_its_own_name(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name and experiment.description
    kinds = {kind_of(site) for site in experiment.activations.sites}
    assert len(experiment.activations.sites) == len(kinds) * len(experiment.activations.layers)


def test_the_presets_that_are_promised() -> None:
    assert {"smollm2", "smollm2-base", "llama2-7b-chat", "tiny"} <= set(preset_names())
    llama = load_experiment("llama2-7b-chat")
    assert llama.activations.layers == list(range(21, 32)) and llama.model.dtype == "bfloat16"
    assert llama.saes.expansion == 8 and llama.saes.active_features(32_768) == 1638


@given(st.integers(1, 10**6), st.one_of(st.integers(1, 10**7), st.floats(0.001, 100).map(lambda share: f"{share}%")))
def test_the_active_features_are_a_possible_count(d_sae: int, k: int | str) -> None:
    config = SaeConfig(k=k)  # pyright: ignore[reportCallIssue]
    if isinstance(k, int) and k > d_sae:
        with pytest.raises(UserError, match=f"saes.k={k} is more than the {d_sae} features"):
            config.active_features(d_sae)
        return
    active = config.active_features(d_sae)
    assert 1 <= active <= d_sae
    wanted = k if isinstance(k, int) else float(k[:-1]) / 100 * d_sae
    assert abs(active - max(wanted, 1)) <= 0.5


def test_sites_are_hook_points_in_the_order_of_the_layers() -> None:
    experiment = load_experiment("tiny", ["activations.kind=mlp_out", "activations.layers=[3, 11]"])
    assert experiment.activations.sites == ["blocks.3.hook_mlp_out", "blocks.11.hook_mlp_out"]


def test_an_experiment_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_experiment("tiny").saes.k = 3


def test_overrides_apply_in_their_order() -> None:
    experiment = load_experiment("tiny", ["saes.k=3", "activations.layers=[1]", "saes.k=5%", "seed=7"])
    assert experiment.saes.active_features(200) == 10
    assert (experiment.activations.layers, experiment.seed) == ([1], 7)


def test_a_yaml_file_is_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {source: tiny, refusal_tokens: [I]}\nactivations: {layers: [0]}\nevaluation: {sizes: [3]}\n"
    )
    assert load_experiment(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("saes.kk=3", "did you mean 'k'"),
        ("sae.k=3", "did you mean 'saes'"),
        ("zzz=3", "known: name, description, seed, behavior, model"),
        ("activations.layers=[-1,2]", "not negative"),
        ("activations.layers=two", "activations.layers"),
        ("evaluation.error_mode=keep", "evaluation.error_mode"),
        ("model.refusal_tokens=[]", "model.refusal_tokens"),
        ("name=No Name", "name"),
        ("saes.k=0", "saes"),
        ("saes.k=many", "percentage"),
        ("saes.k=120%", "percentage"),
        ("activations.layers=[]", "activations.layers"),
        ("activations.layers=[2,1]", "ascending"),
        ("prompts.test=0.9", "must be 1"),
        ("discovery.method=magic", "discovery.method"),
        ("evaluation.sizes=[0]", "evaluation.sizes"),
        ("seed", "section.key=value"),
        ("description.x=3", "not a section"),
        ("saes.k=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_line_that_says_what(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_experiment("tiny", [override])
    assert "\n" not in str(error.value)


def test_missing_and_malformed_presets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'smollm2'"):
        load_experiment("smolm2")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_experiment(str(tmp_path / "bad.yaml"))
    (tmp_path / "latin.yaml").write_bytes("description: é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_experiment(str(tmp_path / "latin.yaml"))
    (tmp_path / "alias.yaml").write_text("a: &a [x]\nb: *a\n")
    with pytest.raises(UserError, match="line 2 has an alias"):
        load_experiment(str(tmp_path / "alias.yaml"))
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(UserError, match="the key 'name' stands there twice"):
        load_experiment(str(tmp_path / "twice.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="sections of an experiment"):
        load_experiment(str(tmp_path / "list.yaml"))
    (tmp_path / "empty.yaml").write_text("model: {source: tiny, refusal_tokens: [I]}\nevaluation: {sizes: [1]}\n")
    with pytest.raises(UserError, match="'activations' is missing"):
        load_experiment(str(tmp_path / "empty.yaml"))
