"""Circuits as files: networkx's node-link JSON, and the formats of other programs. No torch here.

`graphml` and `gexf` (Gephi, Cytoscape, networkx), `csv` (a table of nodes and one of edges), and `circuit-tracer`: the
graph JSON of circuit-tracer and Neuronpedia, with metadata, qParams, nodes and links as their schema has them.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd

from sfc.circuits.nodes import ERROR, FEATURE
from sfc.core.artifacts import read_json, replacing, write_csv, write_json
from sfc.core.errors import UserError, suggestion
from sfc.core.reading import read_text
from sfc.core.sites import kind_of


def save_circuit(graph: nx.DiGraph, path: Path) -> None:
    """Write a circuit as networkx' own node-link JSON."""
    write_json(path, nx.node_link_data(graph, edges="edges"))


def load_circuit(path: Path) -> nx.DiGraph:
    """Read a circuit from node-link JSON.

    Raises:
        UserError: the file is missing, not JSON, or not a directed acyclic graph with named nodes.
    """
    data = read_json(path)
    try:
        graph = nx.node_link_graph(data, directed=True, multigraph=False, edges="edges")
    except (nx.NetworkXError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a circuit in node-link JSON ({error!r})") from None
    acyclic = nx.is_directed_acyclic_graph(graph) and not graph.is_multigraph() and isinstance(graph.graph, dict)
    if not acyclic or not all(isinstance(node, str) for node in graph):
        raise UserError(f"{path} is not a circuit: it must be a directed graph without cycles, with named nodes")
    if len(graph) != len(data["nodes"]):
        raise UserError(f"{path} is not a circuit: a node is listed twice, or an edge joins an unlisted node")
    return graph


Labels = Mapping[str, str]
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def export_circuit(graph: nx.DiGraph, labels: Labels, formats: list[str], folder: Path) -> dict[str, Path]:
    """Write a circuit into `folder` in each of these formats, `circuit.gexf` and the like.

    Args:
        labels: of its features, by node.

    Returns:
        The files by name.

    Raises:
        UserError: there is no such format, or it cannot hold this circuit.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UserError(f"no format {unknown[0]!r}: {suggestion(unknown[0], FORMATS)}")
    labelled = _flat(graph, labels)
    return {name: path for format in formats for name, path in FORMATS[format](labelled, folder).items()}


def _xml(suffix: str, write: Callable[[nx.DiGraph, Path], None], graph: nx.DiGraph, folder: Path) -> dict[str, Path]:
    path = folder / f"circuit.{suffix}"
    with replacing(path) as temporary:
        write(_plain(graph), temporary)
    return {suffix: path}


def _csv(graph: nx.DiGraph, folder: Path) -> dict[str, Path]:
    nodes = pd.DataFrame([{"node": name, **data} for name, data in _plain(graph).nodes(data=True)])
    edges = pd.DataFrame(
        [{"source": source, "target": target, **data} for source, target, data in graph.edges(data=True)],
        columns=["source", "target", "weight", "absolute_weight"],
    )
    paths = {"nodes": folder / "nodes.csv", "edges": folder / "edges.csv"}
    for name, frame in (("nodes", nodes), ("edges", edges)):
        write_csv(paths[name], frame)
    return paths


def for_spreadsheets(tables: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Copies of CSV files in which no cell is a formula; by the tables' names.

    A cell that begins as a formula does, and is no number, gets an apostrophe before it, as OWASP advises: prompts,
    replies and labels are written by others, and a spreadsheet would run what they begin with `=`, `+`, `-` or `@`.

    Raises:
        UserError: a table cannot be read.
    """
    copies = {path.stem: folder / path.name for path in tables}
    for path in tables:
        try:
            rows = [[_no_formula(cell) for cell in row] for row in csv.reader(io.StringIO(read_text(path), newline=""))]
        except csv.Error as error:
            raise UserError(f"{path} is not a table ({error}); make it again with --rebuild") from None
        with replacing(folder / path.name) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    return copies


def _no_formula(cell: str) -> str:
    try:
        float(cell)
    except ValueError:
        return f"'{cell}" if cell.lstrip()[:1] in tuple("=+-@") or cell[:1] in ("\t", "\r", "\n") else cell
    return cell


def _circuit_tracer(graph: nx.DiGraph, folder: Path) -> dict[str, Path]:
    path = folder / "circuit-tracer.json"
    write_json(path, circuit_tracer_graph(graph))
    return {"circuit-tracer": path}


FORMATS: dict[str, Callable[[nx.DiGraph, Path], dict[str, Path]]] = {
    "graphml": partial(_xml, "graphml", nx.write_graphml),
    "gexf": partial(_xml, "gexf", nx.write_gexf),
    "csv": _csv,
    "circuit-tracer": _circuit_tracer,
}
"""Functions that write a circuit, whose nodes have a `label`, into a folder, and say which files these are."""


def circuit_tracer_graph(graph: nx.DiGraph) -> dict[str, Any]:
    """The graph JSON of circuit-tracer and Neuronpedia.

    Their graphs are of one prompt, ours of many: in place of its tokens stand the roles (the prompt, and each template
    token after it), and a node stands where most of its effect comes from. The one output is the score; links
    to it are from the nodes of the last site and carry their effects. A node's `influence` is, as theirs, the share of
    all |effects| that nodes at least as strong have together.

    Raises:
        UserError: a layer has several dictionaries, which node names of this format cannot tell apart.
    """
    sites = list(dict.fromkeys(graph.graph.get("sites") or sorted({d["site"] for _, d in graph.nodes(data=True)})))
    if len({kind_of(site) for site in sites}) > 1:
        raise UserError("circuit-tracer's graphs have one dictionary a layer; here sites are of several kinds")
    roles = graph.graph.get("roles") or {"effect": "prompt"}
    nodes = {name: _tracer_node(name, data, list(roles)) for name, data in graph.nodes(data=True)}
    strongest = sorted(graph, key=lambda name: -abs(graph.nodes[name]["effect"]))
    total, passed = sum(abs(graph.nodes[name]["effect"]) for name in graph) or 1.0, 0.0
    for name in strongest:
        passed += abs(graph.nodes[name]["effect"])
        nodes[name]["influence"] = min(1.0, passed / total)
    output = _score_node(graph, len(roles) - 1)
    last = [name for name in graph if sites and graph.nodes[name]["site"] == sites[-1]]
    return {
        "metadata": _tracer_metadata(graph, list(roles.values())),
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [*nodes.values(), output],
        "links": [
            *(
                {"source": nodes[source]["node_id"], "target": nodes[target]["node_id"], "weight": weight}
                for source, target, weight in graph.edges(data="weight", default=0.0)
            ),
            *(
                {"source": nodes[name]["node_id"], "target": output["node_id"], "weight": graph.nodes[name]["effect"]}
                for name in last
            ),
        ],
    }


def _tracer_node(name: str, data: Mapping[str, Any], roles: list[str]) -> dict[str, Any]:
    layer = int(data["layer"])
    position = max(range(len(roles)), key=lambda i: abs(data.get(roles[i], 0.0)))
    is_feature = data["kind"] == FEATURE
    feature = int(name.rpartition("/F")[2]) if is_feature else -1
    # Theirs has an error and nothing else beside features: other parts are errors with numbers of their own.
    part = 0 if data["kind"] == ERROR else 1
    # The two numbers that name a feature of theirs are paired into one by Cantor's function.
    paired = (layer + feature) * (layer + feature + 1) // 2 + feature
    return {
        "node_id": f"{layer}_{feature}_{position}" if is_feature else f"{part}_{layer}_{position}",
        "feature": paired if is_feature else -1,
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": "cross layer transcoder" if is_feature else "mlp reconstruction error",
        "jsNodeId": f"{layer}_{feature if is_feature else data['kind']}-0",
        "clerp": str(data["label"]),
    }


def _score_node(graph: nx.DiGraph, position: int) -> dict[str, Any]:
    layer = str(max((int(data["layer"]) for _, data in graph.nodes(data=True)), default=0) + 1)
    return {
        "node_id": f"{layer}_0_{position}",
        "feature": 0,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": "logit",
        "jsNodeId": f"L_0-{position}",
        "clerp": graph.graph.get("words", {}).get("score", "score"),
        "is_target_logit": True,
        "token_prob": 1.0,
    }


def _tracer_metadata(graph: nx.DiGraph, tokens: list[str]) -> dict[str, Any]:
    facts = graph.graph
    model = str(facts.get("experiment", {}).get("model", {}).get("source", "unknown"))
    parts = [str(facts.get(key, "circuit")) for key in ("category", "method", "fingerprint")]
    return {
        "slug": "-".join(parts),
        "scan": model,
        "transcoder_list": [],
        "prompt_tokens": [str(token) for token in tokens],
        "prompt": "".join(str(token) for token in tokens),
        "info": {
            "description": f"{parts[0]} prompts, {parts[1]}; edges: {facts.get('edge_weight', 'unknown')}",
            "generator": {"name": "sfc"},
        },
        "generation_settings": {key: str(facts[key]) for key in ("method", "edges", "baseline") if key in facts},
    }


def _flat(graph: nx.DiGraph, labels: Labels) -> nx.DiGraph:
    """The circuit with a label at every node: its own, or the node's name."""
    labelled = graph.copy()
    for name, data in labelled.nodes(data=True):
        data["label"] = _storable(labels.get(name, name))
    return labelled


def _plain(graph: nx.DiGraph) -> nx.DiGraph:
    """Nodes and edges with plain values alone, as XML and CSV want them: lists of tokens are joined."""
    plain = nx.DiGraph()
    for name, data in graph.nodes(data=True):
        values = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in data.items()}
        plain.add_node(name, **{key: _storable(value) for key, value in values.items()})
    plain.add_edges_from(graph.edges(data=True))
    return plain


def _storable(value: Any) -> Any:
    """Text without the characters that XML 1.0 cannot hold."""
    if not isinstance(value, str):
        return value
    return _NOT_IN_XML.sub("�", value)
