"""Do the methods find the circuit that is there?

*Kinds.* Tiny transformers in which known features cause a logit difference through known edges, among distractors that
fire with the label just as well and cause nothing, or act on other logits. A circuit counts as planted only if exact
ablation agrees: each of its nodes, ablated alone or after the circuit's others at its site, moves the score at least
ten times as far as any other node, and as all others together.

Nodes are judged among all nodes, edges among all pairs of nodes at neighbouring sites. Precision and recall are those
of as many nodes or edges as are planted; a method that names fewer can have them differ.

*Cheats.* Models in which a constant refusal can be built from offsets (`planted_cheats`).

*Learned dictionaries.* Models that hold more known features than they have dimensions, and dictionaries that learn them
from activations alone (`planted_learned`).

Circuits of the last two are the smallest that reach 0.9 on discovery prompts, and their figures are of test prompts.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
import planted_cheats
import planted_learned
from jaxtyping import Bool, Float
from planted_circuits import HARD, KINDS, UNSATURATED
from planted_problems import Planted, exact_margin, plant
from planted_proofs import figures_of, means, table

from sfc.circuits.edge_kinds import EDGES
from sfc.circuits.methods import METHODS
from sfc.core.progress import say
from sfc.models.score import auroc

SEEDS, QUICK_SEEDS = 20, 1
CHEAT_SEEDS, QUICK_CHEAT_SEEDS = 3, 1
CHEAT_METHODS = METHODS.names()
LEARNED_KINDS = ("and",)
BY_CORRELATION = tuple(method.name for method in METHODS if not method.causal)
"""methods whose circuits have correlation edges; the others' edges are those of attribution"""
MINIMAL = ("refusal-direction", "greedy-filtering")
"""methods that rank only what the score cannot do without, not all that takes part"""

_BOUND = "past the bound the gradient is 0, and with it the effect of all that lies before"
_BACKUP = "a backup does nothing while what it backs up is there"
_OFF = "into a feature that is off a dictionary has no gradient: what would switch it on counts as an edge to the error"
WHY = {
    ("or", "node", "attribution"): _BOUND,
    ("or", "edge", "attribution"): _BOUND,
    ("or", "node", "relevance"): _BOUND,
    ("backup", "node", "relevance"): _BACKUP,
    ("saturated and", "node", "relevance"): _BOUND,
    ("or", "node", "exact"): "one source suffices, so that neither is missed alone",
    ("backup", "node", "attribution"): _BACKUP,
    ("backup", "edge", "attribution"): _BACKUP,
    ("backup", "node", "integrated-gradients"): "all of a site moves together, and the backup is never the larger one",
    ("backup", "node", "exact"): "nothing is missed when the backup alone is gone",
    ("backup", "node", "learned-mask"): "a circuit that suffices can do without a backup",
    ("saturated and", "node", "attribution"): _BOUND,
    ("saturated and", "edge", "attribution"): _BOUND,
    ("absent inhibitor", "edge", "attribution"): _OFF,
}
"""why a method or formula misses what is planted in a hard kind"""

Strengths = Float[np.ndarray, " candidates"]
Rows = list[dict[str, Any]]


def node_rows(planted: Planted) -> Rows:
    """How well each method finds the planted nodes."""
    rows: Rows = []
    for method in METHODS:
        ranking = method.rank(planted.problem).ranking
        strengths = np.zeros(len(planted.mask))
        strengths[ranking] = np.arange(len(ranking), 0, -1)
        rows.append({"method": method.name, **_found(strengths, planted.mask)})
    return rows


def edge_rows(planted: Planted) -> Rows:
    """How well each formula finds the planted edges when it is asked about all nodes."""
    site_of = planted.problem.ablation.nodes.site_numbers
    is_planted = np.zeros((len(site_of), len(site_of)), dtype=bool)
    is_planted[tuple(np.array(sorted(planted.edges)).T)] = True
    neighbours = site_of[None] == site_of[:, None] + 1
    rows: Rows = []
    for formula, edges_by in EDGES.items():
        strengths = np.zeros(is_planted.shape)
        for edge in edges_by(planted.problem, range(len(site_of))):
            strengths[edge.source, edge.target] = abs(edge.weight)
        rows.append({"method": formula, **_found(strengths[neighbours], is_planted[neighbours])})
    return rows


def _found(strengths: Strengths, planted: Bool[np.ndarray, " candidates"]) -> dict[str, float | None]:
    """Precision and recall of the strongest candidates, as many as are planted, and the AUROC of all."""
    chosen = np.argsort(-strengths, kind="stable")[: planted.sum()]
    chosen = chosen[strengths[chosen] > 0]
    hits = int(planted[chosen].sum())
    recall = hits / int(planted.sum())
    return {"precision": hits / max(len(chosen), 1), "recall": recall, "auroc": auroc(strengths, planted)}


