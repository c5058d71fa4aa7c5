"""The picture of a circuit by position: what acts at which tokens, and what passes from which to which."""

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from drawn_circuits import HOSTILE, make_cards, make_circuit, make_curve, make_result, write_page
from test_circuit_page import Page

from sfc.pages.blocks import Figure, Table
from sfc.pages.roles import role_blocks, roles_figure

ROLES = {
    "effect_prefix": "template before the prompt",
    "effect_content": "prompt",
    "effect_suffix_0": "<|im_end|>",
    "effect_suffix_1": "\n",
    "effect_suffix_2": "\n",
}


def _circuit(roles: dict[str, str] = ROLES) -> nx.DiGraph:
    """Six nodes at three layers; of every effect a quarter is of the prompt, the rest of the template's last tokens."""
    graph = make_circuit([2.0, -1.0, 0.5, 1.0, -0.5, 0.25], [0, 0, 1, 1, 2, 2], 3, roles=roles)
    for data in graph.nodes.values():
        data.update(effect_prefix=0.0, effect_content=data["effect"] / 4, effect_suffix_2=data["effect"] / 2)
        data.update(effect_suffix_0=0.0, effect_suffix_1=data["effect"] / 4)
    for _, _, data in graph.edges(data=True):
        data.update(weight_content_to_suffix_1=data["weight"] / 4, weight_suffix_2_to_suffix_2=3 * data["weight"] / 4)
    return graph


def _rows(graph: nx.DiGraph, cards: dict[str, Any] | None = None) -> tuple[Table, Table]:
    figure, fed = role_blocks(graph, cards or {})
    assert isinstance(figure, Figure) and figure.table is not None and isinstance(fed, Table)
    return figure.table, fed


def test_rows_are_the_roles_that_act_and_columns_the_sites() -> None:
    figure = roles_figure(_circuit()).to_dict()
    assert list(figure["layout"]["yaxis"]["ticktext"]) == ["prompt", "“↵” −2", "“↵” −1"]
    assert list(figure["layout"]["xaxis"]["ticktext"]) == ["19", "20", "21"]
    cells = [trace for trace in figure["data"] if trace["mode"] == "markers" and "hovertext" in trace]
    cells = [trace for trace in cells if trace.get("meta") is None]
    placed = {(x, y): size for t in cells for x, y, size in zip(t["x"], t["y"], t["marker"]["size"], strict=True)}
    assert set(placed) == {(x, -y) for x in range(3) for y in range(3)}
    # The area is the sum of |effects|: of layer 19, 3/4 at each of two rows and 3/2 at the last.
    assert placed[0, -2] ** 2 == pytest.approx(2 * placed[0, 0] ** 2)
    hovers = " ".join(text for trace in cells for text in trace["hovertext"])
    assert "<b>“↵” −1, 19</b><br>2 nodes, effects +0.500 nats of refusal score together" in hovers
    assert "resid_post.19/F0 +1.00<br>resid_post.19/F1 −0.500" in hovers


def test_lines_are_sums_over_the_edges_drawn_and_the_tables_say_the_same() -> None:
    graph = _circuit()
    weights = np.array([data["weight"] for *_, data in graph.edges(data=True)])
    between, fed = _rows(graph, make_cards(graph)["features"])
    assert [row[:2] for row in between.rows] == [("prompt", "“↵” −2"), ("“↵” −1", "“↵” −1")]
    assert [row[3] for row in between.rows] == ["25 %", "75 %"]
    assert float(between.rows[0][2]) == pytest.approx(weights.sum() / 4, rel=2e-3)
    strongest = max(graph.edges, key=lambda edge: abs(graph.edges[edge]["weight"]))
    assert fed.rows[0][0] == strongest[0] and fed.rows[0][4] == "“↵” −2" and fed.rows[0][1]
    figure = roles_figure(graph).to_dict()
    joined = [
        text
        for trace in figure["data"]
        if (trace.get("meta") or {}).get("part") == "edge hovers"
        for text in trace["hovertext"]
    ]
    assert len(joined) == 4, "two layers to the next, each by two ways"
    assert any("<b>prompt, 19</b> → <b>“↵” −2, 20</b>" in text for text in joined)


def test_where_one_role_acts_or_none_there_is_no_picture() -> None:
    assert role_blocks(make_circuit([1.0, 2.0]), {}) == []
    graph = make_circuit([1.0, 2.0], roles={"effect_content": "prompt"})
    nx.set_node_attributes(graph, 1.0, "effect_content")
    assert role_blocks(graph, {}) == []
    graph = _circuit()
    graph.remove_edges_from(list(graph.edges))
    (figure,) = role_blocks(graph, {})
    assert isinstance(figure, Figure) and len(figure.draw().to_dict()["data"]) == 2


def test_the_page_has_it_and_no_token_becomes_markup(tmp_path: Path) -> None:
    roles = dict(zip(ROLES, HOSTILE, strict=False))
    plain, hostile = _circuit(), _circuit(roles)
    tags = []
    for number, graph in enumerate((plain, hostile)):
        write_page(tmp_path / f"{number}.html", graph, make_curve(), make_result(), make_cards(graph))
        page = Page(tmp_path / f"{number}.html")
        assert "roles-data" in page.data and "What features of the prompt's own tokens feed" in page.text
        tags.append({(tag, tuple(attributes)) for tag, attributes in page.elements})
    assert tags[0] == tags[1]
