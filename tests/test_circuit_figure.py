"""The picture of a circuit: everything is on it, and nothing overlaps."""

import math
from itertools import combinations

import networkx as nx
import numpy as np
import plotly.graph_objects as go
import pytest
from drawn_circuits import HOSTILE, make_cards, make_circuit
from hypothesis import given, settings
from hypothesis import strategies as st

from sfc.pages.graph import circuit_figure, layers_figure
from sfc.pages.placement import PLOT_WIDTH

tokens = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30)), max_size=10)


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
