"""The page of a run's dictionaries: every figure is on it, it asks for nothing, and no text breaks out of it."""

import base64
import hashlib
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from sfc.behaviors.behavior import Words
from sfc.core.artifacts import json_records, write_csv, write_json
from sfc.pages.html import page_html
from sfc.studies.study import Finished
from sfc.studies.train.page import density_figure, quality_page, reconstruction_figure, splicing_figure

SITES = ["blocks.19.hook_resid_post", "blocks.20.hook_resid_post"]
ROLES = ["all", "content", "suffix"]
SPLICED = (
    "cross_entropy", "cross_entropy_spliced", "cross_entropy_mean_ablated", "cross_entropy_zero_ablated",
    "loss_recovered", "loss_recovered_zero", "score", "score_spliced", "score_mean_ablated", "score_zero_ablated",
    "score_change_spliced", "score_change_mean_ablated", "score_change_zero_ablated", "score_recovered",
    "score_recovered_zero",
)  # fmt: skip


def make_quality(sites: list[str] = SITES, roles: list[str] = ROLES, **figures: float) -> pd.DataFrame:
    """Figures that are all different: site 0 has 0.0…, site 1 has 1.0…"""
    rows = []
    for number, site in enumerate(sites):
        for rank, role in enumerate(roles):
            row = {"site": site, "role": role, "rows": 1000 * (rank + 1), "fvu": number + rank / 10, "cosine": 0.9}
            row |= {"l0": 32.0, "dead_share": 0.25, "dense_share": 0.01}
            spliced = {name: number + place / 100 for place, name in enumerate(SPLICED)}
            rows.append(row | (spliced | figures if role == "all" else dict.fromkeys(SPLICED, math.nan)))
    return pd.DataFrame(rows)


def make_density(sites: list[str] = SITES, roles: list[str] = ROLES) -> pd.DataFrame:
    """Of four features one never fires, one fires on every row, two on a thousandth of them."""
    rates = pd.DataFrame({role: [0.0, 1.0, 0.001, 0.001] for role in roles})
    return pd.concat(dict.fromkeys(sites, rates), names=["site", "feature"]).reset_index()


def drawn(folder: Path, preset: str, quality: pd.DataFrame, density: pd.DataFrame) -> str:
    """The page of these figures, and of all sites in series."""
    in_series = {"site": "all", "role": "in series", "restored_toxic": 0.8125, "agreement": 0.9375}
    quality = pd.concat([quality, pd.DataFrame([in_series])])
    write_csv(folder / "quality.csv", quality)
    write_csv(folder / "density.csv", density)
    write_json(folder / "result.json", {"preset": preset, "dense_rate": 0.1, "quality": json_records(quality, None)})
    return page_html(quality_page(Finished(folder, {"words": Words()._asdict()})))


def traces(figure) -> list[dict]:
    return figure.to_dict()["data"]


def test_reconstruction_has_a_line_per_role_in_five_panels_each_with_its_unit() -> None:
    figure = reconstruction_figure(make_quality())
    lines = traces(figure)
    assert [line["name"] for line in lines] == ROLES * 5
    assert [line["name"] for line in lines if line["showlegend"]] == ROLES
    assert [line["y"] for line in lines[:3]] == [[0, 1], [0.1, 1.1], [0.2, 1.2]]
    layout = figure.to_dict()["layout"]
    units = {layout[name]["title"]["text"] for name in ("yaxis", "yaxis2", "yaxis3", "yaxis4", "yaxis5")}
    assert units == {"share of variance", "cosine", "features per row", "share of features"}
    looks = {line["name"]: (line["marker"]["color"], line["marker"]["symbol"]) for line in lines}
    assert len(set(looks.values())) == 3


def test_a_role_that_is_new_has_a_look_of_its_own() -> None:
    lines = traces(reconstruction_figure(make_quality(roles=[*ROLES, "reply"])))
    assert len({(line["marker"]["color"], line["marker"]["symbol"]) for line in lines}) == 4
    assert len(traces(density_figure(make_density(roles=[*ROLES, "reply"]), 0.1))) == 2 * 4


def test_the_histograms_count_every_feature_that_fires_and_the_slider_shows_one_site() -> None:
    figure = density_figure(make_density(), 0.1)
    bars = traces(figure)
    for bar in bars:
        assert sum(bar["y"]) == 3
        counts = dict(zip(bar["x"], bar["y"], strict=True))
        assert [round(x, 3) for x, count in counts.items() if count] == [-3.1, -0.1]
    layout = figure.to_dict()["layout"]
    steps = layout["sliders"][0]["steps"]
    assert [step["label"] for step in steps] == ["19", "20"]
    assert [step["args"][0]["visible"] for step in steps] == [[True] * 3 + [False] * 3, [False] * 3 + [True] * 3]
    assert [bar["visible"] for bar in bars] == [True] * 3 + [False] * 3
    assert "Never: 1 (all), 1 (content), 1 (suffix)" in steps[1]["args"][1]["title.text"]
    assert layout["shapes"][0]["x0"] == pytest.approx(-1), "dense begins at 10 %"


@pytest.mark.parametrize("rates", [[0.0, 0.0], [1.0, 1.0], [1e-6, 0.5], [math.nan, math.nan]])
def test_any_rates_make_a_histogram(rates: list[float]) -> None:
    density = pd.DataFrame({"site": SITES[0], "feature": range(len(rates)), "all": rates})
    (bars,) = traces(density_figure(density, 0.1))
    assert sum(bars["y"]) == sum(rate > 0 for rate in rates)


def test_splicing_shows_every_run_and_leaves_a_gap_where_nothing_is_measurable() -> None:
    lines = traces(splicing_figure(make_quality(loss_recovered=math.nan), "refusal score"))
    assert len(lines) == 2 * (4 + 2)
    by_name = {line["name"]: line["y"] for line in lines[:6]}
    assert by_name["SAE spliced in"] == [0.01, 1.01] and by_name["zero-ablated"] == [0.03, 1.03]
    assert by_name["recovered of mean-ablation"] == [None, None]
    assert by_name["recovered of zero-ablation"] == [0.05, 1.05]


def test_a_page_is_small_asks_for_nothing_and_runs_only_its_own_scripts(tmp_path: Path) -> None:
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(32)]
    page = drawn(tmp_path, "smollm2", make_quality(sites), make_density(sites))
    assert len(page) < 8e6
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and len(scripts) == 2
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert not re.search(r"<(link|iframe|object|base|img)\b", page.replace(scripts[0], ""))


def test_a_page_says_what_was_measured_in_words_and_tables(tmp_path: Path) -> None:
    page = drawn(tmp_path, "smollm2", make_quality(loss_recovered=math.nan), make_density())
    assert "2 sparse autoencoders of 4 features" in page
    assert "1,000 all, 2,000 content, 3,000 suffix" in page
    assert page.count('<td class="number">not measurable</td>') == 4 + 7 + 20, "losses, restored, told"
    assert page.count('<td class="number">0.812</td>') == page.count('<td class="number">0.938</td>') == 1
    assert page.count('<td class="number">25.00 %</td>') == 6
    assert "more than 10 % of them" in page
    assert ">Features that came back</" not in page
    told = drawn(tmp_path, "smollm2", make_quality(matched=0.4375, probe_label_1=0.9062), make_density())
    assert ">Features that came back</" in told and told.count("0.438</td>") == told.count("0.906</td>") == 2
