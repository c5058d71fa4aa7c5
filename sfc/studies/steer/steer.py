"""Stage: a refusal dial. A direction is learned and chosen on discovery prompts and steered along on test prompts."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from safetensors.torch import save_file

from sfc.core.artifacts import Artifact, replacing, write_csv, write_json
from sfc.core.progress import progress_bar, say
from sfc.core.sites import layer_of, short_site
from sfc.models.engine import PreparedPrompts
from sfc.models.loading import Model, choose_device, load_model
from sfc.pipeline_study import BEST
from sfc.run import Run
from sfc.saes.format import load_dictionaries
from sfc.session import Clock
from sfc.studies.steer.condition import conditioned, found_condition, grouped, named_condition
from sfc.studies.steer.directions import Vector
from sfc.studies.steer.inputs import (
    Learned,
    Tested,
    folds_of,
    hard_prompts,
    learn,
    ordinary_prompts,
    test_corpus,
    test_prompts,
    xstest_prompts,
)
from sfc.studies.steer.options import SteeringOptions
from sfc.studies.steer.page import write_steering_page
from sfc.studies.steer.select import Candidate, Fold, best_per_layer, candidate_table, plain_means, ranked
from sfc.studies.steer.sweep import (
    FORCE,
    INTENDED_LABEL,
    RANDOM,
    SHUFFLED,
    SUPPRESS,
    Setting,
    band,
    best_alphas,
    best_defence,
    control_settings,
    ordinary_effect,
    rates,
    setting,
    subspace_table,
    sweep,
    trade_off,
)
from sfc.studies.steer.writers import feature_cosines, writers_table

FILES = {
    "page": "steering.html",
    "candidates": "candidates.csv",
    "sweep": "sweep.csv",
    "rates": "rates.csv",
    "controls": "controls.csv",
    "directions": "directions.csv",
    "writers": "writers.csv",
    "features": "features.csv",
    "xstest": "xstest.csv",
    "xstest_rates": "xstest_rates.csv",
    "trade_off": "trade_off.csv",
    "conditional": "conditional.csv",
    "vectors": "vectors.safetensors",
    "result": "result.json",
}


def make_steering(run: Run, artifact: Artifact, rebuild: bool = False) -> None:
    """Learn, choose, try out, sweep, control, and write all of it with a page.

    Raises:
        UserError: there are too few prompts, or no candidate passes the requirements.
    """
    clock, config, seed = Clock(), SteeringOptions.of(run.experiment), run.experiment.seed
    condition = named_condition(run)
    model = load_model(run.experiment.model, choose_device(run.device))
    with artifact.being_made(rebuild) as folder:
        learned = learn(run, model)
        folds = folds_of(run, model, learned)
        clock.lap("learning")
        candidates = _tried(learned, folds, config)
        write_csv(folder / FILES["candidates"], candidates.round(6))
        kept = ranked(candidates)
        swept = [learned.candidates[i] for i in best_per_layer(kept, config.swept_layers)]
        chosen = learned.candidates[int(kept.index[0])]
        say(f"chosen: {_where(chosen)}")
        if config.when == BEST:
            condition = found_condition(run, model, learned, chosen)
        clock.lap("selection")
        ordinary = ordinary_prompts(run, model)
        held_out = _held_out(chosen, folds, ordinary["reference"], config)
        alphas = best_alphas(held_out, config.max_loss)
        clock.lap("alphas")
        tested = test_prompts(run, model)
        rows = _swept(tested, swept, config)
        losses = _costs(ordinary["test"], swept, config)
        clock.lap("sweep")
        chance = _by_chance(tested, chosen, _shuffled(learned, chosen, config, seed), alphas, config, seed)
        clock.lap("controls")
        others = xstest_prompts(run, model)
        generalised = _swept(others, [chosen], config) if others else None
        fewer = xstest_prompts(run, model, config.test_prompts)
        by_chance = _generalised_chance(fewer, chosen, alphas, config, seed) if fewer else None
        clock.lap("xstest")
        dials = None
        if condition:
            of_hard = _swept({"hard": hard_prompts(run, model)}, [chosen], config)
            of_chosen = rows[rows["site"] == chosen.site]
            compared = {"test": grouped(of_chosen, of_hard)}
            if generalised is not None:
                compared["xstest"] = generalised.assign(group=generalised["label"])
            dials = conditioned(run, model, learned, condition, compared)
            clock.lap("condition")
        writers = _writers(run, model, chosen)
        vectors = {name: learned.vector(contrast, chosen) for name, contrast in learned.contrasts.items()}
        tables = {
            "candidates": candidates,
            "rates": rates(rows, ["site", "layer", "token", "alpha", "intent", "label"]).merge(
                losses, on=["site", "alpha"]
            ),
            "controls": rates(chance, ["direction", "alpha", "intent", "label"]),
            "directions": subspace_table(vectors, chosen, folds, config),
            "writers": writers,
            "sweep": pd.concat([rows, chance]),
        }
        if dials:
            tables["conditional"] = dials.table
        if config.features:
            dictionaries = load_dictionaries(run.saes.folder, run.experiment.activations.sites)
            tables["features"] = feature_cosines(chosen.vector, dictionaries)
        clock.lap("circuit")
        if generalised is not None and by_chance is not None:
            tables["xstest"] = pd.concat([generalised, by_chance])
            tables["xstest_rates"] = rates(generalised, ["label", "category", "alpha", "intent"])
            tables["trade_off"] = pd.concat([trade_off(generalised), trade_off(by_chance)])
        result = _result(run, chosen, tables, folds, alphas, held_out)
        result["conditional"] = dials.facts if dials else None
        for name, table in tables.items():
            write_csv(folder / FILES[name], table.round(6))
        _save_vectors(folder / FILES["vectors"], chosen, vectors)
        write_steering_page(folder / FILES["page"], tables, result)
        clock.lap("drawing")
        files = {name: file for name, file in FILES.items() if (folder / file).exists() or name == "result"}
        result |= {"files": files, "seconds": clock.laps}
        write_json(folder / FILES["result"], result)
        artifact.finish(result=result)


def _tried(learned: Learned, folds: list[Fold], config: SteeringOptions) -> pd.DataFrame:
    runs = len(learned.candidates) * sum(2 * fold.safe.n_prompts + fold.toxic.n_prompts for fold in folds)
    with progress_bar("trying directions", runs, "runs") as progress:
        return candidate_table(learned.candidates, folds, config, progress)


def _held_out(chosen: Candidate, folds: list[Fold], ordinary: PreparedPrompts, config: SteeringOptions) -> pd.DataFrame:
    """Changed replies per alpha on prompts that the direction was not learned from, with the cost beside them."""
    model = ordinary.model
    tries: list[tuple[PreparedPrompts, pd.DataFrame, list[Setting]]] = []
    for number, fold in enumerate(folds):
        for intent, prompts in ((FORCE, fold.safe), (SUPPRESS, fold.toxic)):
            settings = [setting(model, chosen, alpha, config, chosen.by_fold[number]) for alpha in config.dial]
            wanted = [each for each in settings if each.intent == intent]
            if wanted:
                tries.append((prompts, pd.DataFrame({"fold": number}, index=range(prompts.n_prompts)), wanted))
    dial = [setting(model, chosen, alpha, config) for alpha in config.dial]
    total = sum(prompts.n_prompts * len(wanted) for prompts, _, wanted in tries) + len(dial) * ordinary.n_prompts
    with progress_bar("choosing alphas", total, "runs") as progress:
        parts = [sweep(*each, config, progress) for each in tries]
        losses = ordinary_effect(ordinary, dial, config, progress)[["alpha", "loss_rise"]]
    return rates(pd.concat(parts), ["alpha", "intent"]).merge(losses, on="alpha")


def _swept(tested: Tested, candidates: list[Candidate], config: SteeringOptions) -> pd.DataFrame:
    """Every prompt at every alpha along every candidate."""
    pairs = [(candidate, alpha) for candidate in candidates for alpha in config.dial]
    with progress_bar("sweeping", len(pairs) * _n_prompts(tested), "replies") as progress:
        return pd.concat(
            [
                sweep(
                    prepared,
                    prompts,
                    [setting(prepared.model, *pair, config, name=config.direction) for pair in pairs],
                    config,
                    progress,
                )
                for prompts, prepared in tested.values()
            ],
            ignore_index=True,
        )


def _costs(ordinary: PreparedPrompts, candidates: list[Candidate], config: SteeringOptions) -> pd.DataFrame:
    """What the same settings cost on ordinary text."""
    settings = [setting(ordinary.model, candidate, alpha, config) for candidate in candidates for alpha in config.dial]
    with progress_bar("ordinary text", len(settings) * ordinary.n_prompts, "runs") as progress:
        return ordinary_effect(ordinary, settings, config, progress).drop(columns="direction")


def _by_chance(
    tested: Tested,
    chosen: Candidate,
    shuffled: list[Vector],
    alphas: Mapping[str, float],
    config: SteeringOptions,
    seed: int,
) -> pd.DataFrame:
    """Control directions at the chosen alphas, each on the prompts that its turn of the dial is meant for."""
    settings = {
        intent: control_settings(tested[INTENDED_LABEL[intent]].prepared.model, chosen, shuffled, [alpha], config, seed)
        for intent, alpha in alphas.items()
    }
    total = sum(len(of_intent) * len(tested[INTENDED_LABEL[intent]].prompts) for intent, of_intent in settings.items())
    with progress_bar("controls", total, "replies") as progress:
        return pd.concat(
            [
                sweep(prepared, prompts, of_intent, config, progress)
                for intent, of_intent in settings.items()
                for prompts, prepared in [tested[INTENDED_LABEL[intent]]]
            ],
            ignore_index=True,
        )


def _generalised_chance(
    fewer: Tested, chosen: Candidate, alphas: Mapping[str, float], config: SteeringOptions, seed: int
) -> pd.DataFrame:
    """Random directions at the chosen alphas, on some prompts of both kinds."""
    parts = []
    with progress_bar("chance", len(alphas) * config.random_directions * _n_prompts(fewer), "replies") as progress:
        for prompts, prepared in fewer.values():
            settings = control_settings(prepared.model, chosen, [], list(alphas.values()), config, seed)
            parts.append(sweep(prepared, prompts, settings, config, progress))
    return pd.concat(parts, ignore_index=True)


def _n_prompts(tested: Tested) -> int:
    return sum(len(side.prompts) for side in tested.values())


def _writers(run: Run, model: Model, chosen: Candidate) -> pd.DataFrame:
    """Which heads and MLPs write the direction where it was read, on test prompts; at the last token elsewhere."""
    tokenized, toxic = test_corpus(run, model)
    n_ablated = SteeringOptions.of(run.experiment).ablated_writers
    return writers_table(model, tokenized, toxic, chosen.site, chosen.token or -1, chosen.vector, n_ablated)


def _shuffled(learned: Learned, chosen: Candidate, config: SteeringOptions, seed: int) -> list[Vector]:
    """Differences of means between sides dealt by lot; none where nothing was learned from sides."""
    if chosen.token is None:
        return []
    contrast = learned.contrasts["toxic-safe" if config.direction == "probe" else config.direction]  # pyright: ignore
    return [learned.vector(contrast.shuffled(seed + number), chosen) for number in range(config.shuffled_directions)]


def _where(candidate: Candidate) -> str:
    token = "" if candidate.token is None else f", read at token {candidate.token}"
    return f"{short_site(candidate.site)}{token}"


def _save_vectors(path: Any, chosen: Candidate, vectors: Mapping[str, Vector]) -> None:
    """The chosen direction, and each contrast's at the same place, in float64."""
    tensors = {"chosen": chosen.vector, **vectors}
    with replacing(path) as temporary:
        save_file({name: vector.contiguous() for name, vector in tensors.items()}, temporary, {"site": chosen.site})


