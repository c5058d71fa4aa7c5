"""Models that hold more features than they have dimensions, and say which: what trained dictionaries are judged by.

Every word writes features of the *background*, drawn at random, and some words a source of a circuit beside them. All
directions are random in the same space, so that none is orthogonal to the others; those of the background are turned
most of the way out of the span of the sources, as a model that has to read these would turn them. The last token alone
attends to the words; the others attend to the first token, which has nothing to say. There, features of the circuits
meet, fewer than there are dimensions: they are read by dual vectors, and a circuit's units are closed everywhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from planted_circuits import AGAINST, FOR, KINDS, OTHER, Circuit, Node, Unit, drawn_distractors, planted_graph
from planted_models import BOS, CONSTANT, D_MODEL, UNKNOWN, Basis, rotation, write_model
from planted_problems import AFTER, BEFORE, Prompts, Words
from torch import Tensor
from torch.nn.functional import normalize

from sfc.core.sites import layer_of

N_WORDS = 10
BACKGROUND_WORDS, WORDS_PER_SOURCE = 2000, 60
LAST, FIRST = "last", "first"
"""features of the last token and of the first one"""
GATE, ATTENTION = 1.0, 30.0
"""how far units are closed but at the last token, and how much more the first token is attended to by the others"""
TURNED = 0.8
"""share of a background direction's part in the span of the sources that is taken away"""
DISTRACTED = {True: 0.5, False: 0.25}
"""how often the source of a distractor fires in toxic prompts and in safe ones"""
ORDINARY = 0.15
"""how often any source fires in prompts of neither side"""


class Superposition(NamedTuple):
    """How many features there are, and how many at once."""

    features: int
    """in all: background, sources, and what is made of them"""
    active: float
    """of the background in a word, on average"""


@dataclass(frozen=True)
class Superposed:
    """A model with its features."""

    folder: Path
    circuits: Sequence[Circuit]
    """the planted one, then the distractors"""
    basis: Basis
    words: Words
    born: dict[str, int]
    """the block that writes each feature"""
    prompts: Prompts

    @property
    def planted(self) -> set[Node]:
        """What the planted circuit is made of."""
        return planted_graph(self.circuits[0])[0]

    def features_at(self, site: str) -> list[str]:
        """The features that the residual stream has at a site."""
        return [feature for feature, block in self.born.items() if block <= layer_of(site)]

    def directions(self, features: Sequence[str]) -> Float[Tensor, "features d_model"]:
        """Where they lie, in unit length."""
        return torch.stack([self.basis.directions[feature] for feature in features])

    def ordinary_prompts(self, n_prompts: int, random: np.random.Generator) -> list[str]:
        """Prompts in which all sources fire independently of each other."""
        sources = [source for circuit in self.circuits for source in circuit.sources]
        return [_drawn_prompt([s for s in sources if random.random() < ORDINARY], random) for _ in range(n_prompts)]

    def prompts_of(self, toxic: bool, n_prompts: int, random: np.random.Generator) -> list[str]:
        """Prompts of one side."""
        return _prompts_of(self.circuits, toxic, n_prompts, random)


def superpose(kind: str, superposition: Superposition, n_prompts: int, seed: int, folder: Path) -> Superposed:
    """Write a model with a circuit of this kind into the folder, and draw `n_prompts` prompts per side and split."""
    random = np.random.default_rng([seed, superposition.features, *kind.encode()])
    circuits = [KINDS[kind], *drawn_distractors(random)]
    circuit_born = {feature: block for circuit in reversed(circuits) for feature, block in circuit.born.items()}
    sources = [feature for feature, block in circuit_born.items() if block == 0]
    late = [LAST, *(feature for feature, block in circuit_born.items() if block > 0)]
    background = [f"background{i}" for i in range(superposition.features - len(circuit_born) - 1)]
    basis = _drawn_basis(sources, late, background, random)
    words = _drawn_words(sources, background, superposition.active, random)
    reads = [basis.readers[FIRST], basis.readers[LAST]]
    query, key = torch.zeros(2, D_MODEL, D_MODEL)
    # Queries are 1, and 0 at the last token; the first token has the only key.
    query[:, 0] = basis.constant / CONSTANT - reads[1] / basis.scales[LAST]
    key[:, 0] = ATTENTION * D_MODEL**0.5 * reads[0] / basis.scales[FIRST]
    write_model([_gated(circuit) for circuit in circuits], basis, words, N_WORDS + 3, random, folder, (query, key))
    prompts = Prompts.drawn(lambda toxic: _prompts_of(circuits, toxic, n_prompts, random))
    born = dict.fromkeys([*background, LAST], 0) | circuit_born
    return Superposed(folder, circuits, basis, words, born, prompts)


