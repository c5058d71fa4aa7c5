"""What training takes: the rows, the steps of every dictionary, and what each is measured by afterwards."""

from dataclasses import replace

import torch

from sfc.core.config import SampleOptions
from sfc.core.sites import layer_of
from sfc.core.work import Amounts, Work
from sfc.data.corpus import PROMPTS, SAMPLED
from sfc.models.work import Shape, passed, scored, shapes_of, some_of, tokens_of
from sfc.saes.architectures import WEIGHTS_FILE
from sfc.saes.quality import ROWS_AT_ONCE
from sfc.saes.source import local_dictionaries
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

    Where the activations are stored already the model is loaded no earlier than it measures.

    Raises:
        UserError: as `sfc.studies.collect.fill.work`, or the dictionaries' sizes cannot be found out.
    """
    run, saes, rows = sketch.run, sketch.run.experiment.saes, training_rows(sketch)
    widths, measuring = list(sketch.widths.values()), _measuring(sketch, rows)
    if saes.source is not None:
        return [sketch.loading(), _adopted(sketch), measuring]
    largest = max(widths, key=lambda width: width.d_in * width.d_sae)
    steps = [make(saes, largest, len(widths), rows) for make in (start_work, training_work)]
    if run.corpus.is_complete():
        return [*steps, sketch.loading(), measuring]
    steps = [replace(step, device=step.device + sketch.sizes.weights) for step in steps]
    filled = [] if run.experiment.corpus.is_prompts_alone else [_corpus(sketch, rows)]
    return [sketch.loading(), *filled, *steps, measuring]


def training_rows(sketch: Sketch) -> int:
    """Rows that dictionaries learn from: those of the prompts, and about as many tokens as the corpus is to have."""
    run, prompts = sketch.run, sketch.circuit_prompts
    corpus = run.experiment.corpus
    sampled = SampleOptions.of(run.experiment).tokens if SAMPLED in corpus.sources else 0
    files = [source for source in corpus.sources if source not in (PROMPTS, SAMPLED)]
    return n_rows(prompts) * (PROMPTS in corpus.sources) + sampled + len(files) * (corpus.max_tokens or 0)


def _corpus(sketch: Sketch, rows: int) -> Work:
    """A corpus of other texts into a store of its own; how long they are is not known before they are read."""
    config = sketch.run.experiment.activations
    width = sum(sketch.known.outline.width(site) for site in sketch.sites)
    kept = rows * (width * getattr(torch, config.dtype).itemsize + 16)
    shapes = [Shape(1, config.batch_tokens)] * -(-rows // config.batch_tokens)
    in_use = sketch.in_use(config.batch_tokens) + config.batch_tokens * width * 6
    amounts = passed(shapes, layer_of(sketch.sites[-1]) + 1) + Amounts(written=kept)
    corpus = sketch.run.experiment.corpus
    files = [source for source in corpus.sources if source not in (PROMPTS, SAMPLED)]
    note = f"{', '.join(files)}: taken to have {corpus.max_tokens or 0:,} tokens (corpus.max_tokens)" if files else ""
    device = sketch.sizes.weights + in_use
    return Work(f"run a corpus of about {rows:,} rows", amounts, device, kept=kept, note=note)


def _measuring(sketch: Sketch, rows: int) -> Work:
    """What splicing costs, what features restore and tell of prompts, and how well held-out rows are reconstructed."""
    saes, n_sites, suffix = sketch.run.experiment.saes, len(sketch.sites), sketch.suffix
    prompts, batch_tokens = sketch.circuit_prompts, sketch.run.experiment.activations.batch_tokens
    unseen = shapes_of(prompts[:: max(round(1 / saes.held_out), 1)] if saes.held_out else prompts, batch_tokens)
    spliced, pairs = some_of(unseen, SPLICED_PROMPTS), some_of(unseen, 2 * RESTORED_PROMPTS)
    probed = some_of(shapes_of(prompts, batch_tokens), 2 * PROBED_PROMPTS)
    runs = 1 + (_SPLICINGS - 1) * n_sites
    # The cross-entropy of every token; then every site alone and all in series, with nothing and everything kept.
    amounts = (passed(spliced, suffix) + Amounts(logits=tokens_of(spliced))) * runs
    amounts += passed(pairs, sketch.up_to_last) + scored(pairs, suffix) * (2 * (n_sites + 1))
    amounts += passed(probed, sketch.up_to_last)
    encoded = saes.held_out * rows + 2 * tokens_of(probed) + tokens_of(spliced)
    amounts += Amounts(encoded=encoded * n_sites, spliced=2 * 2 * n_sites * tokens_of(pairs))
    largest, losses = (max((shape.tokens for shape in shapes), default=0) for shapes in ((*spliced, *pairs), spliced))
    in_use = max(sketch.in_use(largest), sketch.encoding(max(largest, ROWS_AT_ONCE))) + sketch.sizes.logits(losses)
    d_sae = [width.d_sae for width in sketch.widths.values()]
    return Work(
        "measure",
        amounts,
        sketch.sizes.weights + sketch.dictionaries + in_use,
        host=2 * 8 * 2 * PROBED_PROMPTS * max(d_sae),
        kept=_PAGE_BYTES + _DENSITY_BYTES * sum(d_sae),
    )


def _adopted(sketch: Sketch) -> Work:
    """Dictionaries of others are copied, and checked on held-out rows with all the others."""
    source = sketch.run.experiment.saes.source
    folders = local_dictionaries(source, sketch.sites) if source else {}
    files = [folders[site] / WEIGHTS_FILE for site in sketch.sites if site in folders]
    here = sum(file.stat().st_size for file in files if file.is_file())
    kept = here + sum(width.weights(4) for site, width in sketch.widths.items() if site not in folders)
    return Work(f"take {len(sketch.sites)} dictionaries", Amounts(written=kept), sketch.sizes.weights, kept=kept)
