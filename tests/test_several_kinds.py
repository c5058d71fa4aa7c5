"""Sites of several kinds at once from the command line: from activations to the circuit, its page and its exports."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import sfc

from sfc.circuits.edges import downstream

KINDS = "activations.kind=[attn_out,mlp_out,resid_post]"
SETTINGS = (KINDS, "evaluation.sizes=[96]", "evaluation.null_draws=0", "learned_mask.steps=4", "saes.steps=20")
OPTIONS = ("--preset", "tiny", "--json", "--category", "violence", *(p for s in SETTINGS for p in ("--set", s)))
SITES = [f"blocks.{layer}.hook_{kind}" for layer in (0, 1) for kind in ("attn_out", "mlp_out", "resid_post")]


@pytest.fixture(scope="module")
def found(root: Path) -> dict:
    return sfc("discover", *OPTIONS, root=root).result


@pytest.fixture(scope="module")
def circuit(root: Path, found: dict) -> dict:
    return json.loads((root / found["files"]["circuit"]).read_text())


def test_dictionaries_of_every_site_are_trained_and_measured(root: Path, found: dict) -> None:
    assert found["n_nodes"] == 96
    quality = pd.read_csv(next((root / "saes").glob("tiny-*")) / "quality.csv")
    assert quality.loc[quality["role"] == "all", "site"].tolist() == SITES


def test_nodes_are_of_all_kinds_and_edges_join_sites_that_write_into_one_another(circuit: dict) -> None:
    site_of = {node["id"]: node["site"] for node in circuit["nodes"]}
    assert set(site_of.values()) == set(SITES) and circuit["graph"]["sites"] == SITES
    ways = {(site, other) for site in SITES for other, _ in downstream(site, SITES)}
    joined = {(site_of[edge["source"]], site_of[edge["target"]]) for edge in circuit["edges"]}
    assert joined <= ways and len(joined) > 3


def test_the_page_and_the_features_are_of_all_sites(root: Path, found: dict, circuit: dict) -> None:
    page = (root / found["files"]["page"]).read_text()
    features = json.loads((root / found["files"]["features"]).read_text())["features"]
    assert {name.partition(".")[0] for name in features} == {"attn_out", "mlp_out", "resid_post"}
    assert all(site.removeprefix("blocks.0.hook_") in page for site in SITES[:3])


def test_edges_are_judged_and_other_methods_work(root: Path, found: dict) -> None:
    judged = sfc("evaluate", root / found["files"]["circuit"], *OPTIONS, root=root).result
    [figures] = judged["circuits"].values() if isinstance(judged["circuits"], dict) else judged["circuits"]
    assert figures["f_edges"] is not None and np.isfinite(figures["f_edges"])
    by_correlation = sfc(
        "discover", *OPTIONS, "--method", "correlation", "--set", "discovery.edges=correlation",
        "--set", "correlation.top_per_layer=6", root=root,
    )  # fmt: skip
    assert by_correlation.result["n_nodes"] > 0


def test_it_is_exported_but_for_formats_of_one_dictionary_a_layer(root: Path, found: dict) -> None:
    for form, status in (("graphml", 0), ("circuit-tracer", 2)):
        finished = sfc("export", *OPTIONS, "--format", form, root=root)
        assert finished.status == status, finished.stderr
