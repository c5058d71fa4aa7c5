"""Dictionaries that our trainer learns from the activations of a model whose features are known.

How many of the true features are among the learned ones, and is the circuit that is found in them the planted one?
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from planted_circuits import Node
from planted_problems import ACTIVATIONS, load, load_planted_model
from planted_proofs import Asked
from planted_superposed import Superposed, Superposition, superpose
from scipy.linalg import block_diag
from torch import Tensor
from torch.nn.functional import normalize

from sfc.circuits.nodes import Nodes
from sfc.core.config import SaeConfig
from sfc.core.progress import say
from sfc.core.sites import layer_of
from sfc.saes.collect import collect
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.nulls import random_dictionaries
from sfc.saes.quality import reconstruction_quality
from sfc.saes.store import Store
from sfc.saes.stream import shuffled_batches, stored_source
from sfc.saes.train import train_saes

ALIKE = 0.9
"""the cosine from which a learned feature is a true one"""
MIXED = 0.5
"""the cosine from which a true feature is a good part of a learned one"""
PROMPTS, HELD_OUT_PROMPTS = 24, 200
"""of each side in each split, and for the variance explained"""
METHOD = "learned-mask"
ABOUT = (*Superposition._fields, "width", "k", "training", "dictionaries")
"""the columns that say what a row is of"""
_BLOCK_ROWS = 2048


def learn(superposed: Superposed, n_prompts: int, config: SaeConfig, seed: int) -> dict[str, TopKDictionary]:
    """Dictionaries of all sites, from nothing but activations on `n_prompts` prompts."""
    store, sites = corpus(superposed, "corpus", n_prompts, seed), ACTIVATIONS.sites
    source = stored_source(store, sites, _BLOCK_ROWS)
    wanted = np.ones(source.n_rows, dtype=bool)
    n_sample = min(config.buffer_rows, source.n_rows)
    learned = train_saes(
        lambda first: shuffled_batches(source, wanted, config.batch_size, seed, config.buffer_rows, first),
        next(shuffled_batches(source, wanted, n_sample, seed, n_sample)),
        config,
        sites=sites,
        seed=seed,
    )
    return dict(zip(sites, learned, strict=True))


def corpus(superposed: Superposed, name: str, n_prompts: int, seed: int) -> Store:
    """The activations of new prompts: of each side a quarter, the others ordinary."""
    random = np.random.default_rng([seed, *name.encode()])
    prompts = superposed.ordinary_prompts(n_prompts // 2, random)
    prompts += [prompt for toxic in (True, False) for prompt in superposed.prompts_of(toxic, n_prompts // 4, random)]
    model, folder = load_planted_model(superposed.folder), superposed.folder / name
    collect(model, model.tokenize(prompts), ACTIVATIONS.sites, ACTIVATIONS, folder, lambda _tokens: None)
    return Store(folder)


class Recovery(NamedTuple):
    """What dictionaries have of the truth, as means over the sites."""

    recovered: float
    """share of the true features that have a learned one of cosine `ALIKE` or more"""
    planted_recovered: float
    """the same of the planted nodes"""
    explained: float
    """variance explained of rows that were not trained on"""


def recovery(superposed: Superposed, dictionaries: Mapping[str, TopKDictionary], held_out: Store) -> Recovery:
    """Compare dictionaries with the true features."""
    recovered, explained, planted = [], [], []
    for site, dictionary in dictionaries.items():
        features = superposed.features_at(site)
        best = _cosines(superposed, features, dictionary).amax(1)
        recovered.append(float((best >= ALIKE).float().mean()))
        planted += [
            float(cosine) >= ALIKE
            for feature, cosine in zip(features, best, strict=True)
            if Node(layer_of(site), feature) in superposed.planted
        ]
        explained.append(1 - reconstruction_quality(dictionary, held_out.read(site, 0, held_out.n_tokens)).fvu)
    return Recovery(*(float(np.mean(values)) for values in (recovered, planted, explained)))


def likeness(
    superposed: Superposed, dictionaries: Mapping[str, TopKDictionary], circuit: Bool[np.ndarray, " nodes"]
) -> Float[np.ndarray, "planted chosen"]:
    """The cosines of the planted nodes and the features of a circuit without errors, 0 between sites."""
    first_numbers = Nodes.of({site: dictionary.d_sae for site, dictionary in dictionaries.items()}).first_numbers
    blocks = []
    for (site, dictionary), chosen in zip(dictionaries.items(), np.split(circuit, first_numbers[1:]), strict=True):
        planted = [node.feature for node in sorted(superposed.planted) if node.layer == layer_of(site)]
        blocks.append(_cosines(superposed, planted, dictionary)[:, np.flatnonzero(chosen)].numpy())
    return np.asarray(block_diag(*blocks))


def _cosines(
    superposed: Superposed, features: Sequence[str], dictionary: TopKDictionary
) -> Float[Tensor, "features d_sae"]:
    return superposed.directions(features) @ normalize(dictionary.W_dec).T


TRAININGS: dict[str, dict[str, Any]] = {
    "kmeans": {"matryoshka": []},
    "random": {"matryoshka": [], "start": "random"},
    "kmeans, Matryoshka": {},
}
"""how dictionaries are trained; the last one is the trainer's default"""


