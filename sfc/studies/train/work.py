"""What training takes: the rows, the steps of every dictionary, and what each is measured by afterwards."""

import torch

from sfc.core.config import SampleOptions
from sfc.core.sites import layer_of
from sfc.core.work import Amounts, Work
from sfc.models.work import Shape, passed, rows_of, scored, shapes_of, tokens_of
from sfc.saes.quality import ROWS_AT_ONCE
from sfc.saes.work import start_work, training_work
from sfc.studies.collect.fill import n_rows
from sfc.studies.sketch import Sketch
from sfc.studies.train import Train
from sfc.studies.train.probing import PROBED_PROMPTS
from sfc.studies.train.train import RESTORED_PROMPTS, SPLICED_PROMPTS

_SPLICINGS = 4
"""passes per dictionary: as it is, spliced, with the mean and with zero in its place"""
_PAGE_BYTES = 4_900_000
"""of `quality.html`, most of it plotly's own script"""
_DENSITY_BYTES = 59
"""a feature has in `density.csv`"""


def work(study: Train, sketch: Sketch) -> list[Work]:
    """The steps of `sfc train`, its own corpus' store among them; of dictionaries of others, only what is measured.

    Raises:
        UserError: as `sfc.studies.collect.work.work`, or the dictionaries' sizes cannot be found out.
    """
    run, saes = sketch.run, sketch.run.experiment.saes
    steps = [sketch.loading()]
    widths = list(sketch.widths.values())
    rows = training_rows(sketch)
    if not run.experiment.corpus.is_prompts_alone:
        steps.append(_corpus(sketch, rows))
    if saes.source is None:
        largest = max(widths, key=lambda width: width.d_in * width.d_sae)
        weights = sketch.sizes.weights
        for step in (start_work(saes, largest, len(widths), rows), training_work(saes, largest, len(widths), rows)):
            steps.append(Work(step.step, step.amounts, step.device + weights, step.host, step.kept))
    return [*steps, _measuring(sketch, rows)]


def training_rows(sketch: Sketch) -> int:
    """Rows that dictionaries learn from: those of the prompts, and about as many tokens as the corpus is to have."""
    run, prompts = sketch.run, sketch.circuit_prompts
    corpus = run.experiment.corpus
    sampled = SampleOptions.of(run.experiment).tokens if "sampled" in corpus.sources else 0
    files = [source for source in corpus.sources if source not in ("prompts", "sampled")]
    return n_rows(prompts) * ("prompts" in corpus.sources) + sampled + len(files) * (corpus.max_tokens or 0)


def _corpus(sketch: Sketch, rows: int) -> Work:
    """A corpus of other texts into a store of its own; how long they are is not known before they are read."""
    config = sketch.run.experiment.activations
    width = sum(sketch.known.outline.width(site) for site in sketch.sites)
    kept = rows * (width * getattr(torch, config.dtype).itemsize + 16)
    shapes = [Shape(1, config.batch_tokens)] * -(-rows // config.batch_tokens)
    in_use = sketch.in_use(config.batch_tokens) + config.batch_tokens * width * 6
    amounts = passed(shapes, layer_of(sketch.sites[-1]) + 1) + Amounts(written=kept)
    return Work(f"run a corpus of about {rows:,} rows", amounts, sketch.sizes.weights + in_use, kept=kept)


def _measuring(sketch: Sketch, rows: int) -> Work:
    """Held-out rows, what splicing costs, what features restore, and what they tell of prompts."""
    run, experiment, n_sites = sketch.run, sketch.run.experiment, len(sketch.widths)
    tokens, some = experiment.activations.batch_tokens, sketch.circuit_prompts
    mean = len(some) and sum(len(prompt.ids) for prompt in some) / len(some)
    spliced = shapes_of(some[:: max(len(some) // SPLICED_PROMPTS, 1)], tokens)
    pairs = shapes_of(some[:: max(len(some) // (2 * RESTORED_PROMPTS), 1)], tokens)
    restored = (n_sites + 1) * 2
    probed = 2 * PROBED_PROMPTS * mean
    suffix = sketch.suffix
    amounts = scored(spliced, suffix) * (1 + 3 * n_sites)
    amounts += Amounts(logits=tokens_of(spliced) * (1 + 3 * n_sites))  # the cross-entropy of every token
    amounts += passed(pairs, sketch.up_to_last) + scored(pairs, suffix) * restored
    amounts += passed([Shape(1, int(probed))], sketch.up_to_last)
    encoded = experiment.saes.held_out * rows + 2 * probed
    amounts += Amounts(encoded=encoded * n_sites, spliced=(n_sites * 3 + tokens_of(pairs)) * 1.0 * restored)
    largest = max((shape.tokens for shape in (*spliced, *pairs)), default=0)
    width = max(sketch.widths.values(), key=lambda width: width.d_sae)
    block = 4 * ROWS_AT_ONCE * width.d_sae * 2
    device = sketch.sizes.weights + sketch.dictionaries + max(sketch.in_use(largest), block)
    device += sketch.sizes.logits(max((shape.tokens for shape in spliced), default=0))
    host = 8 * 2 * PROBED_PROMPTS * width.d_sae * 4
    kept = _PAGE_BYTES + _DENSITY_BYTES * sum(width.d_sae for width in sketch.widths.values())
    itemsize = 4 * (experiment.saes.source is not None)
    kept += sum(width.weights(itemsize) for width in sketch.widths.values())
    return Work("measure", amounts, device, host, kept + 0 * rows_of(spliced))
