"""The picture of a circuit: everything is on it, nothing overlaps, and no text can break out of it."""

import base64
import hashlib
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from sfc.core.artifacts import write_text
from sfc.pages.circuit import circuit_page
from sfc.pages.curve import curve_figure
from sfc.pages.explorable import shown_sizes
from sfc.pages.graph import circuit_figure, layers_figure
from sfc.pages.html import page_html
from sfc.pages.placement import PLOT_WIDTH

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    '"><svg/onload=alert(4)>',
    "'; alert(5); '",
    "<!--<script>",
    "]]></style><link rel=stylesheet href=https://example.org>",
    "%{customdata} &lt;b&gt; &amp;",
    "\n\t\x00\x1b\u2028\u202e",
    "\ud800",
    "日本 🙂",
]
tokens = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30)), max_size=10)


def write_page(path: Path, *arguments: Any) -> None:
    """Write a circuit's page; arguments as `circuit_page`."""
    write_text(path, page_html(circuit_page(*arguments)))


def make_circuit(effects, columns=None, n_columns=11, **facts) -> nx.DiGraph:
    """A circuit with these effects; every seventh node is an error node, neighbouring columns are joined."""
    sites = [f"blocks.{19 + number}.hook_resid_post" for number in range(n_columns)]
    graph = nx.DiGraph(sites=sites, method="attribution", effect_unit="nats of refusal score", **facts)
    columns = columns if columns is not None else [number % n_columns for number in range(len(effects))]
    for rank, (effect, column) in enumerate(zip(effects, columns, strict=True)):
        graph.add_node(
            f"resid_post.{19 + column}/F{rank}",
            site=sites[column],
            layer=19 + column,
            kind="error" if rank % 7 == 6 else "feature",
            effect=effect,
            absolute_effect=abs(effect) * 1.2,
            rank=rank,
        )
    for source, target in combinations(graph, 2):
        if graph.nodes[target]["layer"] == graph.nodes[source]["layer"] + 1:
            graph.add_edge(source, target, weight=graph.nodes[source]["effect"] / 3)
    return graph


def make_cards(graph, texts=("kill",)) -> dict:
    """Cards of all features of a circuit, whose texts are these."""
    texts = list(texts)
    card = {
        "label": " ".join(texts), "score": 0.61, "raises": texts, "lowers": texts, "density": 0.1, "max": 2.0,
        "histogram": {"from": 0.5, "counts": [3, 0, 1]}, "firing": [1.0, 0.25],
        "contexts": [
            {"tokens": [*texts, "x"], "values": [0.0] * len(texts) + [2.0], "peak": len(texts), "in_template": False,
             "population": "toxic", "category": "violence"}
        ],
        "neighbours": [{"node": "resid_post.19/F999", "cosine": 0.5}],
        "explanation": {"text": " ".join(texts), "score": None, "model": texts[0]},
    }  # fmt: skip
    sides = ("toxic", "safe", "shared")
    names = [name for name in graph if graph.nodes[name]["kind"] == "feature"]
    return {
        "groups": [{"population": p, "category": "violence", "n_prompts": 4} for p in ("toxic", "safe")],
        "features": {name: {**card, "fires_on": sides[number % 3]} for number, name in enumerate(names)},
    }


def make_curve(**columns) -> pd.DataFrame:
    curve = {
        "size": [5, 50, 500, 5000],
        "faithfulness": [0.1, 0.5, 0.9, 1.0],
        "faithfulness_low": [0.05, 0.4, 0.8, 1.0],
        "faithfulness_high": [0.2, 0.6, 1.0, 1.0],
        "completeness": [0.9, 0.4, -0.2, -0.6],
        "completeness_normalised": [0.95, 0.6, 0.1, 0.0],
        "random_faithfulness": [0.0, 0.01, 0.05, 0.4],
        "random_low": [-0.02, -0.01, 0.03, 0.3],
        "random_high": [0.02, 0.03, 0.08, 0.5],
        "on_discovery": [0.12, 0.55, 0.92, 1.0],
    }
    return pd.DataFrame(curve | columns)


