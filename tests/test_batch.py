"""`sfc batch`: several models, some of which fail; critical components by relative depth."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import sfc
from test_steer_command import LENIENT

from sfc.behaviors.behavior import Words
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.models.loading import Model, load_model
from sfc.pages.html import page_html
from sfc.run import Run
from sfc.studies.batch import (
    COLUMNS,
    frequencies,
    load_study,
    patched_components,
    relative_depth,
    with_options,
    written_components,
)
from sfc.studies.batch.page import batch_page, frequency_figure
from sfc.studies.behaviour import BEHAVIOUR, BehaviourOptions
from sfc.studies.study import STUDIES


def _effects(*rows: tuple[str, str, str, int, float, float]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["direction", "kind", "component", "layer", "effect", "q_value"])
    return table.assign(is_range=False, low=table["effect"] - 0.1, high=table["effect"] + 0.1)


def test_frequencies_by_hand() -> None:
    small = patched_components(
        "small",
        _effects(
            ("denoise", "head", "head.2.0", 2, 0.3, 0.01),
            ("denoise", "head", "head.2.1", 2, -0.5, 0.01),
            ("denoise", "head", "head.2.1", 2, 0.2, 0.01),  # the same head at other positions, weaker
            ("denoise", "mlp", "mlp.0", 0, 0.9, 0.2),  # not told from chance
            ("noise", "mlp", "mlp.0", 0, 0.4, 0.04),
        ),
        n_layers=5,
    )
    large = patched_components("large", _effects(("denoise", "head", "head.10.3", 10, 0.2, 0.0)), n_layers=21)
    assert small["component"].tolist() == ["head.2.1", "mlp.0", "head.2.0"] and small["effect"][0] == -0.5
    assert tuple(small.columns) == COLUMNS
    table = frequencies(pd.concat([small, large]), {"denoise": ["small", "large"], "noise": ["small", "large"]})
    heads, mlp = table.to_dict("records")
    assert (heads["evidence"], heads["kind"], heads["tenth"]) == ("denoise", "head", 5)
    assert (heads["n_models"], heads["n_measured"], heads["share"], heads["n_components"]) == (2, 2, 1.0, 3)
    assert heads["strongest"] == "large head.10.3; small head.2.1"
    assert (mlp["evidence"], mlp["tenth"], mlp["n_models"], mlp["share"]) == ("noise", 0, 1, 0.5)


def test_heads_that_write_refusal_count_by_their_role() -> None:
    components = pd.DataFrame(
        {
            "component": ["embed", "head.0.0", "head.3.1", "head.3.2"], "kind": ["embed", "head", "head", "head"],
            "layer": [None, 0, 3, 3], "role": [None, "neither", "guardrail", "compliance"],
            "toxic_mean": [0.0, 0.1, 0.5, -0.4], "toxic_low": [0.0, 0.0, 0.4, -0.5],
            "toxic_high": [0.0, 0.2, 0.6, -0.3], "q_value": [None, 0.5, 0.01, 0.02],
        }
    )  # fmt: skip
    found = written_components("m", components)
    assert found[["evidence", "component", "tenth", "effect"]].to_numpy().tolist() == [
        ["guardrail", "head.3.1", 9, 0.5],
        ["compliance", "head.3.2", 9, -0.4],
    ]


def test_depth_goes_from_0_to_1_and_every_tenth_is_reached() -> None:
    layers = pd.Series(range(11))
    placed = written_components("m", pd.DataFrame({
        "component": "x", "kind": "head", "layer": layers, "role": "guardrail", "toxic_mean": 1.0, "toxic_low": 0.5,
        "toxic_high": 1.5, "q_value": 0.0,
    }))  # fmt: skip
    assert placed["tenth"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert relative_depth(pd.Series([0]), 1).tolist() == [1.0]


def test_nothing_critical_anywhere_still_makes_a_page() -> None:
    empty = frequencies(pd.DataFrame(columns=list(COLUMNS)), {"denoise": ["a"]})
    assert empty.empty and "No component is critical" in str(frequency_figure(empty).layout)
    hostile = "</script><img src=x onerror=alert(1)>"
    row = {"model": hostile, "source": hostile, "failed": "behaviour"}
    result = {
        "category": "violence", "stages": ["behaviour"], "failures": [
            {"model": hostile, "stage": "behaviour", "reason": hostile}],
        "models": [{**dict.fromkeys(("refused_toxic", "refused_hard", "refused_safe", "score_auroc")), **row}],
    }  # fmt: skip
    links = {hostile: {"behaviour": hostile}}
    page = batch_page(result, {"behaviour": BEHAVIOUR}, empty, pd.DataFrame(), links, Words())
    assert hostile not in page_html(page)


STUDY = """
models:
  - tiny
  - preset: tiny
    set: [name=other, seed=1, patching.require=score]
  - preset: tiny
    set: [name=gone, model.source=/no/such/model]
