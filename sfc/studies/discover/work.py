"""What discovering and judging circuits takes: the steps of `sfc discover`, `sfc nulls` and `sfc evaluate`.

Prompts are chosen and paired by their tokens, as the studies do it. What depends on the model's replies is not known
beforehand: the data set's labels stand in for them. Steps have the names that artifacts' clocks give them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sfc.circuits.faithfulness import FEWEST_DRAWS, curve_sizes
from sfc.circuits.gradients import GRADIENT_TOKENS
from sfc.circuits.methods import METHODS, LearnedMaskOptions
from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.circuits.work import Asked, ablated, edges, effects_bytes, one_by_one
from sfc.core.work import Amounts, Work
from sfc.data.counterfactual import counterfactual_pairs
from sfc.data.prepare import balance
from sfc.data.render import Role
from sfc.data.schema import ALL
from sfc.models.batches import PACKED_TOKENS
from sfc.models.work import Shape, cache_bytes, passed, replied, rows_of, scored, shapes_of, some_of, tokens_of
from sfc.studies.collect.fill import n_rows
from sfc.studies.sketch import Sketch
from sfc.studies.study import Study

_INTERVALS = 0.05
"""seconds of one core for the intervals of a circuit's figures, of 195 pairs and 70 prompts"""
_CARD = 0.015
"""seconds of one core for what is known of a feature: the 300 of the embedded model's circuit took 6 s of two"""
_CARDS = 300
_CIRCUIT_BYTES = 9_700_000
"""of a circuit of 2,000 nodes: its page, of which plotly's own script is 4.8 MB, its JSON, its cards and tables"""
_NO_METHOD = "the method {} searches as long as it takes: its step is not counted"


class Question(NamedTuple):
    """The prompts of one group, in batches."""

    asked: Asked
    test: Sequence[Shape]
    """the test prompts, or pairs, that are explained"""
    served: Sequence[Shape]
    """the prompts that baselines come from: every counterfactual once, and those that means are taken of"""
    recorded: int
    """tokens that counterfactuals are kept of"""
    explained: Sequence[Shape]
    """the prompts that are explained, each once"""
    by_means: Sequence[Shape]
    """all test prompts of the group; none where circuits are not judged by means as well"""
    positive: float
    """the share of them on the positive side"""

    @property
    def positives(self) -> Sequence[Shape]:
        """Batches of what faithfulness is measured on: the positive prompts, where there are means."""
        return some_of(self.by_means, round(self.positive * rows_of(self.by_means))) if self.by_means else self.test


def question(sketch: Sketch, group: str) -> Question:
    """The prompts that a circuit is found and judged by.

    Raises:
        UserError: the group lacks prompts.
    """
    run, experiment = sketch.run, sketch.run.experiment
    config, prompts = DiscoveryOptions.of(experiment), experiment.prompts
    everyone, used = (
        balance(run.prompts.frame, of, prompts.hard_share, experiment.seed)[0]
        for of in (None, None if group == ALL else group)
    )
    table, sequences = sketch.short_enough(pd.concat([used, everyone]).drop_duplicates("id"))
    split, positive = table["split"], table["refusal_label"].astype(bool)
    is_used = table["id"].isin(set(used["id"]))

    def batches(chosen: Sequence[int]) -> list[Shape]:
        return shapes_of([sequences[i] for i in chosen], experiment.activations.batch_tokens)

    reference = np.flatnonzero((split == "reference") & ~positive).tolist()
    has_sides = run.behavior.has_own_saes and config.contrast in ("toxic-safe", "toxic-hard")
    is_paired, pooled = config.baseline_choice == "counterfactual", []
    if is_paired:
        lengths, first = [len(each.ids) for each in sequences], [int(each.ids[0]) for each in sequences]
        described = table.assign(positive=positive, length=lengths, first_token=first)
        described = described[split.isin(["discovery", "test"])]
        pairs = counterfactual_pairs(described, is_used, config.pairs_per_prompt, experiment.seed).table
        of_split = {name: pairs.loc[pairs["split"] == name, "prompt"].tolist() for name in ("discovery", "test")}
        served, explained = (pairs[column].unique().tolist() for column in ("counterfactual", "prompt"))
        if group != ALL and config.contrast != "refused-complied" and _learns_from_all(sketch):
            pooled = np.flatnonzero(split == "discovery").tolist()
    else:
        is_explained = is_used & (positive == config.explains_positives)
        of_split = {name: np.flatnonzero(is_explained & (split == name)).tolist() for name in ("discovery", "test")}
        served, explained = [], [*of_split["discovery"], *of_split["test"]]
    of_test = np.flatnonzero((split == "test") & is_used).tolist() if has_sides else []
    widths = sketch.widths.values() if NODES[config.nodes].needs_saes else ()
    tokens = sum(len(sequences[i].ids) for i in {*served, *pooled})
    return Question(
        Asked(
            experiment,
            sketch.sites,
            sketch.sizes.n_layers,
            sum(width.d_sae + 1 for width in widths) or len(sketch.sites),
            batches(of_split["discovery"]),
            int((sequences[0].roles == Role.SUFFIX).sum()),
            batches(pooled),
        ),
        test=batches(of_split["test"]),
        served=batches([*served, *(reference if has_sides or not is_paired else [])]),
        recorded=tokens,
        explained=batches(explained),
        by_means=batches(of_test),
        positive=float(positive[of_test].mean()) if of_test else 0.0,
    )


