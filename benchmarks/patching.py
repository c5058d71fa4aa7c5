"""Activation patching of every head beside a loop that runs the whole model for each.

The loop is what one would write first: the source's activations are kept, and for each head all pairs are run through
the whole model in one batch, with the head's output replaced. It has fewer heads, evenly spaced over the layers,
because of the time it takes; what is compared is seconds per head. Both must give the same scores.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.core.experiments import load_experiment
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.interventions import Intervention, recorder
from sfc.models.loading import Model, load_model
from sfc.models.score import RefusalScore, score_batch
from sfc.studies.patch import toxic_safe_pairs
from sfc.studies.patch.alignment import align
from sfc.studies.patch.patching import TokenizedPair, part_of, patch_pairs, tokenize_pairs, unaligned
from sfc.studies.patch.ranking import Patch, PatchRuns, single_patches

PAIRS = Path(__file__).parents[1] / "sfc" / "data" / "mini" / "pairs.csv"
POSITIONS = "suffix"
FULL = {"rounds": 2, "pairs": 20, "every": 1, "loop_heads": 10}
QUICK = {"rounds": 1, "pairs": 6, "every": 3, "loop_heads": 4}

Scores = Float[np.ndarray, "patches pairs"]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and, with --json, the figures."""
    parser = harness.parser(__doc__)
    parser.add_argument("--preset", default="smollm2")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else FULL
    experiment = load_experiment(options.preset)
    model = load_model(experiment.model, options.device)
    pairs = _pairs(model, effort["pairs"], experiment.seed)
    patches = single_patches(["head"], list(range(model.n_layers)), model.bridge.cfg.n_heads)[:: effort["every"]]
    looped = [patches[i] for i in np.linspace(0, len(patches) - 1, effort["loop_heads"]).round().astype(int)]
    kept: dict[str, PatchRuns | Scores] = {}

    def ours() -> None:
        batch_tokens = experiment.activations.batch_tokens
        kept["ours"] = patch_pairs(model, RefusalScore.of(model), pairs, "denoise", POSITIONS, patches, batch_tokens)

    def loop() -> None:
        kept["loop"] = scores_by_loop(model, pairs, looped)

    calls = {"sfc": ours, "loop": loop}
    seconds = harness.interleaved(calls, effort["rounds"], burst=1, device=options.device)
    per_head = {
        "sfc": [value / len(patches) for value in seconds["sfc"]],
        "loop": [value / len(looped) for value in seconds["loop"]],
    }
    figures = {
        "ratio_loop": harness.paired_ratio(per_head["loop"], per_head["sfc"]),
        "seconds_all_heads": statistics.median(seconds["sfc"]),
        "seconds_per_head": {name: statistics.median(values) for name, values in per_head.items()},
        "seconds_by_round": seconds,
        "largest_difference": _largest_difference(kept["ours"], kept["loop"], patches, looped),
        "pairs": len(pairs),
        "heads": {"sfc": len(patches), "loop": len(looped)},
        "machine": harness.machine(options.device),
    }
    rows = [(name, figures["heads"][name], 1000 * value) for name, value in figures["seconds_per_head"].items()]
    rows.append(("loop over sfc", None, figures["ratio_loop"]))
    harness.emit(harness.markdown_table(("what", "heads", "ms a head"), rows), figures, options.json)


def scores_by_loop(model: Model, pairs: Sequence[TokenizedPair], patches: Sequence[Patch]) -> Scores:
    """The scores of the corrupted runs with each patch from the clean ones, by running the whole model for each."""
    score = RefusalScore.of(model)
    corrupted, clean = (_one_batch(model, [getattr(pair, side) for pair in pairs]) for side in ("corrupted", "clean"))
    kept: dict[str, Tensor] = {}
    sites = dict.fromkeys(site for patch in patches for site in patch.sites)
    with torch.no_grad():
        score_batch(model, score, clean, {site: recorder(kept, site) for site in sites})
        scores = np.empty((len(patches), len(pairs)))
        for row, patch in enumerate(patches):
            (site,) = patch.sites
            replacing = _replacing(model, patch, kept[site], pairs, corrupted, clean)
            patched = score_batch(model, score, corrupted, {site: replacing})
            scores[row, corrupted.prompts.cpu().numpy()] = patched.cpu().numpy()
    return scores


def _replacing(
    model: Model, patch: Patch, source: Tensor, pairs: Sequence[TokenizedPair], corrupted: Batch, clean: Batch
) -> Intervention:
    rows_of_clean = {number: row for row, number in enumerate(clean.prompts.tolist())}

    def replace(activation: Tensor) -> Tensor:
        changed, part = activation.clone(), part_of(model, patch, activation.shape[-1])
        for row, number in enumerate(corrupted.prompts.tolist()):
            pair = pairs[number]
            into, out_of = (torch.from_numpy(np.array(where)) for where in align(POSITIONS, pair.corrupted, pair.clean))
            changed[row, into, part] = source[rows_of_clean[number], out_of, part]
        return changed

    return replace


def _pairs(model: Model, count: int, seed: int) -> list[TokenizedPair]:
    """Aligned pairs, whatever the model does with them: it is time that is measured."""
    candidates = [pair for group in toxic_safe_pairs(PAIRS, None, 2 * count, seed) for pair in group]
    return [pair for pair in tokenize_pairs(model, candidates) if unaligned(POSITIONS, pair) is None][:count]


def _one_batch(model: Model, prompts: list[TokenizedPrompt]) -> Batch:
    (batch,) = make_batches(prompts, TemplateLayout.of(prompts), 10**9, model.device)
    return batch


def _largest_difference(
    ours: PatchRuns | Scores, loop: PatchRuns | Scores, patches: Sequence[Patch], looped: Sequence[Patch]
) -> float:
    """The largest absolute difference between the two ways' scores, in nats."""
    assert isinstance(ours, PatchRuns) and not isinstance(loop, PatchRuns)
    rows = [list(patches).index(patch) for patch in looped]
    return float(np.abs(ours.patched[rows] - loop[:, list(ours.pairs)]).max())


if __name__ == "__main__":
    main()
