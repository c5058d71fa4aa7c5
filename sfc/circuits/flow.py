"""Where activations go: which sites a site writes directly into, so that edges form a directed acyclic graph.

A block reads the residual stream (`resid_pre`) with its attention, heads (`hook_z`) first and their sum (`attn_out`)
after; what the MLP reads (`resid_mid`) is the stream with that added, and its output (`mlp_out`) makes the next stream
(`resid_post`), which the next block calls `resid_pre`. `resid_mid` is what the MLP reads and no more: an intervention
there leaves the stream that goes around the MLP as it is.

One site writes directly into another where something passes between them without passing a third site in use. With
`attn_out`, `mlp_out` and `resid_post` at every layer these are the edges of Marks et al. 2024: from the stream to
attention, MLP and stream of the next layer, from attention and MLP to the stream of their layer, from attention to the
MLP of its layer.
"""

from collections.abc import Sequence
from functools import cache

import networkx as nx

from sfc.core.sites import layer_of, site_of

Stops = tuple[str, ...]
"""sites in use between two others: what passes through them does not pass directly"""


def downstream(site: str, sites: Sequence[str]) -> list[tuple[str, Stops]]:
    """The sites that this one writes directly into, each with the sites at which other ways there are stopped.

    Args:
        sites: all that are in use, in the order in which the model passes them.
    """
    flow = _flow(max(map(layer_of, sites)))
    others = [other for other in sites if other != site]
    after = nx.descendants(flow, site)
    reached = []
    for other in others:
        if other in after:
            direct = flow.subgraph(set(flow) - set(others) | {other})
            if nx.has_path(direct, site, other):
                stops = after & nx.ancestors(flow, other)
                reached.append((other, tuple(stop for stop in others if stop in stops)))
    return reached


@cache
def _flow(last_layer: int) -> nx.DiGraph:
    """What passes into what: all sites up to a layer, and the streams between attention and MLP, which are no sites."""
    flow = nx.DiGraph()
    for layer in range(last_layer + 1):
        pre, z, attn, mid, mlp, post = (
            site_of(kind, layer) for kind in ("resid_pre", "hook_z", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        stream = f"stream after the attention of layer {layer}"
        nx.add_path(flow, [pre, z, attn, stream, mid, mlp, post])
        nx.add_path(flow, [pre, stream, post])
        if layer > 0:
            flow.add_edge(site_of("resid_post", layer - 1), pre)
    return flow
