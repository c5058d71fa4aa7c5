"""Circuits whose nodes and edges are known: programs of features, which `planted_models` turns into transformers.

A *source*, a lower-case letter, is a feature that words of the prompt write at their own position. The attention of
block 1 moves it to the last position, where it has the letter in upper case; ReLU units of the later blocks read
features and write others; the unembedding reads what is there at the end. What is written stays in the residual stream.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

N_LAYERS = 4
MOVING_BLOCK = 1
OUTPUT = "output"
"""the feature at the end of every circuit, whose logits are `OUTPUT_LOGITS`"""
FOR, AGAINST, OTHER = "for", "against", "other"
"""the two tokens whose logit difference is the score, and one that has no part in it"""
OUTPUT_LOGITS = {FOR: 2.0, AGAINST: -1.0}


class Unit(NamedTuple):
    """A unit of the MLP of a block: `relu(reads . features + bias)`, added to features by the weights of `writes`."""

    block: int
    reads: Mapping[str, float]
    bias: float
    writes: Mapping[str, float]


@dataclass(frozen=True)
class Circuit:
    """Features and what they do: planted, or a distractor."""

    toxic: tuple[str, ...]
    """the sources that fire in a toxic prompt: each of these combinations in equally many"""
    safe: tuple[str, ...]
    units: tuple[Unit, ...] = ()
    logits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """weight of features in the logits of tokens"""

    @property
    def sources(self) -> list[str]:
        return sorted(set("".join(self.toxic + self.safe)))

    @property
    def born(self) -> dict[str, int]:
        """The block that writes each feature; 0 for the sources, which the embedding writes."""
        written = {feature: unit.block for unit in self.units for feature in unit.writes}
        moved = {source.upper(): MOVING_BLOCK for source in self.sources}
        return dict.fromkeys(self.sources, 0) | moved | written


UNSATURATED = {
    "chain": Circuit(
        toxic=("a",),
        safe=("",),
        units=(Unit(2, {"A": 1}, 0, {"f": 1}), Unit(3, {"f": 1}, 0, {OUTPUT: 1})),
    ),
    "sum": Circuit(
        toxic=("ab",),
        safe=("",),
        units=(Unit(2, {"A": 1, "B": 0.6}, 0, {OUTPUT: 1}),),
    ),
    "and": Circuit(
        toxic=("ab",),
        safe=("", "a", "b"),
        units=(Unit(2, {"A": 1, "B": 1}, -1, {OUTPUT: 1}),),
    ),
    "inhibitor": Circuit(
        toxic=("ab",),
        safe=("", "b"),
        units=(Unit(2, {"A": 1, "B": -0.5}, 0, {OUTPUT: 1}),),
    ),
    "skip": Circuit(
        toxic=("a",),
        safe=("",),
        units=(Unit(2, {"A": 1}, 0, {"f": 1}), Unit(3, {"A": 0.6, "f": 0.6}, 0, {OUTPUT: 1})),
    ),
}
"""kinds in which every node acts alone, and no unit is past a bound"""

HARD = {
    # min(A + B, 1): each of the two suffices, and the sum is far past the bound.
    "or": Circuit(
        toxic=("ab",),
        safe=("",),
        units=(Unit(2, {"A": 1, "B": 1}, 0, {OUTPUT: 1}), Unit(2, {"A": 1, "B": 1}, -1, {OUTPUT: -1})),
    ),
    # max(A, 0.8 B): B does nothing as long as A is there, and nearly all of it when A is not.
    "backup": Circuit(
        toxic=("ab",),
        safe=("",),
        units=(Unit(2, {"A": 1}, 0, {OUTPUT: 1}), Unit(2, {"A": -1, "B": 0.8}, 0, {OUTPUT: 1})),
    ),
    # min(4 (A + B) - 5, 1): both are needed, and together they are far past the bound.
    "saturated and": Circuit(
        toxic=("ab",),
        safe=("", "a", "b"),
        units=(Unit(2, {"A": 4, "B": 4}, -5, {OUTPUT: 1}), Unit(2, {"A": 4, "B": 4}, -6, {OUTPUT: -1})),
    ),
    # An inhibitor that the safe prompts have and the toxic ones lack: what acts is that it does not fire.
    "absent inhibitor": Circuit(
        toxic=("a",),
        safe=("", "ab"),
        units=(Unit(2, {"A": 1, "B": -1}, 0, {OUTPUT: 1}),),
    ),
}
"""kinds that are redundant, saturated, or work by a feature's absence"""

