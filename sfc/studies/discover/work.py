"""What discovering and judging circuits takes: of `sfc discover`, `sfc nulls` and `sfc evaluate`.

Prompts are chosen and paired as the studies do it, by their tokens; what depends on the model's replies is not known
beforehand, and there the data set's labels stand in. The steps are those that the artifacts' clocks tell apart.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sfc.circuits.faithfulness import curve_sizes
from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.circuits.work import Asked, ablated, edges, effects_bytes, one_by_one
from sfc.core.work import Amounts, Work
from sfc.data.counterfactual import counterfactual_pairs
from sfc.data.prepare import balance
from sfc.data.render import Role, TokenizedPrompt
from sfc.data.schema import ALL
from sfc.models.work import Shape, cache_bytes, passed, replied, rows_of, scored, shapes_of, tokens_of
from sfc.studies.sketch import Sketch
from sfc.studies.study import Study


class Question(NamedTuple):
    """The prompts of one group, in batches."""

    asked: Asked
    test: Sequence[Shape]
    """the test prompts, or pairs, that are explained"""
    served: Sequence[Shape]
    """the prompts whose runs are recorded: every counterfactual once, or what the baseline is a mean of"""
    recorded: int
    """bytes of what is recorded"""
    unique: Sequence[Shape]
    """the prompts of all pairs, each once"""
    by_means: Sequence[Shape]
    """all test prompts of the group; none where circuits are not judged by means as well"""
    positive: float
    """the share of them on the positive side"""


def question(sketch: Sketch, category: str) -> Question:
    """The prompts that a circuit is found and judged by.

    Raises:
        UserError: the group lacks prompts.
    """
    run, experiment = sketch.run, sketch.run.experiment
    config, frame = DiscoveryOptions.of(experiment), run.prompts.frame
    everyone = balance(frame, None, experiment.prompts.hard_share, experiment.seed)[0]
    group = None if category == ALL else category
    used = balance(frame, group, experiment.prompts.hard_share, experiment.seed)[0]
    table, sequences = sketch.short_enough(pd.concat([used, everyone]).drop_duplicates("id"))
    ids, split, positive = set(used["id"]), table["split"], table["refusal_label"].astype(bool)
    is_used = table["id"].isin(ids)
    batch_tokens = experiment.activations.batch_tokens

    def batches(numbers: Sequence[int]) -> list[Shape]:
        return shapes_of([sequences[i] for i in numbers], batch_tokens)

    reference = np.flatnonzero((split == "reference") & ~positive).tolist()
    of_test = np.flatnonzero((split == "test") & is_used).tolist()
    has_sides = run.behavior.has_own_saes and config.contrast in ("toxic-safe", "toxic-hard")
    if config.baseline_choice == "counterfactual":
        described = table.assign(
            positive=positive,
            length=[len(sequence.ids) for sequence in sequences],
            first_token=[int(sequence.ids[0]) for sequence in sequences],
        )[split.isin(["discovery", "test"])]
        pairs = counterfactual_pairs(described, is_used, config.pairs_per_prompt, experiment.seed).table
        of_split = {name: pairs.loc[pairs["split"] == name, "prompt"].tolist() for name in ("discovery", "test")}
        served, unique = pairs["counterfactual"].unique().tolist(), pairs["prompt"].unique().tolist()
    else:
        explained = is_used & (positive == config.explains_positives)
        of_split = {name: np.flatnonzero(explained & (split == name)).tolist() for name in ("discovery", "test")}
        served, unique = reference, [*of_split["discovery"], *of_split["test"]]
    tokens = sum(len(sequences[i].ids) for i in served)
    needs_saes = NODES[config.nodes].needs_saes
    asked = Asked(
        experiment, sketch.sites, sketch.sizes.n_layers,
        sum(width.d_sae + 1 for width in sketch.widths.values()) if needs_saes else len(sketch.sites),
        batches(of_split["discovery"]), _suffix(sequences[0]),
    )  # fmt: skip
    return Question(
        asked,
        batches(of_split["test"]),
        batches([*served, *(reference if has_sides else [])]),
        tokens * sum(width.recorded for width in sketch.widths.values()),
        batches(unique),
        batches(of_test) if has_sides else [],
        float(positive[of_test].mean()) if len(of_test) else 0.0,
    )


def _suffix(prompt: TokenizedPrompt) -> int:
    return int((prompt.roles == Role.SUFFIX).sum())


def work(study: Study[Any], sketch: Sketch) -> list[Work]:
    """The steps of `sfc discover`.

    Raises:
        UserError: as `question`.
    """
    run, experiment = sketch.run, sketch.run.experiment
    config, evaluation = DiscoveryOptions.of(experiment), EvaluationOptions.of(experiment)
    asks = question(sketch, run.group(config.category))
    asked, resident = asks.asked, held(sketch, asks)
    sizes, members = curve_sizes(evaluation.sizes, asked.n_nodes), min(config.edge_nodes, max(evaluation.sizes))
    some = share_of(asked.discovery, config.edge_prompts)
    checked = share_of(asked.discovery, config.checked_prompts)
    published = len(sizes) + 1 + len(sketch.sites)
    positive = _positive(asks)
    steps = [
        sketch.loading(),
        preparing(sketch, asks),
        ranking(sketch, asks),
        runs(sketch, asks, "choosing a size", asked.discovery, len(sizes) + 1),
    ]
    if NODES[config.nodes].has_edges:
        steps.append(Work("edges", edges(asked, some, members), resident + _gradients(sketch, some)))
    steps += [
        *judging(sketch, asks, len(sizes), evaluation),
        runs(sketch, asks, "approximation check", checked, 0, one_by_one(asked, checked, 2 * config.checked_nodes)),
        _features(sketch, asks),
        runs(sketch, asks, "controls", positive, len(sketch.sites) * 2 + 2 * published, kept=_CIRCUIT_BYTES),
    ]
    return steps


_CIRCUIT_BYTES = 9_700_000
"""of a circuit of 2,000 nodes with 300 cards: its page, of which plotly's script is 4.8 MB, its JSON and its tables"""
_BOOTSTRAP = 0.012
"""seconds of one core for the intervals of a circuit's figures, measured on 195 pairs and 70 prompts"""


