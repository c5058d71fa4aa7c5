"""Discovery problems whose solution is known: a planted model, its dictionaries, and prompts with and without label."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from planted_circuits import AGAINST, FOR, KINDS, N_LAYERS, OTHER, Circuit, Node, drawn_distractors, planted_graph
from planted_models import BOS, UNKNOWN, Basis, write_model

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.faithfulness import ablated_scores
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.config import ActivationsConfig, ModelConfig
from sfc.core.experiments import experiment_of
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.loading import Model, load_model
from sfc.models.score import RefusalScore
from sfc.saes.collect import collect
from sfc.saes.dictionary import Dictionary
from sfc.saes.format import load_dictionary, save_dictionary
from sfc.saes.store import Store

PROMPTS = 6
"""per label and split; a multiple of the number of combinations in which a circuit's sources fire"""
MARGIN = 10.0
"""a planted node's exact effect is at least so many times any distractor's"""
WORDS_PER_SOURCE = 3
MASK_STEPS = 40
TARGET = 0.9
"""what the smallest circuit must reach on discovery prompts"""
BEFORE, AFTER = "ask", "answer"
FILLERS = tuple(f"filler{i}" for i in range(6))
ACTIVATIONS = ActivationsConfig.model_validate({"layers": list(range(N_LAYERS)), "dtype": "float32"})
# Edges are not pruned: pruning would hide what a formula says of the rest.
UNPRUNED = {"edge_share": 0, "edge_threshold": 0, "edges_per_node": 1000}

Words = Mapping[str, Mapping[str, float]]
"""the features that each word writes, and their values"""


class Prompts(NamedTuple):
    """Prompts of both sides by what they are for, all of them equally long."""

    toxic: list[str]
    safe: list[str]
    """on which circuits are found"""
    baseline: list[str]
    """safe ones, whose means ablated nodes are set to"""
    test_toxic: list[str]
    test_safe: list[str]

    @classmethod
    def drawn(cls, draw: Callable[[bool], list[str]]) -> "Prompts":
        """From what draws prompts of the toxic side (True) or of the safe one."""
        return cls(*(draw(toxic) for toxic in (True, False, False, True, False)))


@dataclass(frozen=True)
class Planted:
    """A discovery problem and its solution."""

    problem: Problem
    nodes: frozenset[int]
    edges: frozenset[tuple[int, int]]
    circuits: Sequence[Circuit]
    """the planted one, then the distractors"""
    words: Words
    basis: Basis
    numbers: Mapping[Node, int]
    """the node of each feature at each site"""
    prompts: Prompts

    @property
    def mask(self) -> Bool[np.ndarray, " nodes"]:
        """The planted nodes as booleans over all nodes."""
        return np.isin(np.arange(self.problem.ablation.nodes.n_nodes), list(self.nodes))


def plant(kind: str, seed: int, folder: Path) -> Planted:
    """Draw a circuit of this kind among distractors, write its model and dictionaries into `folder`, and load them.

    The seed decides on the rotation, scales, words, token ids, distractors and prompts.
    """
    return plant_circuit(KINDS[kind], np.random.default_rng([seed, *kind.encode()]), folder)


def plant_circuit(
    circuit: Circuit,
    random: np.random.Generator,
    folder: Path,
    others: Sequence[Circuit] = (),
    n_prompts: int = PROMPTS,
) -> Planted:
    """The same of any circuit, with `others` beside the distractors, and `n_prompts` per label and split."""
    circuits = [circuit, *drawn_distractors(random), *others]
    born = {feature: block for circuit in reversed(circuits) for feature, block in circuit.born.items()}
    basis = Basis.drawn(list(born), random)
    words = _drawn_words([source for circuit in circuits for source in circuit.sources], random)
    n_words = sum(len(circuit.sources) for circuit in circuits) + int(random.integers(2, 6))
    write_model(circuits, basis, words, n_words + 3, random, folder)
    at_site = [random.permutation([f for f in born if born[f] <= layer]).tolist() for layer in range(N_LAYERS)]
    for site, features in zip(ACTIVATIONS.sites, at_site, strict=True):
        # A word writes one source at most: the others can never fire beside it.
        k = 1 + sum(born[feature] > 0 for feature in features)
        save_dictionary(basis.dictionary(features, k, site), folder / site, {})
    prompts = Prompts.drawn(lambda toxic: _drawn_prompts(circuits, n_words, n_prompts, toxic, random))
    problem = load(folder, prompts, {site: load_dictionary(folder / site) for site in ACTIVATIONS.sites}, MASK_STEPS)
    nodes = problem.ablation.nodes
    firsts = np.cumsum([0, *nodes.sizes])
    numbers = {Node(i, f): int(firsts[i]) + j for i, features in enumerate(at_site) for j, f in enumerate(features)}
    planted_nodes, planted_edges = planted_graph(circuits[0])
    return Planted(
        problem,
        frozenset(numbers[node] for node in planted_nodes),
        frozenset((numbers[source], numbers[target]) for source, target in planted_edges),
        circuits, words, basis, numbers, prompts,
    )  # fmt: skip


