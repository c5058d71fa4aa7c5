"""A circuit: a networkx graph of nodes and edges with their effects, and the provenance needed to reproduce it.

Nodes carry `site`, `layer`, `kind` (`feature`, `error`, `head`, …), `effect`, `absolute_effect`, `rank` and what else
the method says about them; edges carry `weight` and `absolute_weight`. Facts about the whole circuit, among them what
`edge_weight` is, are the graph's own attributes.

A node's effect has parts by role, which say where in the prompt it matters: from the template before the prompt, from
the prompt, and from each template token after it, where a chat model gathers what it is about to say. The weight of an
edge by attribution has parts as well, from tokens of one role to tokens of another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
from jaxtyping import Float

from sfc.circuits.edge_kinds import Edge
from sfc.circuits.methods import Effects
from sfc.circuits.nodes import Nodes
from sfc.core.sites import layer_of
from sfc.models.batches import Batch, TemplateLayout
from sfc.models.loading import Model


def effects_by_role(
    by_position: Float[np.ndarray, "positions nodes"], layout: TemplateLayout
) -> dict[str, Float[np.ndarray, " nodes"]]:
    """`effect_prefix`, `effect_content`, `effect_suffix_0`, …: parts of the effect that sum to the whole."""
    of_roles = [by_position[: layout.n_prefix].sum(0), *by_position[layout.n_prefix :]]
    return {f"effect_{role}": part for role, part in zip(layout.roles, of_roles, strict=True)}


def role_names(model: Model, batches: Sequence[Batch], layout: TemplateLayout) -> dict[str, str]:
    """For each attribute of `effects_by_role`, what it stands for: the tokens after the prompt by their text.

    Where that is not the same in all prompts, they are counted from the end: -1 is the last.
    """
    names = {"effect_prefix": "template before the prompt", "effect_content": "prompt"}
    for number in range(layout.n_suffix):
        place = layout.n_prefix + 1 + number
        ids = {
            int(i)
            for b in batches
            for i in b.ids[b.touchable & (b.template_positions % layout.n_template_positions == place)].unique()
        }
        names[f"effect_suffix_{number}"] = (
            model.tokenizer.decode(list(ids)) if len(ids) == 1 else f"token {number - layout.n_suffix} from the end"
        )
    return names


def build_circuit(
    nodes: Nodes,
    effects: Effects,
    members: Sequence[int],
    edges: Sequence[Edge],
    provenance: Mapping[str, Any],
) -> nx.DiGraph:
    """The graph of the member nodes and the edges between them."""
    graph = nx.DiGraph(**provenance)
    site_numbers = nodes.site_numbers
    for rank, node in enumerate(members):
        site = nodes.sites[site_numbers[node]]
        graph.add_node(
            nodes.name(node),
            site=site,
            layer=layer_of(site),
            kind=nodes.kind(node),
            rank=rank,
            effect=float(effects.effect[node]),
            absolute_effect=float(effects.absolute[node]),
            **{name: float(values[node]) for name, values in effects.attributes.items()},
        )
    for source, target, weight, absolute, by_role in edges:
        graph.add_edge(nodes.name(source), nodes.name(target), weight=weight, absolute_weight=absolute, **by_role)
    return graph
