"""What `sfc sample` takes: batches of instructions and replies until there are as many tokens as are wanted."""

import numpy as np

from sfc.core.work import Work
from sfc.models.work import Shape, cache_bytes, replied
from sfc.studies.sample.study import Sample
from sfc.studies.sketch import Sketch

KEPT = 0.5
"""share of the instructions that are kept, taken without a measurement: models write more or fewer plain ones"""
_LINE_BYTES = 5.5
"""a token has in `sampled.jsonl`"""


def work(study: Sample, sketch: Sketch) -> list[Work]:
    """Its steps; what was written before is not written again."""
    run, sizes, options = sketch.run, sketch.sizes, study.of(sketch.run)
    artifact = run.sampled
    written = artifact.manifest()["n_tokens"] if artifact.is_complete() else 0
    lengths = [len(prompt.ids) for prompt in sketch.circuit_prompts]
    instruction = min(float(np.mean(lengths)), float(options.instruction_tokens))
    per_conversation = instruction + options.reply_tokens
    wanted = max(options.tokens - written, 0)
    batches = -(-wanted // max(int(options.batch * KEPT * per_conversation), 1))
    begun = Shape(options.batch, round(instruction / 2))
    asked = Shape(max(round(options.batch * KEPT), 1), round(instruction))
    tokens = options.batch * (options.instruction_tokens + options.reply_tokens)
    of_one = replied([begun], 1, options.instruction_tokens, sizes.n_layers, 4096)
    if options.reply_tokens:
        of_one += replied([asked], 1, options.reply_tokens, sizes.n_layers, 4096)
    in_use = cache_bytes(sizes, tokens) + sketch.in_use(begun.tokens) + sizes.logits(options.batch)
    kept = round(_LINE_BYTES * wanted)
    return [sketch.loading(), Work(f"write {wanted:,} tokens", of_one * batches, sizes.weights + in_use, kept=kept)]