def measure(kinds: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """A row for each kind, seed, method or edge formula: precision, recall, auroc, and the problem's exact margin.

    Raises:
        RuntimeError: a circuit is not what it is taken for (see `exact_margin`).
    """
    rows: Rows = []
    for kind in kinds:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                planted = plant(kind, seed, Path(folder))
                about = {"kind": kind, "seed": seed, "margin": exact_margin(planted)}
                rows += [about | {"what": "node"} | row for row in node_rows(planted)]
                rows += [about | {"what": "edge"} | row for row in edge_rows(planted)]
        say(f"{kind}: done")
    return pd.DataFrame(rows)


def summary(measured: pd.DataFrame) -> dict[str, dict[str, float]]:
    """For each method, minima and means of its nodes' figures and of those of the edges that go with it."""
    figures: dict[str, dict[str, float]] = {}
    for method in _methods(measured, "node"):
        formula = "correlation" if method in BY_CORRELATION else "attribution"
        figures[method] = {}
        for what, name in {"node": method, "edge": formula}.items():
            rows = measured[(measured["what"] == what) & (measured["method"] == name)]
            for column in ("auroc", "precision", "recall"):
                for statistic in ("min", "mean"):
                    figures[method][f"{what}_{column}_{statistic}"] = round(float(rows[column].agg(statistic)), 4)
    return figures


def report(measured: pd.DataFrame) -> str:
    """Tables in Markdown, and why what is not found on the hard kinds is not."""
    parts = []
    for what, title in {"node": "Nodes", "edge": "Edges"}.items():
        methods, rows = _methods(measured, what), measured[measured["what"] == what]
        by_kind = dict(list(rows.groupby(["kind", "method"])))
        for caption, cell in (
            ("precision / recall, means", lambda g: f"{g['precision'].mean():.2f} / {g['recall'].mean():.2f}"),
            ("AUROC, mean (lowest)", lambda g: f"{g['auroc'].mean():.2f} ({g['auroc'].min():.2f})"),
        ):
            cells = [[kind, *(cell(by_kind[kind, method]) for method in methods)] for kind in rows["kind"].unique()]
            parts.append(f"{title}: {caption}\n\n{harness.markdown_table(['', *methods], cells)}")
    return "\n\n".join([*parts, "\n".join(_failures(measured))])


def _failures(measured: pd.DataFrame) -> list[str]:
    lines = [
        f"all kinds, by {' and '.join(BY_CORRELATION)}: distractors go along with the label just as well",
        f"all kinds, by {' and '.join(MINIMAL)}: of several nodes in a row one is enough, where it is what is missed",
    ]
    for key, rows in measured.groupby(["kind", "what", "method"], sort=False):
        kind, what, method = (str(part) for part in key)
        if kind in HARD and method not in (*BY_CORRELATION, *MINIMAL) and rows["auroc"].min() < 1:
            lines.append(f"{kind}, {what}s by {method}: {WHY.get((kind, what, method), 'unexplained')}")
    return lines


def _methods(measured: pd.DataFrame, what: str) -> list[str]:
    return measured.loc[measured["what"] == what, "method"].unique().tolist()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and, with --json, the figures."""
    options = harness.parser(__doc__).parse_args(arguments)
    seeds = range(QUICK_SEEDS if options.quick else SEEDS)
    measured = measure(list(KINDS), seeds)
    cheat_seeds = range(QUICK_CHEAT_SEEDS if options.quick else CHEAT_SEEDS)
    cheats = means(planted_cheats.measure(cheat_seeds, CHEAT_METHODS), planted_cheats.ABOUT)
    settings = planted_learned.QUICK_SETTINGS if options.quick else planted_learned.SETTINGS
    learned = means(planted_learned.measure(settings, LEARNED_KINDS), planted_learned.ABOUT)
    figures: dict[str, Any] = summary(measured[measured["kind"].isin(UNSATURATED)])
    figures["hard"] = {kind: summary(measured[measured["kind"] == kind]) for kind in HARD}
    figures |= {"seeds": len(seeds), "exact_margin_min": round(float(measured["margin"].min()), 1)}
    figures |= {"cheats": figures_of(cheats), "cheat_seeds": len(cheat_seeds)}
    figures |= {"learned": figures_of(learned), "learned_kinds": LEARNED_KINDS}
    parts = [report(measured), f"Cheats\n\n{table(cheats)}", f"Learned dictionaries\n\n{table(learned)}"]
    harness.emit("\n\n".join(parts), figures, options.json)


if __name__ == "__main__":
    main()
