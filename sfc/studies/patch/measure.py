"""Choose pairs by what the model does, patch between them, and rank the components."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sfc.circuits.options import EvaluationOptions
from sfc.core.artifacts import json_records, rounded, write_csv
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.core.work import Amounts, Work
from sfc.data.render import Role
from sfc.models.loading import Model
from sfc.models.work import Shape, cache_bytes, packed, passed, replied, scored, shapes_of, tokens_of
from sfc.run import Run
from sfc.session import Session
from sfc.studies.patch import (
    FEW_PAIRS,
    WRAPPERS,
    Candidates,
    Patching,
    PatchingOptions,
    critical_components,
    load_wrappers,
    pairs_file,
    toxic_safe_pairs,
    wrapped_pairs,
)
from sfc.studies.patch.alignment import expand
from sfc.studies.patch.patching import Selection, patch_pairs, select_pairs, unaligned
from sfc.studies.patch.ranking import (
    Patch,
    PatchRuns,
    agreement,
    cumulative_patches,
    effect_table,
    score_table,
    single_patches,
)
from sfc.studies.sketch import Sketch
from sfc.studies.study import Made

_CRITICAL_LISTED = 10


def measure(study: Patching, session: Session, folder: Path) -> Made:
    """Write `pairs.csv`, `scores.csv` and `effects.csv`.

    Raises:
        UserError: the pairs or wrappers cannot be read, no pair can be used, or the model has no such layer.
    """
    experiment, model, clock = session.run.experiment, session.model, session.clock
    options = study.of(session.run)
    candidates, patches = candidates_of(session.run), _patches(model, options)
    clock.lap("loading")
    selection = select_pairs(model, candidates, experiment)
    positions = expand(options.position_sets, selection.pairs)
    pairs = selection.table.assign(unaligned=_unaligned(selection, positions))
    write_csv(folder / "pairs.csv", pairs, digits=6)
    _check_some_left(selection, options, folder / "pairs.csv")
    clock.lap("pairs")
    runs = _runs(session, selection, positions, patches)
    clock.lap("patching")
    min_denominator = EvaluationOptions.of(experiment).min_denominator
    effects = effect_table(runs, options.draws, options.flips, min_denominator, experiment.seed)
    write_csv(folder / "effects.csv", effects, digits=6)
    write_csv(folder / "scores.csv", score_table(runs), digits=6)
    clock.lap("ranking")
    used, single = selection.table[selection.table["used"]], effects[~effects["is_range"]]
    critical = critical_components(effects)
    return Made(
        {
            "preset": experiment.name,
            "n_layers": model.n_layers,
            "pairs": options.pairs,
            "require": options.require,
            "n_tried": len(selection.table),
            "n_pairs": len(used),
            "lost": _lost(selection),
            "n_pairs_at": {each.positions: len(each.pairs) for each in runs},
            "wrappers": used.loc[used["wrapper"] != "", "wrapper"].value_counts().to_dict(),
            "clean_score": round(float(used["clean_score"].mean()), 4),
            "corrupted_score": round(float(used["corrupted_score"].mean()), 4),
            "n_components": len(single),
            "n_critical": len(critical),
            "critical": _strongest(critical),
            "agreement": json_records(rounded(agreement(effects), 6), digits=None),
        }
    )


def candidates_of(run: Run) -> list[Candidates]:
    """The pairs that are tried, by clean prompt.

    Raises:
        UserError: their file, or that of the wrappers, cannot be read.
    """
    options, seed = PatchingOptions.of(run.experiment), run.experiment.seed
    path = pairs_file(run)
    if path is not None:
        return toxic_safe_pairs(path, options.category, options.limit, seed)
    wrappers = load_wrappers(Path(options.wrappers)) if options.wrappers else WRAPPERS
    frame = run.prompts.frame
    instructions = frame[frame["refusal_label"] & (frame["split"] == "discovery")]
    return wrapped_pairs(instructions, wrappers, options.category, options.limit, seed)


def _patches(model: Model, options: PatchingOptions) -> list[Patch]:
    layers = sorted(set(options.layers)) or list(range(model.n_layers))
    if not 0 <= layers[0] <= layers[-1] < model.n_layers:
        raise UserError(f"patching.layers names layers that the model does not have: it has 0 to {model.n_layers - 1}")
    kinds = list(dict.fromkeys(options.components))
    patches = single_patches(kinds, layers, model.bridge.cfg.n_heads)
    model.check_sites([site for patch in patches for site in patch.sites])
    return patches + (cumulative_patches(kinds, layers) if options.cumulative else [])


def _unaligned(selection: Selection, positions: Sequence[str]) -> pd.Series:
    """Per row of the table, why a pair that is used could not be aligned at some positions; blank where it could."""
    reasons = ["; ".join(filter(None, (unaligned(name, pair) for name in positions))) for pair in selection.pairs]
    used = selection.table["used"]
    return pd.Series(reasons, index=used.index[used], dtype=object).reindex(used.index, fill_value="")


def _check_some_left(selection: Selection, options: PatchingOptions, path: Path) -> None:
    """Say how many pairs are used; none is an error: labels and scores never take the place of what the model does."""
    lost = "; ".join(f"{count}: {reason}" for reason, count in _lost(selection).items())
    tried = f"{len(selection.table)} pairs tried" + (f", lost {lost}" if lost else ", none lost")
    if not selection.pairs:
        hint = "; where replies hardly ever differ, --require score asks for a difference of the score alone"
        raise UserError(f"no pair can be used: {tried}; see {path}{hint if options.require == 'behaviour' else ''}")
    say(f"{len(selection.pairs)} pairs ({tried})")
    if len(selection.pairs) < FEW_PAIRS:
        smallest = min(2 / 2 ** len(selection.pairs), 1)
        say(f"warning: with so few pairs no p-value can be below {smallest:.2g}; raise --limit")


def _lost(selection: Selection) -> dict[str, int]:
    """How many pairs were lost for which reason, the most frequent first."""
    lost = selection.table["lost"]
    counts = lost[lost != ""].str.split(" (", regex=False).str[0].value_counts()
    return {str(reason): int(count) for reason, count in counts.items()}


def _runs(
    session: Session, selection: Selection, positions: Sequence[str], patches: Sequence[Patch]
) -> list[PatchRuns]:
    experiment = session.run.experiment
    directions, batch_tokens = PatchingOptions.of(experiment).directions, experiment.activations.batch_tokens
    aligned = {name: sum(unaligned(name, pair) is None for pair in selection.pairs) for name in positions}
    with progress_bar("patching", len(directions) * sum(aligned.values()) * len(patches), "runs") as progress:
        return [
            patch_pairs(
                session.model, session.metric, selection.pairs, direction, name, patches, batch_tokens, progress
            )
            for direction in directions
            for name, count in aligned.items()
            if count
        ]


def _strongest(critical: pd.DataFrame) -> list[dict[str, Any]]:
    """The best-ranked critical components of each direction and kind."""
    columns = ["direction", "kind", "rank", "component", "positions", "n_pairs"]
    columns += ["effect", "low", "high", "q_value", "attribution"]
    best = critical.groupby(["direction", "kind"], sort=False).head(_CRITICAL_LISTED)
    return json_records(rounded(best[columns], 6), digits=None)


def work(study: Patching, sketch: Sketch) -> list[Work]:
    """The steps of `sfc patch`, if every pair is used: replies that choose pairs, and a run for every patch and pair.

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