def held(sketch: Sketch, asks: Question) -> int:
    """Bytes that lie where the model is as long as circuits are found and judged: model, dictionaries, what was recorded,
    and the residual streams from which runs start."""
    cached = sum(map(tokens_of, (asks.asked.discovery, asks.test, asks.by_means)))
    streams = cached * sketch.sizes.d_model * sketch.sizes.itemsize
    return sketch.sizes.weights + sketch.dictionaries + asks.recorded + streams


def preparing(sketch: Sketch, asks: Question) -> Work:
    """Baselines are recorded, and every prompt is run up to the first site."""
    n_sites, blocks = len(sketch.sites), sketch.first_block
    amounts = passed(asks.served, sketch.up_to_last) + Amounts(encoded=tokens_of(asks.served) * n_sites)
    amounts += passed([*asks.unique, *asks.by_means], blocks)
    amounts += scored(share_of(asks.unique, rows_of(asks.unique) // 2), sketch.sizes.n_layers)
    largest = max((shape.tokens for shape in (*asks.served, *asks.unique)), default=0)
    return Work("prepare", amounts, held(sketch, asks) + sketch.in_use(largest))


def ranking(sketch: Sketch, asks: Question) -> Work:
    """Every node's effect."""
    asked, counted = asks.asked, METHODS[DiscoveryOptions.of(sketch.run.experiment).method].work
    on_device, host = effects_bytes(asked, asked.discovery)
    device = held(sketch, asks) + max(_gradients(sketch, asked.discovery), on_device)
    return Work("effects", counted(asked) if counted else Amounts(), device, host)


def runs(
    sketch: Sketch, asks: Question, step: str, shapes: Sequence[Shape], circuits: int,
    further: Amounts | None = None, kept: int = 0,
) -> Work:  # fmt: skip
    """Circuits scored on prompts."""
    amounts = ablated(asks.asked, shapes, circuits) + scored(shapes, asks.asked.blocks) + (further or Amounts())
    tokens = max((max(shape.tokens, _PACKED) for shape in shapes), default=0)
    rows = max((shape.rows * max(1, _PACKED // shape.tokens) for shape in shapes), default=0)
    masks = 5 * circuits * asks.asked.n_nodes
    width = max(sketch.widths.values(), key=lambda width: width.d_sae)
    encoding = 3 * 4 * tokens * width.d_sae
    device = held(sketch, asks) + max(sketch.in_use(tokens), encoding) + sketch.sizes.logits(rows)
    return Work(step, amounts, device, masks, kept)


_PACKED = 2048


def judging(sketch: Sketch, asks: Question, n_sizes: int, evaluation: EvaluationOptions) -> list[Work]:
    """A curve of circuits on test prompts, and replies under the reported one."""
    asked, positive = asks.asked, _positive(asks)
    # Every circuit alone and ablated, the last site's, and as many random ones; on the sides and in pairs, each once.
    curve = ablated(asked, positive, 1 + (3 + 2 * evaluation.random_draws) * n_sizes)
    both_sides = ablated(asked, asks.by_means, 2 * n_sizes + 1) + ablated(asked, asks.test, n_sizes + 4)
    rates = Amounts(encoded=tokens_of(asks.unique) * len(sketch.sites), seconds=n_sizes * _BOOTSTRAP)
    host = 4 * rows_of(asks.unique) * asked.n_nodes + (4 + 2 * evaluation.random_draws) * n_sizes * asked.n_nodes
    scored_runs = runs(sketch, asks, "evaluation", asks.test, 0, curve + both_sides + rates)
    steps = [Work("evaluation", scored_runs.amounts, scored_runs.device, host)]
    if evaluation.replies:
        steps.append(replying(sketch, asks, 3 * evaluation.replies, 3, evaluation.reply_tokens))
    return steps


def replying(sketch: Sketch, asks: Question, prompts: int, circuits: int, new_tokens: int) -> Work:
    """Replies of the model as it is and under some circuits."""
    some, n_layers = share_of(asks.by_means or asks.test, prompts), sketch.sizes.n_layers
    amounts = replied(some, 1, new_tokens, n_layers, 2 * _PACKED) + replied(some, circuits, new_tokens, n_layers, 2 * _PACKED)
    amounts += Amounts(spliced=circuits * tokens_of(some) * len(sketch.sites))
    return Work("replies", amounts, held(sketch, asks) + cache_bytes(sketch.sizes, 2 * _PACKED) + sketch.in_use(2 * _PACKED))


def _features(sketch: Sketch, asks: Question) -> Work:
    """What the shown features fire on in the store."""
    from sfc.studies.train.work import training_rows

    stored = training_rows(sketch)
    return Work("features", Amounts(encoded=stored * len(sketch.sites)), held(sketch, asks))


def _positive(asks: Question) -> list[Shape]:
    """Batches of the prompts that faithfulness is measured on."""
    shapes = asks.by_means
    return share_of(shapes, round(asks.positive * rows_of(shapes))) if shapes else list(asks.test)


def share_of(shapes: Sequence[Shape], prompts: int) -> list[Shape]:
    """So many of the prompts, the same share of every batch."""
    share = min(prompts / max(rows_of(shapes), 1), 1.0)
    return [Shape(round(shape.rows * share), shape.width) for shape in shapes if round(shape.rows * share)]


def _gradients(sketch: Sketch, shapes: Sequence[Shape]) -> int:
    """Bytes that the backward pass of the largest batch needs."""
    return sketch.suffix * sketch.in_use(max((shape.tokens for shape in shapes), default=0))


def work_of_nulls(study: Study[Any], sketch: Sketch) -> list[Work]:
    """The steps of `sfc nulls`: the method on random and on rotated dictionaries.

    Raises:
        UserError: as `question`.
    """
    run, evaluation = sketch.run, EvaluationOptions.of(sketch.run.experiment)
    asks = question(sketch, run.group(DiscoveryOptions.of(run.experiment).category))
    n_sizes = len(curve_sizes(evaluation.sizes, asks.asked.n_nodes))
    rank = ranking(sketch, asks)
    judged = runs(sketch, asks, "", asks.test, n_sizes + 1)
    encoded = Amounts(encoded=tokens_of(asks.served) * len(sketch.sites), seconds=n_sizes * _BOOTSTRAP)
    device = max(rank.device, judged.device) + sketch.dictionaries + asks.recorded
    of_one = rank.amounts + judged.amounts + encoded
    return [
        sketch.loading(),
        preparing(sketch, asks),
        *(Work(f"{name} dictionaries", of_one * evaluation.null_draws, device, rank.host) for name in ("random", "rotated")),
    ]


def work_of_evaluation(study: Study[Any], sketch: Sketch) -> list[Work]:
    """The steps of `sfc evaluate`, every circuit with the sizes of a curve, on the group's own test prompts.

    Raises:
        UserError: as `question`.
    """
    run, evaluation = sketch.run, EvaluationOptions.of(sketch.run.experiment)
    options = study.of(run)
    asks, circuits = question(sketch, run.group(options.category)), max(len(options.circuits), 1)
    n_sizes = len(curve_sizes(evaluation.sizes, asks.asked.n_nodes))
    steps = judging(sketch, asks, n_sizes, evaluation)
    return [
        sketch.loading(),
        preparing(sketch, asks),
        *(Work(step.step, step.amounts * circuits, step.device, step.host) for step in steps),
    ]
