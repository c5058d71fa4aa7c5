"""Stage: activation patching between pairs of prompts, with its ranking and its page."""

from pathlib import Path
from typing import Any

import pandas as pd

from sfc.circuits.options import EvaluationOptions
from sfc.core.artifacts import Artifact, write_csv, write_json
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.models.loading import Model, choose_device, load_model
from sfc.pipeline_study import pairs_file
from sfc.run import Run
from sfc.session import Clock
from sfc.studies.patch.alignment import expand
from sfc.studies.patch.components import Patch, cumulative_patches, single_patches
from sfc.studies.patch.options import PatchingOptions
from sfc.studies.patch.page import write_patching_page
from sfc.studies.patch.pairs import WRAPPERS, Candidates, load_wrappers, toxic_safe_pairs, wrapped_pairs
from sfc.studies.patch.patching import patch_pairs
from sfc.studies.patch.ranking import PatchRuns, agreement, effect_table
from sfc.studies.patch.selection import Selection, select_pairs, unaligned

FILES = {
    "page": "patching.html",
    "effects": "effects.csv",
    "pairs": "pairs.csv",
    "scores": "scores.csv",
    "result": "result.json",
}
_CRITICAL_Q = 0.05
_FEW_PAIRS = 10
_CRITICAL_SHOWN = 10


def make_patching(run: Run, artifact: Artifact, rebuild: bool = False) -> None:
    """Choose the pairs, patch them, rank the components, and write all of it with a page.

    Raises:
        UserError: the pairs or wrappers cannot be read, no pair can be used, or the model has no such layer.
    """
    clock, config = Clock(), PatchingOptions.of(run.experiment)
    candidates = _candidates(run)
    model = load_model(run.experiment.model, choose_device(run.device))
    patches = _patches(model, config)
    clock.lap("loading")
    with artifact.being_made(rebuild) as folder:
        selection = select_pairs(model, candidates, run.experiment)
        positions = expand(config.position_sets, selection.pairs)
        pairs = selection.table.assign(unaligned=_unaligned(selection, positions))
        write_csv(folder / FILES["pairs"], pairs, digits=6)
        _check_some_left(selection, config, str(folder / FILES["pairs"]))
        clock.lap("pairs")
        runs = _runs(model, selection, positions, patches, run)
        clock.lap("patching")
        effects = effect_table(
            runs, config.draws, config.flips, EvaluationOptions.of(run.experiment).min_denominator, run.experiment.seed
        )
        result = {"n_layers": model.n_layers, **_result(run, selection, effects, runs)}
        write_csv(folder / FILES["effects"], effects, digits=6)
        scores = _scores(runs)
        write_csv(folder / FILES["scores"], scores, digits=6)
        write_patching_page(folder / FILES["page"], effects, result)
        clock.lap("ranking")
        result |= {"files": FILES, "seconds": clock.laps}
        write_json(folder / FILES["result"], result)
        artifact.finish(result=result)


def _candidates(run: Run) -> list[Candidates]:
    config, seed = PatchingOptions.of(run.experiment), run.experiment.seed
    path = pairs_file(run)
    if path is not None:
        return toxic_safe_pairs(path, config.category, config.limit, seed)
    wrappers = load_wrappers(Path(config.wrappers)) if config.wrappers else WRAPPERS
    frame = run.prompts.frame
    instructions = frame[frame["refusal_label"] & (frame["split"] == "discovery")]
    return wrapped_pairs(instructions, wrappers, config.category, config.limit, seed)


def _patches(model: Model, config: PatchingOptions) -> list[Patch]:
    layers = sorted(set(config.layers)) or list(range(model.n_layers))
    if not 0 <= layers[0] <= layers[-1] < model.n_layers:
        raise UserError(f"patching.layers names layers the model has not: it has 0 to {model.n_layers - 1}")
    kinds = list(dict.fromkeys(config.components))
    patches = single_patches(kinds, layers, model.bridge.cfg.n_heads)
    model.check_sites([site for patch in patches for site in patch.sites])
    return patches + (cumulative_patches(kinds, layers) if config.cumulative else [])