KINDS = UNSATURATED | HARD


def _unread(p: str) -> Circuit:
    return Circuit((p,), ("",))


def _acts_elsewhere(p: str) -> Circuit:
    units = (Unit(2, {p.upper(): 1}, 0, {f"{p}2": 1}), Unit(3, {f"{p}2": 1}, 0, {f"{p}3": 1}))
    return Circuit((p,), ("",), units, {f"{p}3": {OTHER: 3}})


def _acts_on_both_tokens(p: str) -> Circuit:
    return Circuit((p,), ("",), logits={p.upper(): {FOR: 2, AGAINST: 2}})


def _below_its_threshold(p: str) -> Circuit:
    return Circuit((p,), ("",), (Unit(3, {p.upper(): 1}, -3, {OUTPUT: 1}),))


def _cancels_itself(p: str) -> Circuit:
    return Circuit((p,), ("",), (Unit(3, {p.upper(): 1}, 0, {OUTPUT: 1}), Unit(3, {p.upper(): 1}, 0, {OUTPUT: -1})))


def _fires_everywhere(p: str) -> Circuit:
    return Circuit((p, ""), (p, ""), logits={p.upper(): {OTHER: 1}})


_DISTRACTORS: tuple[Callable[[str], Circuit], ...] = (
    _unread,
    _acts_elsewhere,
    _acts_on_both_tokens,
    _below_its_threshold,
    _cancels_itself,
    _fires_everywhere,
)
"""all but the last fire with the label, at every toxic prompt and at no other"""


def drawn_distractors(random: np.random.Generator) -> list[Circuit]:
    """One or two of each sort, each with features of its own."""
    letters = iter("ghijklmnopqrstuvwxyz")
    return [make(next(letters)) for make in _DISTRACTORS for _ in range(random.integers(1, 3))]


VOTES = Circuit(
    toxic=("abeyz",),
    safe=("",),
    units=(Unit(2, {"A": 0.2, "B": 0.2, "E": 0.2, "Y": 0.2, "Z": 0.2}, 0, {OUTPUT: 1}),),
)
"""the circuit among offsets: of many nodes, each of which carries a little"""


def _offset(pair: str) -> Circuit:
    one, other = pair.upper()
    tent = {0.0: 1.0, 1.0: -2.0, 2.0: 1.0}  # the slope changes by so much at each value of the sum: 1 at 1, 0 from 2 on
    units = [Unit(2, {one: 1, other: 1}, -at, {pair: by}) for at, by in tent.items()]
    return Circuit((pair, ""), (pair, ""), (*units, Unit(3, {pair: 1}, 0, {OUTPUT: 0.5})))


OFFSETS = tuple(_offset(pair) for pair in ("cd", "st", "uv"))
"""what a constant refusal can be built from: a feature each that fires where one of two sources does, which fire
together or not at all, in every second prompt of both sides. No prompt makes it fire. With the sources at their means,
which is halfway, it does, whatever the prompt: two such features and `OUTPUT` score as high as `VOTES`.
"""


class Node(NamedTuple):
    """A feature at the site after a block."""

    layer: int
    feature: str


def planted_graph(circuit: Circuit) -> tuple[set[Node], set[tuple[Node, Node]]]:
    """The nodes that `OUTPUT` at the last site depends on, and the edges between neighbouring sites that carry it.

    A feature that is read two blocks later passes the site between as a copy of itself: a node, and two edges.
    """
    born = circuit.born
    parents = {
        feature: {read for unit in circuit.units if feature in unit.writes for read in unit.reads} for feature in born
    } | {source.upper(): {source} for source in circuit.sources}
    nodes, edges = {Node(N_LAYERS - 1, OUTPUT)}, set()
    for layer in reversed(range(1, N_LAYERS)):
        for target in [node for node in nodes if node.layer == layer]:
            new = born[target.feature] == layer
            for feature in parents[target.feature] if new else {target.feature}:
                source = Node(layer - 1, feature)
                nodes.add(source)
                edges.add((source, target))
    return nodes, edges