def _learns_from_all(sketch: Sketch) -> bool:
    """Whether the method takes the discovery prompts of all groups as well: only learned masks do."""
    experiment = sketch.run.experiment
    options = METHODS[DiscoveryOptions.of(experiment).method].options
    return options is LearnedMaskOptions and options.of(experiment).pooled > 0


def work(study: Study[Any], sketch: Sketch) -> list[Work]:
    """The steps of `sfc discover`.

    Raises:
        UserError: as `question`.
    """
    run, experiment, sites = sketch.run, sketch.run.experiment, len(sketch.sites)
    config, evaluation = DiscoveryOptions.of(experiment), EvaluationOptions.of(experiment)
    asks = question(sketch, run.group(config.category))
    asked, test = asks.asked, asks.test
    sizes = curve_sizes(evaluation.sizes, asked.n_nodes)
    few, checked = (some_of(asked.discovery, most) for most in (config.edge_prompts, config.checked_prompts))
    between = edges(asked, few, min(config.edge_nodes, sizes[-1])) if NODES[config.nodes].has_edges else Amounts()
    # Sites alone, the areas under two curves, all features on all pairs, and the circuit ablated on the negative side.
    controls = ablated(asked, asks.positives, 2 * sites + 2 * (len(sizes) + 2)) + ablated(asked, test, 2)
    stored = n_rows(sketch.circuit_prompts)
    cards = Amounts(encoded=stored * sites, seconds=_CARD * _CARDS)
    return [
        sketch.loading(),
        preparing(sketch, asks),
        ranking(sketch, asks),
        running(sketch, asks, "choosing a size", asked.discovery, ablated(asked, asked.discovery, len(sizes) + 1)),
        Work("edges", between, held(sketch, asks) + _gradients(sketch, few)),
        *judging(sketch, asks, len(sizes), evaluation),
        running(sketch, asks, "approximation check", checked, one_by_one(asked, checked, 2 * config.checked_nodes)),
        Work("features", cards, held(sketch, asks)),
        replace(running(sketch, asks, "controls", test, controls), kept=_CIRCUIT_BYTES),
    ]


def work_of_nulls(study: Study[Any], sketch: Sketch) -> list[Work]:
    """The steps of `sfc nulls`: the method on random and on rotated dictionaries.

    Raises:
        UserError: as `question`.
    """
    run, evaluation = sketch.run, EvaluationOptions.of(sketch.run.experiment)
    asks = question(sketch, run.group(DiscoveryOptions.of(run.experiment).category))
    n_sizes = len(curve_sizes(evaluation.sizes, asks.asked.n_nodes))
    rank = ranking(sketch, asks)
    judged = running(sketch, asks, "", asks.test, ablated(asks.asked, asks.test, n_sizes + 1))
    encoded = Amounts(encoded=tokens_of(asks.served) * len(sketch.sites), seconds=n_sizes * _INTERVALS)
    amounts = (rank.amounts + judged.amounts + encoded) * evaluation.null_draws
    # Null dictionaries beside the trained ones, and what they make of the same recorded runs.
    features = asks.recorded * sum(width.recorded_features for width in sketch.widths.values())
    device = max(rank.device, judged.device) + sketch.dictionaries + features
    null = Work("", amounts, device, rank.host, note=rank.note)
    return [
        sketch.loading(),
        preparing(sketch, asks),
        *(replace(null, step=f"{name} dictionaries") for name in ("random", "rotated")),
    ]


def work_of_evaluation(study: Study[Any], sketch: Sketch) -> list[Work]:
    """The steps of `sfc evaluate`, every circuit with the sizes of a curve, on the group's own test prompts.

    Raises:
        UserError: as `question`.
    """
    run, options, evaluation = sketch.run, study.of(sketch.run), EvaluationOptions.of(sketch.run.experiment)
    asks, circuits = question(sketch, run.group(options.category)), max(len(options.circuits), 1)
    steps = judging(sketch, asks, len(curve_sizes(evaluation.sizes, asks.asked.n_nodes)), evaluation)
    steps = [replace(step, amounts=step.amounts * circuits) for step in steps]
    return [sketch.loading(), preparing(sketch, asks), *steps]