def make_result(**figures) -> dict:
    return {
        "preset": "smollm2",
        "category": "violence",
        "method": "attribution",
        "n_nodes": 20,
        "n_edges": 12,
        "faithfulness": 0.887,
        "completeness": 0.2,
        "completeness_normalised": -0.112,
        "f_model": 6.31,
        "f_circuit": 5.18,
        "f_complement": -4.9,
        "f_empty": -3.72,
        "random_faithfulness": 0.0113,
        "error_share": 0.031,
    } | figures


class Page(HTMLParser):
    """What a browser would find in a page: elements, texts, scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.data: dict[str, dict] = {}
        self.text = ""
        self._script: dict[str, str | None] | None = None
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs)
            if "type" not in self._script:
                self.scripts.append("")
            else:
                self.data[str(self._script["id"])] = {}
                self._json = ""

    def handle_endtag(self, tag):
        if tag == "script" and self._script and "type" in self._script:
            self.data[str(self._script["id"])] = json.loads(self._json)
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += data
        elif "type" in self._script:
            self._json += data
        else:
            self.scripts[-1] += data


def drawn_nodes(figure: go.Figure) -> dict[str, tuple[float, float, float]]:
    """By name: the middle of the marker in pixels, on the narrowest page, and half its extent."""
    nodes = {}
    figure_dict = figure.to_dict()
    first, last = figure_dict["layout"]["xaxis"]["range"]
    bottom, top = figure_dict["layout"]["yaxis"]["range"]
    margin = figure_dict["layout"]["margin"]
    y_scale = (figure_dict["layout"]["height"] - margin["t"] - margin["b"]) / (top - bottom)
    for trace in figure_dict["data"]:
        for number, name in enumerate(trace.get("ids", ())):
            x = (trace["x"][number] - first) / (last - first) * PLOT_WIDTH
            # Half the diagonal of plotly's diamonds is 1.3 times the radius.
            reach = trace["marker"]["size"][number] / 2 * (1.3 if trace["marker"]["symbol"] == "diamond" else 1)
            assert bottom <= trace["y"][number] <= top
            nodes[name] = (x, trace["y"][number] * y_scale, reach)
    return nodes


def hover_texts(figure: go.Figure) -> dict[str, str]:
    traces = [trace for trace in figure.to_dict()["data"] if "ids" in trace]
    return {name: text for trace in traces for name, text in zip(trace["ids"], trace["hovertext"], strict=True)}


def segments(figure: go.Figure) -> list[tuple]:
    """The ends of all edges in a figure."""
    lines = [trace for trace in figure.to_dict()["data"] if trace["mode"] == "lines" and trace["x"][0] is not None]
    return [
        (line["x"][start], line["y"][start], line["x"][start + 1], line["y"][start + 1])
        for line in lines
        for start in range(0, len(line["x"]), 3)
    ]


sized_circuits = st.tuples(
    st.integers(1, 34),
    st.lists(st.floats(-30, 30, allow_subnormal=False), max_size=60),
    st.randoms(use_true_random=False),
)


@settings(max_examples=25, deadline=None)
@given(sized_circuits)
def test_every_node_is_drawn_once_in_its_column_and_touches_no_other(case):
    n_columns, effects, random = case
    columns = [random.choice([0, n_columns - 1, random.randrange(n_columns)]) for _ in effects]
    graph = make_circuit(effects, columns, n_columns)
    figure = circuit_figure(graph)
    nodes = drawn_nodes(figure)
    assert nodes.keys() == set(graph)
    _assert_apart(nodes)
    for name, column in zip(graph, columns, strict=True):
        x, _, reach = nodes[name]
        left = column * PLOT_WIDTH / n_columns
        assert left <= x - reach and x + reach <= left + PLOT_WIDTH / n_columns


@pytest.mark.parametrize(("share_in_last", "highest"), [(0.1, 600), (0.5, 600), (1.0, 700)])
def test_300_nodes_of_any_sizes_do_not_overlap_and_fit_a_laptop_screen(share_in_last, highest):
    random = np.random.default_rng(0)
    effects = random.standard_t(2, 300).tolist()
    columns = np.where(random.random(300) < share_in_last, 10, random.integers(0, 11, 300)).tolist()
    figure = circuit_figure(make_circuit(effects, columns))
    nodes = drawn_nodes(figure)
    assert len(nodes) == 300
    _assert_apart(nodes)
    assert figure.to_dict()["layout"]["height"] <= highest


def _assert_apart(nodes):
    for (x, y, reach), (other_x, other_y, other_reach) in combinations(nodes.values(), 2):
        assert math.hypot(x - other_x, y - other_y) >= reach + other_reach - 1e-6


def test_stronger_nodes_are_larger_and_stand_nearer_to_the_line_on_the_side_of_their_sign():
    graph = make_circuit([3.0, -2.0, 1.0, -0.5, 0.2], columns=[4] * 5)
    drawn = drawn_nodes(circuit_figure(graph))
    nodes = [drawn[name] for name in graph]
    assert [y > 0 for _, y, _ in nodes] == [True, False, True, False, True]
    assert abs(nodes[0][1]) < nodes[2][1] < nodes[4][1] and nodes[1][1] > nodes[3][1]
    reaches = [reach for *_, reach in nodes]
    assert reaches == sorted(reaches, reverse=True)


def test_all_sites_are_columns_even_empty_ones():
    figure = circuit_figure(make_circuit([1.0], columns=[3])).to_dict()
    assert list(figure["layout"]["xaxis"]["ticktext"]) == [str(layer) for layer in range(19, 30)]
    assert "resid_post" in figure["layout"]["xaxis"]["title"]["text"]


def test_error_nodes_have_their_own_symbol_and_signs_their_own_colours():
    graph = make_circuit([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    traces = [trace for trace in circuit_figure(graph).to_dict()["data"] if "ids" in trace]
    looks = {name: (trace["marker"]["symbol"], trace["marker"]["color"]) for trace in traces for name in trace["ids"]}
    names = list(graph)
    assert looks[names[6]][0] != looks[names[0]][0]
    assert looks[names[0]][1] == looks[names[6]][1] != looks[names[1]][1]


def test_too_many_nodes_leave_the_strongest_with_the_edges_between_them_and_the_title_says_so():
    random = np.random.default_rng(1)
    graph = make_circuit(random.standard_normal(120).tolist())
    figure = circuit_figure(graph, max_nodes=50)
    strongest = sorted(graph, key=lambda name: -abs(graph.nodes[name]["effect"]))[:50]
    assert drawn_nodes(figure).keys() == set(strongest)
    assert len(segments(figure)) == graph.subgraph(strongest).number_of_edges()
    assert "50 of 120 nodes drawn" in figure.to_dict()["layout"]["title"]["text"]


def test_half_way_along_an_edge_stands_what_it_joins_and_weighs():
    graph = make_circuit([3.0, -1.0, 1.5], columns=[0, 1, 2], edge_weight="nats that <pass>")
    figure = circuit_figure(graph)
    traces = [trace for trace in figure.to_dict()["data"] if "→" in str(trace.get("hovertext"))]
    assert sorted(text for trace in traces for text in trace["hovertext"]) == [
        "<b>resid_post.19/F0</b> → <b>resid_post.20/F1</b><br>+1.00 nats that &lt;pass&gt;",
        "<b>resid_post.20/F1</b> → <b>resid_post.21/F2</b><br>−0.333 nats that &lt;pass&gt;",
    ]
    middles = [((x + to_x) / 2, (y + to_y) / 2) for x, y, to_x, to_y in segments(figure)]
    places = [place for trace in traces for place in zip(trace["x"], trace["y"], strict=True)]
    assert sorted(places) == sorted(middles)


def test_edges_join_their_nodes_and_heavier_ones_are_wider():
    graph = make_circuit([3.0, -1.0, 1.0], columns=[0, 1, 2])
    figure = circuit_figure(graph)
    positions = {
        name: (x, y)
        for trace in figure.to_dict()["data"]
        for name, x, y in zip(trace.get("ids", ()), trace["x"], trace["y"], strict=False)
    }
    assert sorted(segments(figure)) == sorted(
        (*positions[source], *positions[target]) for source, target in graph.edges
    )
    by_start = {
        trace["x"][0]: trace["line"]
        for trace in figure.to_dict()["data"]
        if trace["mode"] == "lines" and trace["x"][0] is not None
    }
    assert by_start[0]["width"] > by_start[1]["width"]
    assert by_start[0]["color"] != by_start[1]["color"]


def test_hover_tells_what_is_known_of_a_node():
    graph = make_circuit([-0.4125])
    name = next(iter(graph))
    graph.nodes[name].update(p_value=0.012, q_value=3e-7, raises=[" kill", "\n"], lowers=["Sure"])
    text = hover_texts(circuit_figure(graph))[name]
    for part in (name, "layer 19", "rank 1", "−0.412 nats of refusal score", "0.495", "0.012", "“␣kill” “↵”", "“Sure”"):
        assert part in text, part
    assert "lowers the refusal score" in text


def test_a_correlation_is_not_called_a_cause():
    graph = make_circuit([0.4, -0.3])
    graph.graph.update(method="correlation", effect_unit="Pearson's r")
    text = "".join(hover_texts(circuit_figure(graph)).values())
    assert "Pearson's r" in text and "refusal score" not in text


@settings(max_examples=40, deadline=None)
@given(tokens)
def test_hover_markup_holds_nothing_but_our_own_tags_and_no_invisible_characters(texts):
    graph = make_circuit([1.0])
    name = next(iter(graph))
    graph.nodes[name].update(raises=texts, lowers=texts)
    text = hover_texts(circuit_figure(graph))[name]
    for tag in ("<b>", "</b>", "<i>", "</i>", "<br>"):
        text = text.replace(tag, "")
    assert "<" not in text and ">" not in text
    assert not any(character in text for character in "\n\t\x00\x1b\u2028\u202e")
    text.encode()


def test_an_empty_circuit_is_a_figure_that_says_so():
    figure = circuit_figure(nx.DiGraph(sites=["blocks.0.hook_resid_post"])).to_dict()
    assert "no nodes" in figure["layout"]["annotations"][0]["text"]
    assert circuit_figure(nx.DiGraph()).to_dict()["layout"]["height"] > 0


def test_layers_count_every_node_by_sign():
    figure = layers_figure(make_circuit([1.0, -1.0, 1.0, 1.0], columns=[0, 0, 0, 2], n_columns=3)).to_dict()
    assert {tuple(trace["y"]) for trace in figure["data"]} == {(2, 0, 1), (1, 0, 0)}


def traces_by_name(figure: go.Figure) -> dict[str, dict]:
    return {trace["name"]: trace for trace in figure.to_dict()["data"] if "name" in trace}


def test_curve_shows_its_columns_on_a_log_axis_with_values_out_of_sight_still_there():
    figure = curve_figure(make_curve(completeness=[0.9, 0.4, -0.2, -40.0]), 500)
    traces = traces_by_name(figure)
    assert traces["faithfulness"]["y"] == [0.1, 0.5, 0.9, 1.0]
    assert traces["faithfulness, discovery split"]["line"]["dash"] == "dash"
    assert traces["completeness, as published"]["y"][-1] == -40
    layout = figure.to_dict()["layout"]
    assert layout["xaxis"]["type"] == "log" and layout["yaxis"]["range"] == [-0.5, 1.5]
    assert {shape["y0"] for shape in layout["shapes"] if shape["y0"] == shape["y1"]} == {0, 1}
    assert 500 in [shape["x0"] for shape in layout["shapes"]]
    assert any("500" in annotation["text"] for annotation in layout["annotations"])


def test_figures_that_are_not_measurable_are_gaps():
    figure = curve_figure(make_curve(faithfulness=[0.1, None, math.inf, 1.0], random_low=[0, None, 0.1, 0.2]), 50)
    assert traces_by_name(figure)["faithfulness"]["y"] == [0.1, None, None, 1.0]
    bands = [trace for trace in figure.to_dict()["data"] if trace.get("fill") == "toself"]
    assert [max(band["x"]) for band in bands] == [5, 5000, 5000], "two of random circuits, one of the interval"


def test_a_curve_without_any_measurable_figure_says_so():
    nothing = [None] * 4
    curve = pd.DataFrame({column: make_curve()["size"] if column == "size" else nothing for column in make_curve()})
    assert "Not measurable" in str(curve_figure(curve, 50).to_dict()["layout"]["annotations"])
    assert "Not measurable" not in str(curve_figure(make_curve(faithfulness=nothing), 50).to_dict()["layout"])
    assert "Not measurable" in str(curve_figure(curve.assign(size=[0, 0, 0, 0]), 0).to_dict()["layout"])


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens, st.sampled_from(HOSTILE))
def test_no_text_of_a_page_becomes_markup_or_script(tmp_path, texts, category):
    graph = make_circuit(np.linspace(1, -1, 20).tolist(), command=category, fingerprint=category)
    for node in graph.nodes.values():
        node.update(raises=["a"], lowers=["b"])
    plain = _elements(graph, "violence", tmp_path)
    for node in graph.nodes.values():
        node.update(raises=texts + HOSTILE[:5], lowers=HOSTILE[5:])
    hostile = nx.relabel_nodes(graph, {name: f"{name}{category}" for name in graph})
    assert set(_elements(hostile, category, tmp_path, [*texts, *HOSTILE])) == set(plain)


def _elements(graph, category, folder, texts=("kill",)) -> list[tuple[str, tuple[str, ...]]]:
    """Tags with the names of their attributes, and how often scripts occur."""
    cards = make_cards(graph, texts)
    write_page(folder / "page.html", graph, make_curve(), make_result(category=category), cards)
    page = Page(folder / "page.html")
    assert len(page.scripts) == 3
    assert list(page.data) == ["circuit-data", "circuit-cards", "curve-data", "layers-data"]
    assert page.source.lower().count("</script") == 7
    return [(tag, tuple(attributes)) for tag, attributes in page.elements]


def test_a_page_holds_plotly_once_asks_for_nothing_and_runs_only_its_own_scripts(tmp_path):
    write_page(tmp_path / "page.html", make_circuit([1.0, -1.0]), make_curve(), make_result())
    page = Page(tmp_path / "page.html")
    assert page.source.count(get_plotlyjs()) == 1
    ours = page.source.replace(get_plotlyjs(), "")
    assert "http" not in ours.replace("http-equiv", "") and "url(" not in ours and "@import" not in ours
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.elements)
    assert not any(tag in {"link", "iframe", "object", "base"} for tag, _ in page.elements)
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    assert policy and policy.startswith("default-src 'none'; script-src 'sha256-")
    for script in page.scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_with_cards_colours_are_the_side_a_feature_fires_on_and_errors_have_one_of_their_own():
    graph = make_circuit([1.0, 0.9, -0.8, 0.7, -0.6, 0.5, 0.4])
    cards = make_cards(graph)["features"]
    looks = {}
    for trace in circuit_figure(graph, cards=cards).to_dict()["data"]:
        for name in trace.get("ids", ()):
            looks[name] = (trace["marker"]["color"], trace["marker"]["symbol"])
    names = list(graph)
    assert len({looks[name] for name in names[:3]}) == 3
    assert looks[names[0]] == looks[names[3]] and looks[names[2]] == looks[names[5]]
    assert looks[names[6]][1] == "diamond" and looks[names[6]][0] not in {looks[name][0] for name in names[:3]}


def test_the_slider_offers_the_sizes_of_the_curve_up_to_the_whole_graph():
    curve = make_curve(faithfulness=[None, 0.5, 0.9, 1.0])
    sizes = shown_sizes(curve, 120)
    assert [at["size"] for at in sizes] == [5, 50, 120]
    assert [at["faithfulness"] for at in sizes] == [None, 0.5, None]
    assert [at["size"] for at in shown_sizes(curve, 500)] == [5, 50, 500]
    assert shown_sizes(curve, 0) == []


def test_the_data_of_a_page_holds_every_card_and_links_only_to_neuronpedia(tmp_path):
    graph = make_circuit(np.linspace(1, -1, 12).tolist(), roles={"effect_content": "prompt"})
    for node in graph.nodes.values():
        node["effect_content"] = node["effect"]
    cards = make_cards(graph, ["\u202ekill", "</script>"])
    first, second = list(cards["features"])[:2]
    cards["features"][first]["neuronpedia"] = "https://www.neuronpedia.org/gpt2-small/8-res-jb/3"
    cards["features"][second]["neuronpedia"] = "javascript:alert(1)"
    write_page(tmp_path / "page.html", graph, make_curve(), make_result(), cards)
    data = Page(tmp_path / "page.html").data["circuit-cards"]
    assert set(data["nodes"]) == set(graph) and len(data["edges"]) == graph.number_of_edges()
    assert data["nodes"][first]["card"]["neuronpedia"].endswith("/3")
    assert data["nodes"][second]["card"]["neuronpedia"] is None
    assert data["nodes"][first]["card"]["contexts"][0]["tokens"][0] == "\\u202ekill"
    assert data["nodes"][first]["role"] == "effect_content"
    assert {name for name in graph if data["nodes"][name]["card"] is None} == {
        name for name in graph if graph.nodes[name]["kind"] == "error"
    }


def test_300_nodes_and_2000_edges_with_their_cards_stay_below_8_megabytes(tmp_path):
    random = np.random.default_rng(0)
    graph = make_circuit(random.standard_t(2, 300).tolist())
    graph.remove_edges_from(list(graph.edges)[2000:])
    cards = make_cards(graph)
    context = {"tokens": [" considerable"] * 24, "values": [12.34] * 24, "peak": 15, "in_template": False,
               "population": "toxic", "category": "harassment"}  # fmt: skip
    for card in cards["features"].values():
        card.update(contexts=[context] * 8, firing=[0.1234] * 30, raises=["considerable"] * 6)
    write_page(tmp_path / "page.html", graph, make_curve(), make_result(), cards)
    assert graph.number_of_edges() == 2000
    assert (tmp_path / "page.html").stat().st_size < 8_000_000


def test_a_page_shows_every_figure_and_says_what_is_not_measurable(tmp_path):
    graph = make_circuit(np.linspace(1, -1, 40).tolist(), fingerprint="81bc03aa", versions={"sfc": "0.1.0"})
    write_page(tmp_path / "page.html", graph, make_curve(), make_result(faithfulness=None, n_edges=1234))
    page = Page(tmp_path / "page.html")
    for part in (
        "violence · attribution · smollm2",
        "1,234",
        "6.31",
        "−4.90",
        "F(M\\C)",
        "81bc03aa",
        "sfc 0.1.0",
        "3 %",
    ):
        assert part in page.text, part
    assert page.text.count("not measurable") == 2  # the tile, and the sentence that explains it
    assert sum(tag == "tr" for tag, _ in page.elements) == 31 + 2, "30 nodes and a head; a table of one more figure"
    names = [name for trace in page.data["circuit-data"]["data"] for name in trace.get("ids", ())]
    assert set(names) == set(graph)


def test_a_page_shows_the_approximation_check_and_where_in_the_prompt_effects_come_from(tmp_path):
    check = {
        "top": {"n_nodes": 40, "rank_correlation": 0.9312, "sign_agreement": 0.975, "n_signed": 39},
        "random": {"n_nodes": 40, "rank_correlation": None, "sign_agreement": None, "n_signed": 0},
        "worst_misses": [{"node": "resid_post.21/<b>F7</b>", "fast": 0.25, "exact": -0.125}],
        "noise_floor": 1e-3,
        "n_prompts": 50,
    }
    roles = {"effect_content": "prompt", "effect_suffix_0": "<|im_end|>\n"}
    graph = make_circuit([1.0, -1.0, 0.5], approximation_check=check, roles=roles)
    for node in graph.nodes.values():
        node.update(effect_content=node["effect"] / 4, effect_suffix_0=3 * node["effect"] / 4)
    write_page(tmp_path / "page.html", graph, make_curve(), make_result())
    page = Page(tmp_path / "page.html")
    for text in ("40 nodes of largest |effect|", "0.931", "0.975 of 39", "none to compare", "50 discovery prompts",
                 "resid_post.21/<b>F7</b>", "+0.250", "−0.125", "<|im_end|>↵", "+0.125", "25 %", "75 %"):  # fmt: skip
        assert text in page.text, text
    write_page(tmp_path / "none.html", make_circuit([1.0]), make_curve(), make_result())
    assert "exact ablation" not in Page(tmp_path / "none.html").text


def test_equal_input_makes_equal_bytes_whatever_the_order_of_the_nodes(tmp_path):
    graph = make_circuit(np.linspace(1, -1, 30).tolist())
    backwards = nx.DiGraph(**graph.graph)
    backwards.add_nodes_from(reversed(list(graph.nodes(data=True))))
    backwards.add_edges_from(reversed(list(graph.edges(data=True))))
    for name, circuit in (("a.html", graph), ("b.html", backwards)):
        write_page(tmp_path / name, circuit, make_curve(), make_result())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_the_circuits_page_does_not_import_torch():
    program = "import sys, sfc.pages.circuit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0