"""


def test_some_models_fail_and_the_others_go_on_and_are_not_run_again(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    options = ("batch", "--file", file, "--limit", 3, "--set", "prompts.limit=12", "--set", "patching.limit=12")
    result = sfc(*options, "--json", root=tmp_path).result
    by_name = {row["model"]: row for row in result["models"]}
    assert list(by_name) == ["tiny", "other", "gone"]
    assert by_name["tiny"]["failed"] == "patch" and by_name["other"]["failed"] == ""
    failures = {(failure["model"], failure["stage"]): failure["reason"] for failure in result["failures"]}
    assert set(failures) == {("tiny", "patch"), ("gone", "behaviour")}, "a model that cannot be loaded fails once"
    assert "no pair can be used" in failures["tiny", "patch"]
    assert "cannot load model '/no/such/model'" in failures["gone", "behaviour"]
    assert by_name["gone"]["n_layers"] is None and by_name["tiny"]["n_layers"] == by_name["other"]["n_layers"] == 2
    models = pd.read_csv(tmp_path / result["files"]["models"])
    assert models["model"].tolist() == list(by_name)
    page = (tmp_path / result["files"]["page"]).read_text(encoding="utf-8")
    assert page.count('class="figure"') == 2 and "/no/such/model" in page
    folder = (tmp_path / result["files"]["page"]).parent
    links = [part.split('"')[0] for part in page.split('href="')[1:] if part.startswith("../")]
    assert len(links) == 3 + 4 and all((folder / link).resolve().is_file() for link in links)

    stages = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "circuits").rglob("manifest.json")
        if path.parent.parent.name != "batch"
    }
    again = sfc(*options, "--json", root=tmp_path)
    assert again.result == result and again.stderr.count("up to date") == 7
    assert stages == {path: path.stat().st_mtime_ns for path in stages}


def test_an_error_that_nobody_foresaw_is_listed_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(BEHAVIOUR, "make", broken)
    options = ("--stages", "behaviour,probe", "--set", "prompts.limit=12")
    result = sfc("batch", "--models", "tiny", *options, "--json", root=tmp_path).result
    assert (
        result["failures"] == [{"model": "tiny", "stage": "behaviour", "reason": "RuntimeError: shapes do not match"}]
        and result["models"][0]["probe_accuracy"] is not None
    )
    traceback = (tmp_path / result["files"]["page"]).with_name("tracebacks.txt").read_text()
    assert "in broken" in traceback


def test_category_and_limit_go_to_studies_that_take_them() -> None:
    run = Run.of(load_experiment("tiny"))
    probe = STUDIES["probe"]
    chosen = with_options(BEHAVIOUR, run, "privacy", 5)
    assert (BEHAVIOUR.of(chosen).category, BEHAVIOUR.of(chosen).limit) == ("privacy", 5)
    assert probe.of(with_options(probe, run, "privacy", 5)).category == "privacy"
    assert probe.of(with_options(probe, run, None, 5)) == probe.of(run)
    limited = run.having(BehaviourOptions, limit=9)
    assert BEHAVIOUR.of(with_options(BEHAVIOUR, limited, None, 5)).limit == 9, "a study's own limit stands"


def test_a_model_is_loaded_once_and_dropped_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Model]] = []

    def load(*arguments: Any) -> Model:
        gc.collect()
        assert not any(model() for model in loaded), "another model is still in memory"
        model = load_model(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("sfc.models.loading.load_model", load)
    (tmp_path / "study.yaml").write_text("models: [tiny, {preset: tiny, set: [name=other, seed=1]}]")
    options = ("--stages", "behaviour,probe", "--limit", 2, "--set", "prompts.limit=12")
    assert sfc("batch", "--file", tmp_path / "study.yaml", *options, root=tmp_path).status == 0
    assert len(loaded) == 2


def test_rates_of_steering_stand_in_the_table_of_models(tmp_path: Path) -> None:
    options = ("--stages", "probe,steer", *LENIENT, "--set", "steering.test_prompts=2", "--set", "steering.layers=[0]")
    result = sfc("batch", "--models", "tiny", *options, "--json", root=tmp_path).result
    [row] = result["models"]
    [steered] = (tmp_path / "circuits" / "tiny").glob("steering-*/result.json")
    points = json.loads(steered.read_text())["operating_points"]
    assert {"force", "suppress"} & set(points) and row["separation"] is not None
    for intent, point in points.items():
        assert row[f"{intent}_rate"] == point["changed_rate"] and row[f"{intent}_alpha"] == point["alpha"]
    assert "forced: safe, refused" in (tmp_path / result["files"]["page"]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models", "tiny,tiney"), "did you mean 'tiny'"),
        (("--models", "tiny,tiny"), "two models are named 'tiny'"),
        (("--models", "tiny", "--stages", "probe,proof"), "did you mean 'probe'"),
        (("--models", "tiny", "--file", "study.yaml"), "not with both"),
        (("--file", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("--models", "tiny", "--stages", "probe", "--set", "model.source=/none"), "cannot load model '/none'"),
    ],
)
def test_bad_input_is_one_line(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    finished = sfc("batch", *options, root=tmp_path)
    assert finished.status == 2 and message in finished.stderr.splitlines()[-1]
    assert finished.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "text",
    ["- tiny", "models: tiny", "models: []", "models: [{set: [seed=1]}]", "models: [{preset: tiny, x: 1}]", "a: ["],
)
def test_malformed_files_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=r"study\.yaml") as error:
        load_study(None, tmp_path / "study.yaml", [])
    assert "\n" not in str(error.value)
