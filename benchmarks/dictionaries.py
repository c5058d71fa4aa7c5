"""Dictionaries of stored activations by our trainer and by SAELens': do they reconstruct, live, and come back?

Every contender is trained twice, on disjoint halves of the prompts with different seeds, on equal tokens of the same
rows, and measured on prompts that neither saw.
"""

import itertools
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from sae_trainers import Builder, Contender, Problem, Rows, ours, saelens, saelens_tuned

from sfc.core.progress import say
from sfc.saes.quality import match_features
from sfc.saes.store import Store

FULL = {"steps": 1250, "seeds": 3, "prompts": 1_000_000}
QUICK = {"steps": 40, "seeds": 1, "prompts": 300}
_HELD_OUT = 0.06

NOTES = """\
matched: of the features that fire on held-out rows, the share with a partner of cosine 0.7 in the dictionary of the
other half, each the other's nearest; any: with some partner; chance: matched where the other dictionary is random.
- sfc: the defaults of SaeConfig with learning rate 1e-3; "plain" with saes.matryoshka=[], "anchored" with
  saes.anchor_weight=0.3, "random" plain with saes.start=random and learning rate 2e-3.
- SAELens: SAETrainer's defaults; "SAELens, tuned" has the learning rate, warm-up and decay of sfc's defaults."""

CONTENDERS: dict[str, Builder] = {
    "sfc": partial(ours, learning_rate=1e-3),
    "sfc, plain": partial(ours, learning_rate=1e-3, matryoshka=[]),
    "sfc, anchored": partial(ours, learning_rate=1e-3, anchor_weight=0.3),
    "sfc, random": partial(ours, start="random", matryoshka=[]),
    "SAELens": saelens,
    "SAELens, tuned": saelens_tuned,
}


def rows_of(store: Store, site: str, prompts: int, seed: int) -> tuple[Rows, Rows, Rows]:
    """The rows of some held-out prompts, and of two halves of the others; which they are the seed decides.

    Args:
        prompts: how many of the store's are used, at most.
    """
    rows = torch.cat([store.read(site, *block).float() for block in store.blocks(8192)])
    order = np.random.default_rng(seed).permutation(int(store.tokens.prompt.max()) + 1)[store.tokens.prompt]
    used = min(prompts, int(order.max()) + 1)
    held_out, first = round(_HELD_OUT * used), round((1 + _HELD_OUT) / 2 * used)
    bounds = ((0, held_out), (held_out, first), (first, used))
    parts = [(order >= start) & (order < stop) for start, stop in bounds]
    held_out, one, other = (rows[torch.from_numpy(part)] for part in parts)
    return held_out, one, other


def batches(rows: Rows, size: int, seed: int) -> Iterator[Rows]:
    """Endless batches of shuffled rows."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield from (
            batch for batch in rows[torch.randperm(len(rows), generator=random)].split(size) if len(batch) == size
        )


def trained(build: Builder, problem: Problem, rows: Rows, steps: int, seed: int) -> Contender:
    """A contender after so many batches of the rows; all of them are known beforehand."""
    contender = build(problem, rows, steps, seed)
    for batch in itertools.islice(batches(rows, problem.batch, seed), steps):
        contender.step(batch)
    return contender


@torch.no_grad()
def figures_of(pair: tuple[Contender, Contender], held_out: Rows) -> dict[str, float]:
    """What a pair of trained contenders is worth; figures of one alone are those of the first."""
    first, second = pair
    assert first.reconstruct and first.features and first.decoder and second.decoder
    decoder, other = first.decoder(), second.decoder()
    parts = held_out.split(1024)
    error = sum((x - first.reconstruct(x)).double().square().sum().item() for x in parts)
    live = torch.stack([(first.features(x) > 0).any(dim=0) for x in parts]).any(dim=0).numpy()
    random = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    (matching, _), (chance, _) = match_features(decoder, other), match_features(decoder, random)
    return {
        "fvu": error / (held_out - held_out.double().mean(dim=0)).square().sum().item(),
        "dead": float(1 - live.mean()),
        "matched": float((matching.same >= 0)[live].mean()),
        "any": float((matching.cosine >= 0.7)[live].mean()),
        "chance": float((chance.same >= 0)[live].mean()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print the table and, with --json, the figures."""
    parser = harness.parser(__doc__)
    parser.add_argument("store", type=Path, help="a folder of activations, as sfc collect and sfc train leave it")
    parser.add_argument("--site", default="blocks.24.hook_resid_post")
    for name, default in (("expansion", 4), ("k", 64), ("batch", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("steps", "seeds", "prompts"):
        parser.add_argument(f"--{name}", type=int)
    options = vars(parser.parse_args(arguments))
    effort = QUICK if options["quick"] else FULL
    steps, seeds, prompts = (options[name] or effort[name] for name in ("steps", "seeds", "prompts"))
    store = Store(options["store"])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for seed in range(seeds):
        held_out, *halves = rows_of(store, options["site"], prompts, seed)
        d_in = held_out.shape[1]
        problem = Problem(d_in, options["expansion"] * d_in, options["k"], options["batch"], "cpu")
        for name, build in CONTENDERS.items():
            one, other = (trained(build, problem, rows, steps, 2 * seed + i) for i, rows in enumerate(halves))
            found[name].append(figures_of((one, other), held_out))
            say(f"{name}, seed {seed}: {found[name][-1]}")
    columns = ("fvu", "dead", "matched", "any", "chance")
    rows = [
        (name, *(statistics.fmean(each[c] for each in by_seed) for c in columns)) for name, by_seed in found.items()
    ]
    table = harness.markdown_table(("trainer", "unexplained", *columns[1:]), rows)
    figures: dict[str, Any] = {"steps": steps, "machine": harness.machine("cpu"), "figures": found}
    harness.emit(f"{table}\n\n{NOTES}", figures, options["json"])


if __name__ == "__main__":
    main()
