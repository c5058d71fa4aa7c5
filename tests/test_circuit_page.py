"""A circuit's page: it shows everything, asks for nothing, and no text can break out of it."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import numpy as np
from drawn_circuits import HOSTILE, make_cards, make_circuit, make_curve, make_result, write_page
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

tokens = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30)), max_size=10)


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
        "0.031",
    ):
        assert part in page.text, part
    assert page.text.count("not measurable") == 2  # the tile, and the sentence that explains it
    assert sum(tag == "tr" for tag, _ in page.elements) == 31 + 8, "30 nodes and a head; a table of seven more figures"
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
