"""Circuits that others found, read from their files: which nodes, by whatever name, and in which order.

Read are

- our own `circuit.json` (networkx' node-link JSON);
- lists in JSON or CSV: names, or records with a name (`node`, `name` or `id`, or Neuronpedia's `modelId`, `source` or
  `layer`, and `index`) and, if the list is ranked, a `rank` (the smallest is the best) or an `effect` (the largest in
  size is the best); in JSON also below the key `nodes`, with pairs of names below `edges`;
- graph files of circuit-tracer: its features and errors, each once however many tokens it stands at, ranked by
  `influence` where all have it (cumulative there: the smallest is the best). Embeddings and logits are not nodes here.

What a node is called elsewhere: DICTIONARY/INDEX, where a dictionary has several names.

`resid_post.21/F12`, `blocks.21.hook_resid_post/12`, `21/F12` (the only dictionary of layer 21),
`gpt2-small-res-jb/blocks.6.hook_resid_pre/650` (SAELens' release/sae_id) and `gpt2-small/6-res-jb/650` (Neuronpedia's
model/source) may all be nodes; `…/error` is the error node.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sfc.circuits.files import load_circuit
from sfc.circuits.nodes import Nodes
from sfc.core.artifacts import read_json
from sfc.core.config import Source
from sfc.core.errors import UserError
from sfc.core.reading import read_text
from sfc.core.sites import layer_of, short_site
from sfc.saes.architectures import CONFIG_FILE
from sfc.saes.source import source_of

_NAME_KEYS = ("node", "name", "id")
_SOURCE_KEYS = ("source", "sourceId", "layer")
_TRACER_FEATURE, _TRACER_ERROR = "transcoder", "error"
_TRACER_IGNORED = ("embedding", "logit")


class ListedCircuit(NamedTuple):
    """A circuit as its file gives it."""

    format: str
    """what the file was read as"""
    nodes: tuple[str, ...]
    """names, each once; best first where the circuit is ranked"""
    is_ranked: bool
    edges: tuple[tuple[str, str], ...] = ()
    dictionaries: tuple[str, ...] = ()
    """what the file calls the dictionaries it was made with, if it says"""


def read_listed(path: Path) -> ListedCircuit:
    """Read a circuit from a file.

    Raises:
        UserError: the file is missing, of no known form, names no nodes, or names one twice.
    """
    if path.suffix.lower() == ".csv":
        listed = _from_records(_csv_records(path), path)
    elif path.suffix.lower() == ".json":
        listed = _from_json(path)
    else:
        raise UserError(f"{path} is neither .json nor .csv")
    if not listed.nodes:
        raise UserError(f"{path} names no nodes")
    return listed


def _from_json(path: Path) -> ListedCircuit:
    data = read_json(path)
    if isinstance(data, list):
        return _from_records(data, path)
    nodes = data.get("nodes") if isinstance(data, dict) else None
    if not isinstance(nodes, list):
        raise UserError(f"{path} is not a circuit: expected a list of nodes, or an object with 'nodes'")
    if "directed" in data:
        graph = load_circuit(path)
        ranked = all("rank" in attributes for _, attributes in graph.nodes(data=True))
        names = sorted(graph, key=lambda name: graph.nodes[name]["rank"]) if ranked else list(graph)
        return ListedCircuit("circuit of sfc", tuple(names), ranked, tuple(graph.edges))
    if any(isinstance(node, dict) and "feature_type" in node for node in nodes):
        return _from_tracer(data, nodes, path)
    return _from_records(nodes, path)._replace(edges=_pairs(data.get("edges", []), path))


def _csv_records(path: Path) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error})") from None


def _from_records(records: Sequence[Any], path: Path) -> ListedCircuit:
    names, importances = [], []
    for number, record in enumerate(records, 1):
        where = f"{path}, node {number}"
        fields = {"node": record} if isinstance(record, str) else record
        if not isinstance(fields, Mapping):
            raise UserError(f"{where}: expected a name or a record with one, not {record!r}")
        names.append(_name(fields, where))
        importances.append(_importance(fields, where))
    if len(set(names)) < len(names):
        raise UserError(f"{path} names {next(name for name in names if names.count(name) > 1)!r} twice")
    return _ranked("list of nodes", names, importances, path)


def _name(fields: Mapping[str, Any], where: str) -> str:
    for key in _NAME_KEYS:
        if fields.get(key):
            return str(fields[key]).strip()
    source = next((fields[key] for key in _SOURCE_KEYS if fields.get(key)), None)
    if source is not None and fields.get("modelId") and fields.get("index") not in (None, ""):
        return f"{fields['modelId']}/{source}/{fields['index']}"
    raise UserError(f"{where} has no name: expected node, name or id, or modelId, source and index")


def _importance(fields: Mapping[str, Any], where: str) -> float | None:
    """What a node is ranked by, smaller being better; None where nothing is said."""
    for key, sign in (("rank", 1), ("effect", -1)):
        if fields.get(key) not in (None, ""):
            value = _number(fields[key], f"{where}: {key}")
            return value if sign > 0 else -abs(value)
    return None


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{what} must be a number, not {value!r}")
    return number


def _ranked(form: str, names: Sequence[str], importances: Sequence[float | None], path: Path) -> ListedCircuit:
    given = [importance for importance in importances if importance is not None]
    if 0 < len(given) < len(names):
        raise UserError(f"{path} ranks {len(given)} of {len(names)} nodes: give all a rank or effect, or none")
    if not given:
        return ListedCircuit(form, tuple(names), False)
    order = sorted(range(len(names)), key=lambda i: given[i])
    return ListedCircuit(form, tuple(names[i] for i in order), True)


def _pairs(edges: Any, path: Path) -> tuple[tuple[str, str], ...]:
    pairs = []
    for edge in edges if isinstance(edges, list) else [edges]:
        ends = (edge.get("source"), edge.get("target")) if isinstance(edge, dict) else edge
        if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(isinstance(end, str) for end in ends)):
            raise UserError(f"{path}: an edge is a pair of names, or a record with source and target, not {edge!r}")
        pairs.append((ends[0], ends[1]))
    return tuple(pairs)


def _from_tracer(data: Mapping[str, Any], nodes: Sequence[Any], path: Path) -> ListedCircuit:
    """circuit-tracer's graph: a node is `LAYER_FEATURE_POSITION`, an error `LAYER_…`, at one token each."""
    best: dict[str, float | None] = {}
    name_of: dict[str, str] = {}
    for number, node in enumerate(nodes, 1):
        where = f"{path}, node {number}"
        if not isinstance(node, dict) or not isinstance(node.get("node_id"), str):
            raise UserError(f"{where} has no node_id: not a graph file of circuit-tracer")
        kind = str(node.get("feature_type"))
        if kind in _TRACER_IGNORED:
            continue
        name = name_of[node["node_id"]] = _tracer_name(node["node_id"], kind, where)
        influence = node.get("influence")
        known = [value for value in (best.get(name), influence) if value is not None]
        best[name] = min(_number(value, f"{where}: influence") for value in known) if known else None
    # A node without influence is not known to matter less than one with it: then there is no ranking.
    importances = list(best.values()) if None not in best.values() else [None] * len(best)
    listed = _ranked("graph of circuit-tracer", list(best), importances, path)
    links = [link for link in data.get("links", []) if isinstance(link, dict)]
    ends = ((name_of.get(link.get("source", "")), name_of.get(link.get("target", ""))) for link in links)
    edges = dict.fromkeys((source, target) for source, target in ends if source and target)
    return listed._replace(edges=tuple(edges), dictionaries=_tracer_dictionaries(data.get("metadata")))