def exact_margin(planted: Planted) -> float:
    """The smallest exact effect of a planted node over the largest of another, or of all others at once.

    A node's effect is how far the mean score moves when it is ablated, by itself or after all planted nodes at its
    site but one (itself, if it is planted), whichever is more.

    Raises:
        RuntimeError: it is less than `MARGIN`.
    """
    nodes = planted.problem.ablation.nodes
    is_planted = planted.mask
    effects = np.zeros(nodes.n_nodes)
    for site in range(len(nodes.sites)):
        at_site = frozenset(np.flatnonzero(nodes.site_numbers == site).tolist())
        there = at_site & planted.nodes
        for gone in {frozenset(), *(there - {node} for node in there)}:
            candidates = sorted(at_site - gone)
            keep = np.tile(~np.isin(np.arange(nodes.n_nodes), list(gone)), (1 + len(candidates), 1))
            keep[1 + np.arange(len(candidates)), candidates] = False
            scores = _mean_scores(planted.problem, keep)
            effects[candidates] = np.maximum(effects[candidates], np.abs(scores[1:] - scores[0]))
    with_all, with_planted = _mean_scores(planted.problem, np.stack([np.ones_like(is_planted), is_planted]))
    margin = effects[is_planted].min() / max(effects[~is_planted].max(), abs(with_all - with_planted))
    if margin < MARGIN:
        weakest = nodes.name(min(planted.nodes, key=effects.__getitem__))
        raise RuntimeError(
            f"not planted: {weakest} has {margin:.2g} times the exact effect of the others, not {MARGIN}"
        )
    return margin


def _mean_scores(problem: Problem, keep: Bool[np.ndarray, "circuits nodes"]) -> Float[np.ndarray, " circuits"]:
    return ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, keep).mean(1)


def _drawn_words(sources: Sequence[str], random: np.random.Generator) -> Words:
    """The vocabulary: several words for each source, some stronger than others, and words that write nothing."""
    strengths = {f"{s}{i}": {s: random.uniform(0.9, 1.1)} for s in sources for i in range(WORDS_PER_SOURCE)}
    return strengths | {word: {} for word in (BOS, UNKNOWN, BEFORE, AFTER, FOR, AGAINST, OTHER, *FILLERS)}


def _drawn_prompts(
    circuits: Sequence[Circuit], n_words: int, n_prompts: int, toxic: bool, random: np.random.Generator
) -> list[str]:
    """Prompts of `n_words` words in random order: one for each source that fires, then fillers."""
    firing = [""] * n_prompts
    for circuit in circuits:
        combinations = np.resize(circuit.toxic if toxic else circuit.safe, n_prompts)
        firing = [sofar + more for sofar, more in zip(firing, random.permutation(combinations), strict=True)]
    prompts = []
    for sources in firing:
        chosen = [f"{source}{random.integers(WORDS_PER_SOURCE)}" for source in sources]
        chosen += random.choice(FILLERS, n_words - len(chosen)).tolist()
        prompts.append(" ".join(random.permutation(chosen)))
    return prompts


def load_planted_model(folder: Path) -> Model:
    """The model in a folder, with its template and the tokens of its score."""
    template = f"{BOS} {BEFORE} {{prompt}} {AFTER}"
    source = {"source": str(folder), "template": template, "refusal_tokens": [FOR], "against_tokens": [AGAINST]}
    return load_model(ModelConfig.model_validate(source))


def load(folder: Path, prompts: Prompts, dictionaries: Mapping[str, Dictionary], mask_steps: int) -> Problem:
    """The problem that discovery would make of the model in a folder, dictionaries, toxic prompts and safe means."""
    model = load_planted_model(folder)
    toxic, safe = prompts.toxic, prompts.safe
    layout = TemplateLayout.of(model.tokenize(toxic))
    runs, baselines = (
        make_batches(model.tokenize(side), layout, ACTIVATIONS.batch_tokens, model.device)
        for side in (toxic, prompts.baseline)
    )
    nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()})
    collect(model, model.tokenize(toxic + safe), ACTIVATIONS.sites, ACTIVATIONS, folder / "store", lambda _tokens: None)
    labels = [True] * len(toxic) + [False] * len(safe)
    return Problem(
        model=model,
        score=RefusalScore.of(model),
        ablation=Ablation(nodes, dictionaries, mean_baseline(model, dictionaries, baselines, layout), "node"),
        runs=PromptRuns.of(model, runs, nodes.sites[0]),
        store=Store(folder / "store"),
        prompts=pd.DataFrame({"prompt": toxic + safe, "store_index": range(len(labels)), "refusal_label": labels}),
        experiment=experiment_of(
            {
                "name": "planted",
                "model": model.config.model_dump(),
                "activations": ACTIVATIONS.model_dump(),
                "discovery": UNPRUNED,
                "learned_mask": {"steps": mask_steps},
                "evaluation": {"target": TARGET},
            }
        ),
    )
