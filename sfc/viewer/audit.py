"""Two small tables beside a circuit: how far its effects can be trusted, and where in the prompt they come from."""

import math
from collections.abc import Mapping
from typing import Any

import networkx as nx

from sfc.viewer.table import figures_table
from sfc.viewer.text import number_text, printable

_GROUPS = {"top": "nodes of largest |effect|", "random": "random active nodes"}


def audit_html(graph: nx.DiGraph) -> str:
    """The audit of the circuit's effects against exact ones; nothing where the circuit carries none."""
    audit = graph.graph.get("audit")
    if not audit:
        return ""
    groups = figures_table(
        ("measured", "rank correlation", "equal signs"), [_group(audit[key], name) for key, name in _GROUPS.items()]
    )
    misses = figures_table(
        ("worst misses", "effect", "exact"),
        [
            (printable(miss["node"]), number_text(miss["fast"], signed=True), number_text(miss["exact"], signed=True))
            for miss in audit["worst_misses"]
        ],
    )
    return (
        '<section class="card scroll"><h2>Effects against exact ablation of single nodes</h2>'
        f"<p>Means over {audit['n_prompts']:,} discovery prompts. Signs are compared where the exact effect exceeds "
        f"{number_text(audit['noise_floor'])} nats.</p>{groups}{misses if audit['worst_misses'] else ''}</section>"
    )


def roles_html(graph: nx.DiGraph) -> str:
    """Where in the prompt the circuit's nodes matter; nothing where its method does not say."""
    roles = graph.graph.get("roles")
    if not roles:
        return ""
    parts = {key: [data[key] for _, data in graph.nodes(data=True) if key in data] for key in roles}
    # fsum, so that the order of the nodes does not matter.
    sizes = {key: math.fsum(map(abs, values)) for key, values in parts.items()}
    total = math.fsum(sizes.values())
    rows = [
        (printable(name), number_text(math.fsum(parts[key]), signed=True), _share(sizes[key], total))
        for key, name in roles.items()
    ]
    return (
        '<section class="card scroll"><h2>Where in the prompt</h2>'
        f"{figures_table(('tokens', 'sum of effects', 'share of |effects|'), rows)}</section>"
    )


def _group(group: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    signs = (
        f"{number_text(group['sign_agreement'])} of {group['n_signed']:,}" if group["n_signed"] else "none to compare"
    )
    return f"{group['n_nodes']:,} {name}", number_text(group["rank_correlation"], signed=True), signs


def _share(part: float, total: float) -> str:
    return f"{100 * part / total:.0f} %" if total > 0 else number_text(None)
