"""What `sfc behaviour` takes: a score and a short reply for every prompt."""

from sfc.core.work import Work
from sfc.models.work import cache_bytes, replied, scored, shapes_of
from sfc.studies.behaviour import Behaviour, asked
from sfc.studies.behaviour.measure import BATCH_TOKENS, REPLY_TOKENS
from sfc.studies.sketch import Sketch


def work(study: Behaviour, sketch: Sketch) -> list[Work]:
    """Its steps.

    Raises:
        UserError: there are no such prompts.
    """
    sizes, prompts = sketch.sizes, sketch.short_enough(asked(sketch.run)).sequences
    groups = shapes_of(prompts, BATCH_TOKENS, REPLY_TOKENS)
    amounts = scored(groups, sizes.n_layers) + replied(groups, 1, REPLY_TOKENS, sizes.n_layers, BATCH_TOKENS)
    rows = max((shape.rows for shape in groups), default=0)
    in_use = cache_bytes(sizes, BATCH_TOKENS) + sketch.in_use(BATCH_TOKENS) + sizes.logits(rows)
    return [sketch.loading(), Work(f"answer {len(prompts):,} prompts", amounts, sizes.weights + in_use)]