def held(sketch: Sketch, asks: Question) -> int:
    """Bytes where the model is as long as circuits are found and judged.

    They are those of model and dictionaries, of what is recorded, and of the residual streams that runs start from.
    """
    cached = sum(map(tokens_of, (asks.asked.discovery, asks.test, asks.by_means)))
    streams = cached * sketch.sizes.d_model * sketch.sizes.itemsize * (sketch.first_block > 0)
    recorded = asks.recorded * sum(width.recorded(sketch.sizes.itemsize) for width in sketch.widths.values())
    return sketch.sizes.weights + sketch.dictionaries + recorded + streams


def preparing(sketch: Sketch, asks: Question) -> Work:
    """Baselines are recorded, every prompt is run up to the first site, and the two sides are scored."""
    amounts = passed(asks.served, sketch.up_to_last) + Amounts(encoded=tokens_of(asks.served) * len(sketch.sites))
    amounts += passed([*asks.explained, *asks.by_means], sketch.first_block)
    amounts += scored(some_of(asks.explained, rows_of(asks.explained) // 2), sketch.sizes.n_layers)
    return running(sketch, asks, "prepare", [*asks.served, *asks.explained], amounts)


def ranking(sketch: Sketch, asks: Question) -> Work:
    """Every node's effect."""
    asked, method = asks.asked, METHODS[DiscoveryOptions.of(sketch.run.experiment).method]
    on_device, host = effects_bytes(asked, asked.discovery)
    device = held(sketch, asks) + max(_gradients(sketch, asked.discovery), on_device)
    note = "" if method.work else _NO_METHOD.format(method.name)
    return Work("effects", method.work(asked) if method.work else Amounts(), device, host, note=note)


def running(sketch: Sketch, asks: Question, step: str, shapes: Sequence[Shape], amounts: Amounts) -> Work:
    """A step in which prompts are run without gradients and dictionaries spliced in; `amounts` is what it takes."""
    tokens = max((max(shape.tokens, PACKED_TOKENS) for shape in shapes), default=0)
    rows = max((shape.rows * max(1, PACKED_TOKENS // shape.tokens) for shape in shapes), default=0)
    plain = scored(shapes, asks.asked.blocks)
    device = held(sketch, asks) + max(sketch.in_use(tokens), sketch.encoding(tokens)) + sketch.sizes.logits(rows)
    return Work(step, amounts + plain, device)


def judging(sketch: Sketch, asks: Question, n_sizes: int, evaluation: EvaluationOptions) -> list[Work]:
    """A curve of circuits on test prompts, and replies under the reported one."""
    asked, draws = asks.asked, min(FEWEST_DRAWS, evaluation.random_draws)
    # Every circuit alone and ablated, the last site's, and random ones; then on both sides, and in pairs.
    circuits = 1 + (3 + 2 * draws) * n_sizes
    amounts = ablated(asked, asks.positives, circuits) + ablated(asked, asks.by_means, 2 * n_sizes + 1)
    amounts += ablated(asked, asks.test, n_sizes + 1) + scored(asks.test, asked.blocks)
    amounts += Amounts(encoded=tokens_of(asks.explained) * len(sketch.sites), seconds=n_sizes * _INTERVALS)
    scoring = running(sketch, asks, "evaluation", asks.test, amounts)
    host = (4 * rows_of(asks.explained) + circuits) * asked.n_nodes
    steps = [replace(scoring, host=host)]
    if evaluation.replies:
        steps.append(replying(sketch, asks, 3 * evaluation.replies, 3, evaluation.reply_tokens))
    return steps


def replying(sketch: Sketch, asks: Question, prompts: int, circuits: int, new_tokens: int) -> Work:
    """Replies of the model as it is and under some circuits."""
    some, n_layers, tokens = some_of(asks.by_means or asks.test, prompts), sketch.sizes.n_layers, 2 * PACKED_TOKENS
    amounts = replied(some, 1, new_tokens, n_layers, tokens) + replied(some, circuits, new_tokens, n_layers, tokens)
    amounts += Amounts(spliced=circuits * tokens_of(some) * len(sketch.sites))
    in_use = cache_bytes(sketch.sizes, tokens) + max(sketch.in_use(tokens), sketch.encoding(tokens))
    return Work("replies", amounts, held(sketch, asks) + in_use)


def _gradients(sketch: Sketch, shapes: Sequence[Shape]) -> int:
    """Bytes that the largest backward pass needs."""
    largest = max(shapes, key=lambda shape: shape.tokens, default=Shape(0, 0))
    at_once = min(largest.tokens, max(GRADIENT_TOKENS, largest.width))
    return sketch.gradients(at_once, sketch.suffix) + sketch.encoding(largest.tokens)