def _tracer_name(node_id: str, kind: str, where: str) -> str:
    layer, _, rest = node_id.partition("_")
    feature = rest.partition("_")[0]
    if layer.isdecimal() and _TRACER_ERROR in kind:
        return f"{layer}/error"
    if layer.isdecimal() and feature.isdecimal() and _TRACER_FEATURE in kind:
        return f"{layer}/F{feature}"
    raise UserError(f"{where}: {node_id!r} of type {kind!r} is neither a feature, LAYER_FEATURE_POSITION, nor an error")


def _tracer_dictionaries(metadata: Any) -> tuple[str, ...]:
    if not isinstance(metadata, dict):
        return ()
    listed = metadata.get("transcoder_list") or [metadata.get("scan")]
    return tuple(str(name) for name in listed if name)


_WEBSITE = re.compile(r"https?://(www\.)?neuronpedia\.org/")


@dataclass(frozen=True)
class DictionaryNames:
    """What the dictionaries in use are called."""

    sites: Mapping[str, str]
    """the site of a dictionary by each of its names"""
    together: frozenset[str]
    """names of all of them as one"""

    @classmethod
    def of(cls, folder: Path, sites: Sequence[str], source: Source | None) -> "DictionaryNames":
        """The names of the dictionaries in `folder`, which were taken from `source` unless they were trained.

        Raises:
            UserError: a configuration is missing or damaged.
        """
        names: dict[str, str] = {}
        as_one = [] if source is None else [source] if isinstance(source, str) else source.values()
        per_layer = Counter(layer_of(site) for site in sites)
        for site in sites:
            config = read_json(folder / site / CONFIG_FILE)
            also = [config.get("neuronpedia_id"), config.get("metadata", {}).get("neuronpedia_id")]
            also += [source and source_of(source, site), per_layer[layer_of(site)] == 1 and str(layer_of(site))]
            names |= {name: site for name in (site, short_site(site), *also) if name}
        return cls(names, frozenset({folder.name, *as_one}))

    def node(self, name: str, nodes: Nodes) -> int:
        """The node that a name means.

        Raises:
            UserError: its dictionary is not in use, or has no such feature.
        """
        dictionary, _, within = _WEBSITE.sub("", name).rpartition("/")
        site = self.sites.get(dictionary)
        if site is None:
            raise UserError(
                f"node {name!r} is of the dictionary {dictionary!r}, which is not in use; in use are"
                f" {', '.join(map(short_site, nodes.sites))}{self._known_elsewhere()}: choose others with"
                " --set saes.source=… and --set activations.layers=[…]"
            )
        is_part = within in {kind for kinds in nodes.kinds for kind in kinds}
        feature = within if is_part else "F" + within.removeprefix("F")
        return nodes.number(f"{short_site(site)}/{feature}")

    def _known_elsewhere(self) -> str:
        elsewhere = [name for name, site in self.sites.items() if "/" in name and name != site]
        return f" (also called {', '.join(elsewhere)})" if elsewhere else ""

    def check_made_with(self, dictionaries: Sequence[str]) -> None:
        """Refuse a circuit whose file calls its dictionaries by names that those in use do not have.

        Raises:
            UserError: it does.
        """
        unknown = [name for name in dictionaries if name not in self.sites and name not in self.together]
        if unknown:
            raise UserError(
                f"the graph's features are of {unknown[0]!r}, which is not in use: feature numbers mean nothing in"
                f" another dictionary. If they are those of {sorted(self.together)[0]}, write this name in its"
                " metadata.scan; else take its dictionaries with --set saes.source=…"
            )


def numbered(listed: ListedCircuit, names: DictionaryNames, nodes: Nodes) -> tuple[list[int], list[tuple[int, int]]]:
    """The circuit's nodes and edges by their numbers, in its order.

    Raises:
        UserError: a dictionary is not in use, a node does not exist or is named twice, or an edge joins unlisted nodes.
    """
    names.check_made_with(listed.dictionaries)
    numbers = {name: names.node(name, nodes) for name in listed.nodes}
    first_of: dict[int, str] = {}
    for name, number in numbers.items():
        if first_of.setdefault(number, name) != name:
            raise UserError(f"{first_of[number]!r} and {name!r} are the same node")
    for end in (end for edge in listed.edges for end in edge):
        if end not in numbers:
            raise UserError(f"an edge joins {end!r}, which is not among the nodes")
    return list(numbers.values()), [(numbers[source], numbers[target]) for source, target in listed.edges]