def _unaligned(selection: Selection, positions: list[str]) -> pd.Series:
    """Per row of the table, why a pair that is used could not be aligned at some positions; blank where it could."""
    reasons = ["; ".join(filter(None, (unaligned(name, pair) for name in positions))) for pair in selection.pairs]
    used = selection.table["used"]
    return pd.Series(reasons, index=used.index[used], dtype=object).reindex(used.index, fill_value="")


def _check_some_left(selection: Selection, config: PatchingOptions, path: str) -> None:
    """Say how many pairs are used; none is an error, and labels or the score never take the place of behaviour."""
    lost = _lost(selection)
    counts = "; ".join(f"{count}: {reason}" for reason, count in lost.items())
    tried = f"{len(selection.table)} pairs tried" + (f", lost {counts}" if lost else ", none lost")
    if not selection.pairs:
        hint = (
            "; for a model that hardly refuses, --require score asks for a difference of the score alone"
            if config.require == "behaviour"
            else ""
        )
        raise UserError(f"no pair can be used: {tried}; see {path}{hint}")
    say(f"{len(selection.pairs)} pairs ({tried})")
    if len(selection.pairs) < _FEW_PAIRS:
        smallest = 2 / 2 ** len(selection.pairs)
        say(f"warning: with so few pairs no p-value can be below {min(smallest, 1):.2g}; raise --limit")


def _lost(selection: Selection) -> dict[str, int]:
    """How many pairs were lost for which reason, the most frequent first."""
    lost = selection.table["lost"]
    counts = lost[lost != ""].str.split(" (", regex=False).str[0].value_counts()
    return {str(reason): int(count) for reason, count in counts.items()}


def _runs(model: Model, selection: Selection, positions: list[str], patches: list[Patch], run: Run) -> list[PatchRuns]:
    directions, batch_tokens = PatchingOptions.of(run.experiment).directions, run.experiment.activations.batch_tokens
    aligned = {name: sum(unaligned(name, pair) is None for pair in selection.pairs) for name in positions}
    with progress_bar("patching", len(directions) * sum(aligned.values()) * len(patches), "runs") as progress:
        return [
            patch_pairs(model, selection.pairs, direction, name, patches, batch_tokens, progress)
            for direction in directions
            for name, count in aligned.items()
            if count
        ]


def _scores(runs: list[PatchRuns]) -> pd.DataFrame:
    """Every score that was measured: one row per direction, position set, component and pair."""
    frames = [
        pd.DataFrame(
            {
                "direction": run.direction,
                "positions": run.positions,
                "component": patch.name,
                "pair": run.pairs,
                "base": run.base,
                "source": run.source,
                "patched": run.patched[row],
                "first_order": run.base + run.first_order[row],
            }
        )
        for run in runs
        for row, patch in enumerate(run.patches)
    ]
    return pd.concat(frames, ignore_index=True)


def _result(run: Run, selection: Selection, effects: pd.DataFrame, runs: list[PatchRuns]) -> dict[str, Any]:
    config, used = PatchingOptions.of(run.experiment), selection.table[selection.table["used"]]
    single = effects[~effects["is_range"]]
    critical = single[single["q_value"] <= _CRITICAL_Q]
    return {
        "preset": run.experiment.name,
        "pairs": config.pairs,
        "require": config.require,
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
        "agreement": _json_records(agreement(effects)),
    }


def _strongest(critical: pd.DataFrame) -> list[dict[str, Any]]:
    """The best-ranked critical components of each direction and kind."""
    columns = ["direction", "kind", "rank", "component", "positions", "n_pairs"]
    columns += ["effect", "low", "high", "q_value", "first_order"]
    best = critical.groupby(["direction", "kind"], sort=False).head(_CRITICAL_SHOWN)
    return _json_records(best[columns])


def _json_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON: numbers to six digits, what is missing None."""
    rounded = frame.apply(lambda column: column.map(lambda x: float(f"{x:.6g}") if isinstance(x, float) else x))
    rows = rounded.astype(object).where(rounded.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]
