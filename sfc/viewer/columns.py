"""The columns of the picture: one per site of the experiment, from the first layer to the last."""

import re
from typing import NamedTuple

import networkx as nx

from sfc.viewer.text import hover_text

_SITE = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


class Columns(NamedTuple):
    """The sites from left to right, and what is written under them."""

    sites: list[str]
    labels: list[str]
    title: str

    def number(self, site: str) -> int:
        """Which column a site is, counted from 0."""
        return self.sites.index(site)


def columns_of(graph: nx.DiGraph) -> Columns:
    """All sites of the experiment (`graph.graph["sites"]`), even empty ones; then any others the nodes name."""
    sites = list(graph.graph.get("sites", ()))
    layer_of_site = {data["site"]: data["layer"] for _, data in graph.nodes(data=True)}
    sites += sorted(layer_of_site.keys() - set(sites), key=lambda site: (layer_of_site[site], site))
    return columns_of_sites(sites)


def columns_of_sites(sites: list[str]) -> Columns:
    """A column for each site, labelled with its layer alone where all sites are of one kind."""
    matches = [_SITE.fullmatch(site) for site in sites]
    kinds = {match[2] for match in matches if match}
    if len(kinds) == 1 and all(matches):
        return Columns(sites, [match[1] for match in matches if match], f"layer ({kinds.pop()})")
    labels = [
        f"{match[1]}<br>{match[2]}" if match else hover_text(site) for match, site in zip(matches, sites, strict=True)
    ]
    return Columns(sites, labels, "layer and site")
