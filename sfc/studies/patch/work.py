"""What `sfc patch` takes: replies by which pairs are chosen, and a run from its layer on for every patch and pair."""

from sfc.core.work import Amounts, Work
from sfc.data.render import Role
from sfc.models.work import Shape, cache_bytes, packed, passed, replied, scored, shapes_of, tokens_of
from sfc.studies.patch import Patching
from sfc.studies.patch.measure import candidates_of
from sfc.studies.patch.ranking import cumulative_patches, single_patches
from sfc.studies.sketch import Sketch


def work(study: Patching, sketch: Sketch) -> list[Work]:
    """Its steps, if every pair is used that may be.

    Raises:
        UserError: the pairs cannot be read.
    """
    experiment, sizes = sketch.run.experiment, sketch.sizes
    options, tokens = study.of(sketch.run), experiment.activations.batch_tokens
    texts = [text for group in candidates_of(sketch.run) for text in (group[0].clean, group[0].corrupted)]
    prompts = sketch.tokens(texts)
    shapes = shapes_of(prompts, tokens)
    choosing = scored(shapes, sizes.n_layers)
    if options.require == "behaviour":
        choosing += replied(
            shapes_of(prompts, tokens, options.reply_tokens), 1, options.reply_tokens, sizes.n_layers, tokens
        )
    layers = sorted(set(options.layers)) or list(range(sizes.n_layers))
    kinds = list(dict.fromkeys(options.components))
    n_heads = sketch.known.outline.config.get_text_config().num_attention_heads
    patches = single_patches(kinds, layers, n_heads) + (cumulative_patches(kinds, layers) if options.cumulative else [])
    suffix, whole = int((prompts[0].roles == Role.SUFFIX).sum()), max(len(prompt.ids) for prompt in prompts)
    patching, largest = Amounts(), 0
    for positions in options.position_sets:
        width = {"suffix": suffix, "last": 1}.get(
            positions, whole if positions in ("all", "content", "prefix") else suffix
        )
        # Pairs in batches by the length of whole prompts, of which the last tokens are run.
        suffixes = [Shape(max(shape.rows // 2, 1), min(width, shape.width)) for shape in shapes]
        after = sum(sizes.n_layers - patch.first_layer for patch in patches) / len(patches)
        once = passed(shapes, sizes.n_layers) + passed(suffixes, 2 * sizes.n_layers)
        once += packed(suffixes, len(patches), round(after), tokens)
        once += Amounts(backward=tokens_of(suffixes) * sizes.n_layers)
        patching += once * len(options.directions)
        largest = max(largest, *(sketch.gradients(shape.tokens, sizes.n_layers) for shape in suffixes))
    cache = cache_bytes(sizes, tokens) + sizes.logits(tokens / max(suffix, 1))
    device = sizes.weights + cache + max(sketch.in_use(tokens), largest)
    kept = _PAGE_BYTES + _ROW_BYTES * len(patches) * len(options.directions) * len(prompts) // 2
    return [
        sketch.loading(),
        Work(f"choose among {len(prompts) // 2} pairs", choosing, sizes.weights + sketch.in_use(tokens)),
        Work(f"{len(patches):,} patches", patching, device, kept=kept),
    ]


_PAGE_BYTES, _ROW_BYTES = 4_900_000, 60
"""of the page, most of it plotly's own script, and of a row of `scores.csv`"""
