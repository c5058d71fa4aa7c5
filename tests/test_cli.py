"""The commands as a user types them, on the tiny preset: results, second runs, and every kind of bad input."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pandas as pd
import pytest
from commands import Finished, assert_one_line, sfc, sfc_forked, sfc_process
from typer.main import get_command

from sfc.cli import command_line
from sfc.core.experiments import load_experiment
from sfc.studies.study import STUDIES, Study

REPOSITORY = Path(__file__).parents[1]
MINI = REPOSITORY / "sfc" / "data" / "mini"
RESULT_KEYS = {
    "preset", "category", "method", "n_nodes", "n_edges", "faithfulness", "completeness", "completeness_normalised",
    "f_model", "f_circuit", "f_complement", "f_empty", "random_faithfulness", "error_share", "files", "seconds",
    "on_discovery", "faithfulness_low", "faithfulness_high", "completeness_low", "completeness_high",
    "completeness_normalised_low", "completeness_normalised_high", "random_low", "random_high", "p_value",
    "last_site_faithfulness", "single_site_faithfulness", "nodes_per_site", "cpr", "cpr_log", "cmd", "cmd_log",
    "f_edges", "edge_faithfulness", "edge_faithfulness_low", "edge_faithfulness_high",
    "stability", "stability_jaccard", "halves_jaccard", "halves_chance", "baseline", "n_errors",
    "random_completeness_normalised", "kl_without_safe", "refused", "reached_target", "says",
    *(
        f"{figure}{end}"
        for figure in (
            "recovered_toxic", "recovered_safe", "agreement", "kl_recovered_toxic", "kl_recovered_safe", "gap_kept",
            "separation", "separation_model", "prompt_free", "null_agreement", "rotated_agreement",
            "all_features_recovered",
        )
        for end in ("", "_low", "_high")
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def discovered(root: Path) -> dict:
    process = sfc_forked("discover", "--preset", "tiny", "--category", "violence", "--json", root=root)
    told = process.communicate()
    return Finished(process.returncode or 0, *told).result


def test_discover_runs_all_stages_and_ends_with_the_promised_json(discovered: dict, root: Path) -> None:
    assert set(discovered) == RESULT_KEYS
    for name in ("page", "circuit", "curve", "prompts", "result"):
        assert Path(root / discovered["files"][name]).is_file()
    assert [path.name.rpartition("-")[0] for path in (root / "saes").glob("tiny-*")] == ["tiny"]


def test_the_reported_figures_are_those_of_the_curve_on_test_prompts(discovered: dict, root: Path) -> None:
    curve = pd.read_csv(root / discovered["files"]["curve"])
    row = curve[curve["size"] == discovered["n_nodes"]].iloc[0]
    assert len(curve) >= 6
    for name in ("f_model", "f_circuit", "f_complement", "f_empty"):
        assert discovered[name] == pytest.approx(row[name], abs=1e-3)
    graph = nx.node_link_graph(json.loads((root / discovered["files"]["circuit"]).read_text()), edges="edges")
    assert graph.number_of_nodes() == discovered["n_nodes"]
    assert graph.number_of_edges() == discovered["n_edges"]
    whole = curve.iloc[-1]
    assert whole["f_complement"] == pytest.approx(whole["f_empty"], abs=1e-3), "without all features nothing is left"


def test_the_splits_in_the_circuit_are_disjoint_and_test_prompts_are_not_in_the_store(
    discovered: dict, root: Path
) -> None:
    used = pd.read_csv(root / discovered["files"]["prompts"])
    stored = pd.concat(pd.read_csv(path) for path in (root / "activations").glob("tiny-*/prompts.csv"))
    assert not used["prompt"].duplicated().any()
    assert set(used["split"]) == {"discovery", "reference", "test"}
    assert not set(used.loc[used["split"] == "test", "prompt"]) & set(stored["prompt"])


def test_a_circuit_without_dead_ends_is_evaluated_as_it_is_drawn(discovered: dict, root: Path) -> None:
    options = ("--set", "discovery.drop_dead_ends=true", "--set", "discovery.edges_per_node=1")
    options += ("--set", "evaluation.sizes=[64]", "--set", "evaluation.null_draws=0")
    result = sfc("discover", "--preset", "tiny", "--json", *options, root=root).result
    graph = nx.node_link_graph(json.loads((root / result["files"]["circuit"]).read_text()), edges="edges")
    assert graph.graph["edges"] == "attribution" and "nats" in graph.graph["edge_weight"]
    last = {node for node, layer in graph.nodes(data="layer") if layer == 1}
    assert all(node in last or nx.descendants(graph, node) & last for node in graph)
    assert 0 < result["n_nodes"] == len(graph) < 64
    curve = pd.read_csv(root / result["files"]["curve"])
    row = curve[curve["size"] == len(graph)].iloc[0]
    assert result["f_circuit"] == pytest.approx(row["f_circuit"], abs=1e-3)
    assert curve["size"].is_monotonic_increasing and curve["size"].is_unique
    ranks = [rank for _, rank in graph.nodes(data="rank")]
    assert sorted(ranks) == list(range(len(graph)))


BRIEF = ("--set", "evaluation.sizes=[8,64]", "--set", "evaluation.replies=2")


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "correlation", "--set", "correlation.threshold=0.3"),
        ("--method", "correlation", "--set", "correlation.top_per_layer=5", "--set", "discovery.aggregation=mean"),
        ("--method", "magnitude", "--population", "safe"),
        ("--population", "safe", "--set", "evaluation.error_mode=keep-current"),
        ("--method", "attribution", "--set", "discovery.edges=correlation"),
    ],
)
def test_other_methods_populations_and_error_modes_run_on_the_same_saes(
    discovered: dict, root: Path, options: tuple[str, ...]
) -> None:
    result = sfc("discover", "--preset", "tiny", "--category", "privacy", *options, *BRIEF, "--json", root=root).result
    assert result["category"] == "privacy" and result["n_nodes"] > 0
    assert len(list((root / "saes").glob("tiny-*"))) == 1


@pytest.mark.parametrize(
    ("reference", "method", "labels"),
    [
        ("balanced-mean", "exact", {False, True}),
        ("zero", "integrated-gradients", set()),
        ("paired", "attribution", {False}),
    ],
)
def test_the_reference_is_what_its_name_says_and_every_effect_is_checked(
    discovered: dict, root: Path, reference: str, method: str, labels: set[bool]
) -> None:
    options = ("--method", method, "--set", f"discovery.baseline={reference}", "--set", "exact.nodes=25")
    result = sfc("discover", "--preset", "tiny", *options, *BRIEF, "--json", root=root).result
    prompts = pd.read_csv(root / result["files"]["prompts"])
    in_reference = prompts[prompts["split"] == "reference"]
    assert set(in_reference["refusal_label"]) == labels
    graph = json.loads((root / result["files"]["circuit"]).read_text())["graph"]
    assert graph["baseline"] == reference and graph["effect_unit"] == "nats of refusal score"
    assert set(graph["approximation_check"]) == {"top", "random", "worst_misses", "noise_floor", "n_prompts"}
    page = Path(root / result["files"]["page"]).read_text()
    assert "against exact ablation" in page
    if reference == "paired":
        pairs = pd.read_csv(MINI / "pairs.csv").query("category == 'violence'")
        explained = prompts[prompts["dataset_type"].eq("pair") & prompts["split"].ne("reference")]
        assert set(explained["prompt"]) == set(pairs["toxic"]) and set(in_reference["prompt"]) == set(pairs["safe"])
        assert set(explained["split"]) == {"discovery", "test"}
    if method == "exact":
        assert result["n_nodes"] <= 25 and graph["roles"] == {}
        assert graph["approximation_check"]["top"]["rank_correlation"] > 0.99
    else:
        assert list(graph["roles"].values()) == ["template before the prompt", "prompt", "<|end|>", "<|assistant|>"]


def _run_script(name: str, *arguments: str) -> Finished:
    """Run a script in this process."""
    out, status = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(REPOSITORY / "scripts" / name), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
    return Finished(status, out.getvalue(), "")


def test_scripts_are_doors_into_the_same_commands(discovered: dict, root: Path) -> None:
    for script in ("train_saes.py", "collect_activations.py", "discover_circuits.py"):
        assert _run_script(script, "--preset", "tiny", "--root", str(root), "--json").result["preset"] == "tiny"


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "scripts").glob("*.py")))
def test_every_script_says_how_it_is_called(script: str) -> None:
    told = _run_script(script, "--help")
    assert told.status == 0 and "--help" in told.stdout


def test_train_gives_figures_by_role_and_a_page(discovered: dict, root: Path) -> None:
    result = sfc("train", "--preset", "tiny", "--json", root=root).result
    assert {path.name for path in map(Path, result["files"].values()) if path.is_file()} == {
        "quality.csv",
        "quality.html",
        "density.csv",
        "result.json",
    }
    *of_sites, in_series = result["quality"]
    assert [row["role"] for row in of_sites] == ["all", "content", "suffix", "deciding"] * 2
    assert in_series["role"] == "in series"
    assert all(row["fvu"] > 0 and (row["score_recovered"] is None) == (row["role"] != "all") for row in of_sites)


def test_doctor_finds_nothing_wrong_and_then_what_is(discovered: dict, root: Path, tmp_path: Path) -> None:
    checks = sfc("doctor", "--preset", "tiny", "--json", root=root).result["checks"]
    assert {"model", "prompts", "store", "SAEs", "model cache"} <= {check["what"] for check in checks}
    assert any(check["what"].startswith("circuit-") for check in checks)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    shard = next((copy / "activations").glob("tiny-*/shard-*.h5"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    broken = sfc("doctor", "--preset", "tiny", root=copy)
    assert broken.status == 2 and "is damaged" in broken.stderr


def test_a_corrupt_store_or_sae_is_one_line_and_status_2(discovered: dict, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "activations", tmp_path / "activations")
    shard = next(tmp_path.glob("activations/tiny-*/shard-*.h5"))
    shard.write_bytes(b"not HDF5")
    assert_one_line(sfc("train", "--preset", "tiny", root=tmp_path), "is damaged", str(shard), "sfc collect --rebuild")
    shutil.copytree(root / "saes", tmp_path / "saes", dirs_exist_ok=True)
    weights = next(tmp_path.glob("saes/tiny-*/*/sae_weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert_one_line(sfc("discover", "--preset", "tiny", root=tmp_path), str(weights))
    assert not list(tmp_path.glob("circuits/tiny/*/result.json"))


BAD_OPTIONS = {
    "no such key": (("--preset", "tiny", "--set", "saes.kk=3"), "saes.kk"),
    "bad value": (("--preset", "tiny", "--set", "saes.k=none"), "saes"),
    "no such layer": (("--preset", "tiny", "--set", "activations.layers=[0,7]"), "layers 0 to 1"),
    "no such method": (("--preset", "tiny", "--method", "magic"), "discovery.method"),
    "no such model": (("--preset", "tiny", "--set", "model.source=/no/such/model"), "/no/such/model"),
    "no such device": (("--preset", "tiny", "--device", "cuda:99"), "cuda:99"),
    "no such token": (("--preset", "tiny", "--set", "model.refusal_tokens=[Sorry]"), "single tokens"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_end_with_one_line_and_status_2(case: str, discovered: dict, root: Path, tmp_path: Path) -> None:
    options, expected = BAD_OPTIONS[case]
    here = root if case == "no such token" else tmp_path
    assert_one_line(sfc("discover", *options, root=here), expected)
    assert not list(tmp_path.rglob("manifest.json")), "nothing half-written is left behind"


def _with_file(folder: Path, name: str, content: bytes) -> Path:
    shutil.copytree(MINI, folder)
    (folder / name).write_bytes(content)
    return folder


def test_a_data_set_without_pairs_has_no_paired_reference(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(MINI, folder)
    (folder / "pairs.csv").unlink()
    options = ("--preset", "tiny", "--data", folder, "--set", "discovery.baseline=paired")
    assert_one_line(sfc("discover", *options, root=tmp_path), "pairs.csv", "does not exist")


BAD_FILES = {
    "misspelt column": (b"promt,category\nhello,violence\n", "promt"),
    "unknown category": (b"prompt,category\nhello,violins\n", "violins"),
    "empty file": (b"", "empty"),
    "not UTF-8": (b"prompt,category\n\xff\xfe\xfa,violence\n", "UTF-8"),
    "header only": (b"prompt,category\n", "or-bench-toxic.csv"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_end_with_one_line_and_status_2(case: str, tmp_path: Path) -> None:
    content, expected = BAD_FILES[case]
    folder = _with_file(tmp_path / "data", "or-bench-toxic.csv", content)
    finished = sfc("discover", "--preset", "tiny", "--data", folder, root=tmp_path)
    assert_one_line(finished, expected, "or-bench-toxic.csv")
    assert not (tmp_path / "activations").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_disk_is_one_line_and_status_2(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert_one_line(sfc("collect", "--preset", "tiny", root=tmp_path), "permission")


@pytest.mark.skipif(not Path("/dev/full").exists() or shutil.which("mount") is None, reason="needs mount")
def test_a_full_disk_is_one_line_and_status_2(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        assert_one_line(sfc("collect", "--preset", "tiny", root=small))
        assert not list(small.rglob("*.h5")), "nothing half-written is left behind"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_data_and_presets_say_what_is_there(tmp_path: Path) -> None:
    described = sfc("data", "--json", root=tmp_path).result
    assert described["counts"]["violence"]["toxic"] == 100
    assert all(Path(path).is_file() for path in described["files"].values())
    assert {"smollm2", "llama2-7b-chat", "tiny"} <= set(sfc("presets", "--json", root=tmp_path).result["presets"])


BAD_USES = {
    "no such command": (("discovr",), "'discover'"),
    "no such option": (("discover", "--categories", "x"), "--category"),
    "not a number": (("discover", "--seed", "many"), "--seed"),
    "no such behavior": (("probe", "--behavior", "refusing"), "did you mean 'refusal'"),
}


@pytest.mark.parametrize("case", BAD_USES)
def test_bad_uses_end_with_one_line_and_status_2(case: str, tmp_path: Path) -> None:
    arguments, expected = BAD_USES[case]
    finished = sfc(*arguments, root=tmp_path)
    assert_one_line(finished, expected)
    assert len(finished.stderr.splitlines()) == 1


PLUGIN = """
from sfc.core.options import Options
from sfc.studies.study import STUDIES, Study