def _result(
    run: Run,
    chosen: Candidate,
    tables: Mapping[str, pd.DataFrame],
    folds: list[Fold],
    alphas: Mapping[str, float],
    held_out: pd.DataFrame,
) -> dict[str, Any]:
    config, candidates = SteeringOptions.of(run.experiment), tables["candidates"]
    return {
        "preset": run.experiment.name,
        "category": config.category,
        "direction": config.direction,
        "edit": config.edit,
        "units": config.units,
        "positions": config.positions,
        "during_reply": config.during_reply,
        "site": short_site(chosen.site),
        "layer": layer_of(chosen.site),
        "token": chosen.token,
        "norm": _figure(chosen.norm),
        "length": _figure(float(chosen.vector.norm()) / chosen.norm),
        "n_candidates": len(candidates),
        "n_rejected": int((candidates["rejected"] != "").sum()),
        "max_loss": config.max_loss,
        "unsteered": {side: _figure(mean) for side, mean in plain_means(folds).items()},
        "operating_points": {
            intent: _operating_point(intent, alpha, chosen, held_out, tables) for intent, alpha in alphas.items()
        },
        "xstest": _xstest_figures(tables["trade_off"], config) if "trade_off" in tables else None,
    }


def _operating_point(
    intent: str, alpha: float, chosen: Candidate, held_out: pd.DataFrame, tables: Mapping[str, pd.DataFrame]
) -> dict[str, Any]:
    """What the dial does at the alpha chosen for an intent: on the test split, on held-out folds, and by chance."""
    dial, controls, label = tables["rates"], tables["controls"], INTENDED_LABEL[intent]
    tested = dial[(dial["site"] == chosen.site) & (dial["alpha"] == alpha) & (dial["label"] == label)].iloc[0]
    before = held_out[(held_out["alpha"] == alpha) & (held_out["intent"] == intent)].iloc[0]
    chance = controls[(controls["alpha"] == alpha) & (controls["intent"] == intent)]
    at_random, shuffled = (band(chance, control, "changed_rate") for control in (RANDOM, SHUFFLED))
    figures = ["eligible", "changed", "changed_rate", "changed_low", "changed_high", "score_change"]
    costs = ["loss_rise", "later_loss_rise", "kl"]
    return {
        "alpha": alpha,
        "prompts": label,
        **{name: _figure(tested[name]) for name in [*figures, *costs]},
        "held_out_rate": _figure(before["changed_rate"]),
        "held_out_loss_rise": _figure(before["loss_rise"]),
        "random_mean": _figure(at_random.mean),
        "random_highest": _figure(at_random.high),
        "shuffled_mean": _figure(shuffled.mean),
        "shuffled_highest": _figure(shuffled.high),
    }


def _xstest_figures(points: pd.DataFrame, config: SteeringOptions) -> dict[str, Any]:
    """The trade-off as it is, and at the best defensive point, which may not exist."""
    curve = points[points["direction"] == config.direction]
    best = best_defence(curve)
    there = curve[curve["alpha"] == best]
    first = curve.iloc[0]
    return {
        "n_unsafe": int(first["n_unsafe"]),
        "n_safe": int(first["n_safe"]),
        "unsteered": {side: _figure(first[f"{side}_unsteered"]) for side in ("unsafe", "safe")},
        "best_defence": None
        if best is None
        else {"alpha": best, **{side: _figure(there[side].iloc[0]) for side in ("unsafe", "safe")}},
    }


def _figure(value: Any) -> float | int | None:
    if pd.isna(value):
        return None
    return int(value) if float(value).is_integer() and not isinstance(value, float) else round(float(value), 4)
