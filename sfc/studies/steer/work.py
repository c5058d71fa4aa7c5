"""What `sfc steer` takes: directions learned from prompts, tried, and swept over prompts and replies."""

from collections.abc import Sequence

from sfc.core.work import Amounts, Work
from sfc.data.render import Role
from sfc.models.work import Shape, cache_bytes, packed, passed, replied, rows_of, scored, shapes_of
from sfc.studies.sketch import Sketch
from sfc.studies.steer import Steer
from sfc.studies.steer.learning import SPREAD_LAYERS

_PACKED = 2048
_FILES = 12_000_000
"""bytes of its page and tables, about, with default options"""


def work(study: Steer, sketch: Sketch) -> list[Work]:
    """Its steps, without XSTest's prompts and without conditions.

    Raises:
        UserError: the group lacks prompts.
    """
    run, sizes, options = sketch.run, sketch.sizes, study.of(sketch.run)
    n_layers, half = sizes.n_layers, max(sizes.n_layers // 2, 1)
    frame = run.balanced(run.group(options.category))
    n_sides = frame["refusal_label"].value_counts()
    prompts = sketch.short_enough(frame).sequences
    suffix = max(int((prompts[0].roles == Role.SUFFIX).sum()), 1)

    def some(per_side: int) -> Sequence[Shape]:
        return shapes_of(prompts[: 2 * min(per_side, int(n_sides.min()))], _PACKED)

    def suffixes(shapes: Sequence[Shape]) -> list[Shape]:
        return [Shape(shape.rows, min(suffix, shape.width)) for shape in shapes]

    def answered(shapes: Sequence[Shape], settings: int) -> Amounts:
        """Every prompt as it is, and under every setting; what stands before the suffix is run once."""
        steered = replied(suffixes(shapes), settings + 1, options.reply_tokens, n_layers, _PACKED)
        return passed(shapes, n_layers) + steered

    n_dial, n_sites = len(options.dial), len(options.kinds) * (len(options.layers) or min(SPREAD_LAYERS, n_layers))
    learned, tried, tested = (some(n) for n in (options.prompts, options.tried_prompts, options.test_prompts))
    learning = scored(learned, n_layers)
    if "refused-complied" in options.wanted_contrasts:
        learning += replied(learned, 1, options.reply_tokens, n_layers, 2 * _PACKED)
    # Both sides once, and the safe one again for the divergence.
    trying = packed(suffixes(tried), n_sites * suffix, half) * 1.5
    ordinary = [Shape(options.ordinary_prompts, shape.width) for shape in tested[-1:]]
    replies = replied(ordinary, 1, options.ordinary_tokens, n_layers, _PACKED) * 2
    with_replies = [Shape(options.ordinary_prompts, suffix + options.ordinary_tokens)]
    cost = Amounts(logits=options.ordinary_prompts * options.ordinary_tokens) + passed(with_replies, n_layers)
    alphas = answered(tried, n_dial) * 0.5 + replies + cost * n_dial
    sweep = answered(tested, n_dial * options.swept_layers) + cost * (n_dial * options.swept_layers)
    controls = answered(tested, options.random_directions + options.shuffled_directions)
    in_use = sizes.weights + cache_bytes(sizes, 2 * _PACKED) + sketch.in_use(2 * _PACKED)
    in_use += sizes.logits(max(options.ordinary_prompts * options.ordinary_tokens, _PACKED / suffix))
    host = 4 * rows_of(learned) * suffix * n_sites * sizes.d_model
    steps = {"learning": learning, "selection": trying, "alphas": alphas, "sweep": sweep, "controls": controls}
    works = [Work(name, amounts, in_use, host) for name, amounts in steps.items()]
    return [sketch.loading(), *works, Work("circuit", scored(tested, n_layers), in_use, host, kept=_FILES)]