class Ending(Study[Options]):
    "A study that does not end well."
    name, options = "ending", Options

    def inputs(self, run):
        return {}

    def make(self, session, folder):
        ENDS

    def page(self, finished):
        raise NotImplementedError

STUDIES.register(Ending())
"""


def _ending(ends: str, folder: Path) -> Finished:
    plugin = folder / "ending.py"
    plugin.write_text(PLUGIN.replace("ENDS", ends))
    (folder / "faults").mkdir()
    own = {"SFC_PLUGINS": str(plugin), "TMPDIR": str(folder / "faults")}
    return sfc_process("ending", "--preset", "tiny", root=folder, **own)


def test_an_unexpected_fault_is_one_line_that_says_where_its_traceback_lies(tmp_path: Path) -> None:
    finished = _ending("raise ValueError('one line\\nand another')", tmp_path)
    assert finished.status == 1 and "Traceback" not in finished.stderr
    (told,) = (tmp_path / "faults").iterdir()
    last = finished.stderr.splitlines()[-1]
    assert last == f"error: unexpected ValueError: one line and another; its traceback is in {told}"
    text = told.read_text(encoding="utf-8")
    assert text.startswith("sfc ending --preset tiny") and "Traceback" in text and "ending.py" in text


def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    finished = _ending("raise KeyboardInterrupt", tmp_path)
    assert finished.status == 130 and "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("interrupted: ")


def test_help_groups_options_and_shows_their_defaults_and_further_settings(tmp_path: Path) -> None:
    page = sfc_process("discover", "--help", root=tmp_path).stdout
    own, of_pairs, of_all = (page.index(title) for title in ("─ Options ─", "Settings of pairs", "every command"))
    assert own < page.index("--population") < of_pairs < page.index("--pairs") < of_all < page.index("--preset")
    flowing = re.sub(r"[\s│]+", " ", page)
    assert "[default: learned-mask]" in flowing and "integrated-gradients" in flowing
    assert "Also by --set discovery.NAME=VALUE: nodes, base, baseline" in page


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_examples_of_its_help_are_commands_that_it_takes(study: Study) -> None:
    example = " ".join((study.__doc__ or "").split()).partition("Example")[2]
    lines = [line for line in re.split("s?: |; ", example) if line.startswith(f"sfc {study.name}")]
    assert lines
    command = get_command(command_line()).commands[study.name]  # pyright: ignore[reportAttributeAccessIssue]
    for line in lines:
        parsed = command.make_context("sfc", shlex.split(line)[2:]).params
        load_experiment("tiny", parsed["set"] or ())