class Setting(NamedTuple):
    """What is learned from what."""

    superposition: Superposition
    expansion: int
    k: int
    steps: int = 400
    prompts: int = 3000
    """to learn from"""
    mask_steps: int = 120

    def saes(self, training: str) -> SaeConfig:
        """The trainer's options for one of the `TRAININGS`."""
        options = {"expansion": self.expansion, "k": self.k, "steps": self.steps, "learning_rate": 1e-2}
        return SaeConfig.model_validate(options | TRAININGS[training])


SETTINGS = [
    Setting(Superposition(128, 2), expansion=4, k=8),
    Setting(Superposition(256, 4), expansion=4, k=8),
    Setting(Superposition(256, 4), expansion=4, k=16),
    Setting(Superposition(256, 4), expansion=8, k=8),
    Setting(Superposition(256, 8), expansion=4, k=16),
    Setting(Superposition(512, 4), expansion=4, k=8),
]
QUICK_SETTINGS = [Setting(Superposition(128, 2), expansion=4, k=8, steps=100, prompts=800, mask_steps=80)]


def measure(settings: Sequence[Setting], kinds: Sequence[str]) -> pd.DataFrame:
    """A row for each setting, training, kind of circuit, and learned or random dictionaries.

    Columns: the setting; `Recovery`; `nodes`, `precision` and `recall` of the circuit; its figures; and the agreement
    of all features at once, which is what the dictionaries allow. Learned and random dictionaries have circuits of one
    size, that of the smallest in the learned ones that reaches the target. `precision` is the share of the circuit's
    features that are planted nodes, by a cosine of `ALIKE` or more, `recall` the share of planted nodes that are among
    them; `mixed_precision` and `mixed_recall` are the same by a cosine of `MIXED`.
    """
    rows: list[dict[str, Any]] = []
    for setting in settings:
        for seed, kind in enumerate(kinds):
            with tempfile.TemporaryDirectory() as folder:
                superposed = superpose(kind, setting.superposition, PROMPTS, seed, Path(folder))
                for training in TRAININGS:
                    learned = learn(superposed, setting.prompts, setting.saes(training), seed)
                    about = {
                        **setting.superposition._asdict(),
                        "width": learned[ACTIVATIONS.sites[0]].d_sae,
                        "k": setting.k,
                        "training": training,
                    }
                    rows += [about | {"seed": seed} | row for row in _found(superposed, learned, setting.mask_steps)]
        say(f"{setting.superposition.features} features: done")
    return pd.DataFrame(rows)


def _found(superposed: Superposed, learned: Mapping[str, TopKDictionary], mask_steps: int) -> list[dict[str, Any]]:
    """What is found in learned dictionaries, and in random ones."""
    held_out = corpus(superposed, "held out", HELD_OUT_PROMPTS, seed=0)
    rows, size = [], None
    for name, dictionaries in {"learned": learned, "random": random_dictionaries(learned, seed=0)}.items():
        problem = load(superposed.folder, superposed.prompts, dictionaries, mask_steps)
        asked = Asked.of(problem, superposed.prompts)
        ranking = asked.ranking(METHOD, "pairs")
        circuit = asked.smallest(ranking, "pairs") if size is None else asked.best(ranking, size)
        size = int(circuit.sum())
        alike = likeness(superposed, dictionaries, circuit)
        rows.append(
            {
                "dictionaries": name,
                **recovery(superposed, dictionaries, held_out)._asdict(),
                "nodes": float(size),
                "precision": float((alike.max(0) >= ALIKE).mean()),
                "recall": float((alike.max(1) >= ALIKE).mean()),
                "mixed_precision": float((alike.max(0) >= MIXED).mean()),
                "mixed_recall": float((alike.max(1) >= MIXED).mean()),
                **asked.figures(circuit),
                "all_features_agree": asked.figures(np.ones_like(circuit))["agreement"],
            }
        )
    return rows
