"""What a node is called elsewhere: DICTIONARY/INDEX, where a dictionary has several names.

`resid_post.21/F12`, `blocks.21.hook_resid_post/12`, `21/F12` (the only dictionary of layer 21),
`gpt2-small-res-jb/blocks.6.hook_resid_pre/650` (SAELens' release/sae_id) and `gpt2-small/6-res-jb/650` (Neuronpedia's
model/source) may all be nodes; `…/error` is the error node.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfc.ablation.nodes import Nodes
from sfc.artifacts import read_json
from sfc.circuits.listed import ListedCircuit
from sfc.errors import UserError
from sfc.saes.saelens_config import CONFIG_FILE
from sfc.saes.source import for_layer
from sfc.sites import layer_of, short_site

_WEBSITE = re.compile(r"https?://(www\.)?neuronpedia\.org/")


@dataclass(frozen=True)
class DictionaryNames:
    """What the dictionaries in use are called."""

    sites: Mapping[str, str]
    """the site of a dictionary by each of its names"""
    together: frozenset[str]
    """names of all of them as one"""

    @classmethod
    def of(cls, folder: Path, sites: Sequence[str], source: str | None) -> "DictionaryNames":
        """The names of the dictionaries in `folder`, which were taken from `source` unless they were trained.

        Raises:
            UserError: a configuration is missing or damaged.
        """
        names: dict[str, str] = {}
        per_layer = Counter(layer_of(site) for site in sites)
        for site in sites:
            config = read_json(folder / site / CONFIG_FILE)
            also = [config.get("neuronpedia_id"), config.get("metadata", {}).get("neuronpedia_id")]
            also += [source and for_layer(source, site), per_layer[layer_of(site)] == 1 and str(layer_of(site))]
            names |= {name: site for name in (site, short_site(site), *also) if name}
        return cls(names, frozenset({folder.name, *([source] if source else [])}))

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
        feature = within if within == "error" else "F" + within.removeprefix("F")
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