def _gated(circuit: Circuit) -> Circuit:
    units = tuple(Unit(unit.block, {**unit.reads, LAST: GATE}, unit.bias - GATE, unit.writes) for unit in circuit.units)
    return Circuit(circuit.toxic, circuit.safe, units, circuit.logits)


def _drawn_basis(
    sources: Sequence[str], late: Sequence[str], background: Sequence[str], random: np.random.Generator
) -> Basis:
    constant, rest = rotation(random)
    names = [FIRST, *sources, *late, *background]
    drawn = normalize(torch.from_numpy(random.normal(size=(len(names), len(rest)))).float())
    # Sources and the first token's feature are told from each other and from the last token's, which is first among
    # those that meet there and are told from each other too.
    n_read, n_own = len(sources) + 2, len(names) - len(background)
    span = torch.linalg.qr(drawn[:n_read].T).Q
    drawn[n_own:] = normalize(drawn[n_own:] - TURNED * drawn[n_own:] @ span @ span.T)
    duals = torch.cat([torch.linalg.pinv(group).T for group in (drawn[:n_read], drawn[n_read - 1 : n_own])])
    duals = torch.cat([duals[: n_read - 1], duals[n_read:]]) @ rest
    directions = dict(zip(names, drawn @ rest, strict=True))
    scales = dict(zip(names, 2 ** random.uniform(-0.5, 0.5, len(names)), strict=True))
    return Basis(directions, scales, constant, rest[:0], dict(zip(names[:n_own], duals, strict=True)))


def _drawn_words(
    sources: Sequence[str], background: Sequence[str], active: float, random: np.random.Generator
) -> Words:
    """Words of the background alone and of each source; how often a feature of the background is in them varies."""
    weights = 10 ** random.uniform(-1, 0, len(background))
    names = [f"word{i}" for i in range(BACKGROUND_WORDS)]
    names += [f"{source}{i}" for source in sources for i in range(WORDS_PER_SOURCE)]
    words = {}
    for name in names:
        drawn = random.choice(background, 1 + random.poisson(active - 1), replace=False, p=weights / weights.sum())
        words[name] = dict(zip(drawn.tolist(), random.uniform(0.5, 1.5, len(drawn)), strict=True))
        if name[0] in sources and not name.startswith("word"):
            words[name][name[0]] = random.uniform(0.8, 1.2)
    return words | {AFTER: {LAST: 1.0}, BOS: {FIRST: 1.0}} | {w: {} for w in (UNKNOWN, BEFORE, FOR, AGAINST, OTHER)}


def _prompts_of(circuits: Sequence[Circuit], toxic: bool, n_prompts: int, random: np.random.Generator) -> list[str]:
    planted, *distractors = circuits
    others = [source for circuit in distractors for source in circuit.sources]
    combinations = np.resize(planted.toxic if toxic else planted.safe, n_prompts)
    return [
        _drawn_prompt([*sources, *(s for s in others if random.random() < DISTRACTED[toxic])], random)
        for sources in random.permutation(combinations)
    ]


def _drawn_prompt(firing: Sequence[str], random: np.random.Generator) -> str:
    """Words of sources, as many as there is room for, in random places among those of the background alone."""
    words = [f"{source}{random.integers(WORDS_PER_SOURCE)}" for source in firing[:N_WORDS]]
    words += [f"word{random.integers(BACKGROUND_WORDS)}" for _ in range(N_WORDS - len(words))]
    return " ".join(random.permutation(words))
