"""What collecting takes: every prompt through the blocks up to the last site, and the files of the store."""

from collections.abc import Sequence

import torch

from sfc.core.sites import layer_of
from sfc.core.work import Amounts, Work
from sfc.data.render import TokenizedPrompt
from sfc.models.work import Shape, passed
from sfc.saes.plan import plan_batches, plan_shards
from sfc.saes.unfinished import bytes_of_shard
from sfc.studies.collect import Collect
from sfc.studies.sketch import Sketch

_IN_FLIGHT = 3
"""batches of activations that are there at once: one that runs and those that wait to be written"""


def work(study: Collect, sketch: Sketch) -> list[Work]:
    """The steps of `sfc collect`.

    Raises:
        UserError: the prompts or the tokenizer cannot be read.
    """
    return [sketch.loading(), filling(sketch, sketch.circuit_prompts, study.sites(sketch.run))]


def filling(sketch: Sketch, sequences: Sequence[TokenizedPrompt], sites: Sequence[str]) -> Work:
    """Sequences through the model, and into a store."""
    config, sizes = sketch.run.experiment.activations, sketch.sizes
    batches = plan_batches(sequences, config, torch.device("cpu"))
    shapes = [Shape(*batch.batch.ids.shape) for batch in batches]
    largest = max(shape.tokens for shape in shapes)
    widths, dtype = {site: sketch.known.outline.width(site) for site in sites}, getattr(torch, config.dtype)
    kept = sum(
        bytes_of_shard(sum(batch.n_rows for batch in shard), widths, dtype)
        for shard in plan_shards(batches, config.shard_tokens)
    )
    rows = largest * sum(widths.values())
    return Work(
        f"run {len(sequences):,} prompts, {sum(batch.n_rows for batch in batches):,} rows",
        passed(shapes, layer_of(sites[-1]) + 1) + Amounts(written=kept),
        device=sizes.weights + sketch.in_use(largest) + rows * (sizes.itemsize + dtype.itemsize),
        host=_IN_FLIGHT * rows * dtype.itemsize,
        kept=kept,
    )
