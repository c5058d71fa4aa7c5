"""Learn a direction and choose it on discovery prompts, steer test prompts along it, and control what that does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import save_file

from sfc.core.artifacts import replacing, write_csv
from sfc.core.progress import progress_bar, say
from sfc.core.sites import layer_of, short_site
from sfc.core.work import Amounts, Work
from sfc.data.render import Role
from sfc.models.engine import PreparedPrompts
from sfc.models.work import Shape, cache_bytes, packed, passed, replied, rows_of, scored, shapes_of
from sfc.session import Session
from sfc.stats import reported
from sfc.studies.sketch import Sketch
from sfc.studies.steer import BEST, FORCE, INTENDED_LABEL, SUPPRESS, Steer, SteeringOptions
from sfc.studies.steer.conditional import both_dials, found_condition, grouped, named_condition
from sfc.studies.steer.directions import Candidate, Dial, Setting, Vector
from sfc.studies.steer.learning import SPREAD_LAYERS, Learned, learn
from sfc.studies.steer.prompts import (
    Side,
    Tested,
    hard_prompts,
    ordinary_prompts,
    test_corpus,
    test_prompts,
    xstest_prompts,
)
from sfc.studies.steer.sweep import (
    RANDOM,
    SHUFFLED,
    Fold,
    best_alphas,
    best_defence,
    best_per_layer,
    by_chance,
    candidate_table,
    control_settings,
    folds_of,
    ordinary_effect,
    ranked,
    rates,
    subspace_table,
    sweep,
    trade_off,
)
from sfc.studies.steer.writers import feature_cosines, writers_table
from sfc.studies.study import Made, write_tables


def measure(study: Steer, session: Session, folder: Path) -> Made:
    """Learn, choose, try out, sweep and control.

    Raises:
        UserError: there are too few prompts, or no candidate passes the requirements.
    """
    options, seed, clock = study.of(session.run), session.run.experiment.seed, session.clock
    condition, dial = named_condition(session), Dial.of(session)
    learned = learn(session, study.circuit(session.run))
    folds = folds_of(session, learned)
    clock.lap("learning")
    runs = len(learned.candidates) * sum(2 * fold.safe.n_prompts + fold.toxic.n_prompts for fold in folds)
    with progress_bar("trying directions", runs, "runs") as progress:
        tables = {"candidates": candidate_table(dial, learned.candidates, folds, progress)}
    write_csv(folder / "candidates.csv", tables["candidates"].round(6))
    kept = ranked(tables["candidates"])
    swept = [learned.candidates[i] for i in best_per_layer(kept, options.swept_layers)]
    chosen = learned.candidates[int(kept.index[0])]
    say(f"chosen: {short_site(chosen.site)}{'' if chosen.token is None else f', read at token {chosen.token}'}")
    if options.when == BEST:
        condition = found_condition(session, learned, chosen)
    clock.lap("selection")
    ordinary = ordinary_prompts(session)
    held_out = _held_out(dial, chosen, folds, ordinary["reference"])
    alphas = best_alphas(held_out, options.max_loss)
    clock.lap("alphas")
    tested = test_prompts(session)
    rows = _along(dial, tested, swept)
    of_dial = rates(rows, ["site", "layer", "token", "alpha", "intent", "label"])
    tables["rates"] = of_dial.merge(_costs(dial, ordinary["test"], swept), on=["site", "alpha"])
    clock.lap("sweep")
    chance = _controlled(dial, tested, chosen, _shuffled(learned, chosen, options, seed), alphas, seed)
    tables["controls"] = rates(chance, ["direction", "alpha", "intent", "label"])
    tables["sweep"] = pd.concat([rows, chance])
    clock.lap("controls")
    generalised = None
    if options.xstest is not None:
        generalised = _along(dial, xstest_prompts(session), [chosen])
        settings = control_settings(dial, chosen, [], list(alphas.values()), seed)
        fewer = xstest_prompts(session, options.test_prompts).values()
        at_random = _swept(dial, "chance", [(side, settings) for side in fewer])
        tables["xstest"] = pd.concat([generalised, at_random])
        tables["xstest_rates"] = rates(generalised, ["label", "category", "alpha", "intent"])
        tables["trade_off"] = pd.concat([trade_off(generalised), trade_off(at_random)])
    clock.lap("xstest")
    conditional = None
    if condition:
        of_hard = _along(dial, {"hard": hard_prompts(session)}, [chosen])
        compared = {"test": grouped(rows[rows["site"] == chosen.site], of_hard)}
        if generalised is not None:
            compared["xstest"] = generalised.assign(group=generalised["label"])
        tables["conditional"], conditional = both_dials(session, learned, condition, compared)
        clock.lap("condition")
    vectors = {name: learned.vector(contrast, chosen) for name, contrast in learned.contrasts.items()}
    tables["directions"] = subspace_table(dial, vectors, chosen, folds)
    # What writes the direction where it was read, on test prompts; at the last token elsewhere.
    prompts, tokenized = test_corpus(session)
    toxic, token = prompts["refusal_label"].to_numpy(dtype=bool), chosen.token or -1
    tables["writers"] = writers_table(
        session.model, session.metric, tokenized, toxic, chosen.site, token, chosen.vector, options.ablated_writers
    )
    if options.features:
        tables["features"] = feature_cosines(chosen.vector, session.dictionaries)
    clock.lap("circuit")
    _save_vectors(folder / "vectors.safetensors", chosen, vectors)
    result = {
        "preset": session.run.experiment.name,
        "category": session.run.group(options.category),
        **_result(dial, chosen, tables, folds, alphas, held_out),
        "conditional": conditional,
    }
    return Made(result, write_tables(folder, tables))


def _held_out(dial: Dial, chosen: Candidate, folds: list[Fold], ordinary: PreparedPrompts) -> pd.DataFrame:
    """Changed replies per alpha on prompts that the direction was not learned from, with the cost beside them."""
    tries: list[tuple[Side, list[Setting]]] = []
    for number, fold in enumerate(folds):
        for intent, prompts in ((FORCE, fold.safe), (SUPPRESS, fold.toxic)):
            settings = [dial.setting(chosen, alpha, chosen.by_fold[number]) for alpha in dial.options.dial]
            side = Side(pd.DataFrame({"fold": number}, index=range(prompts.n_prompts)), prompts)
            if wanted := [each for each in settings if each.intent == intent]:
                tries.append((side, wanted))
    changed = rates(_swept(dial, "choosing alphas", tries), ["alpha", "intent"])
    return changed.merge(_costs(dial, ordinary, [chosen])[["alpha", "loss_rise"]], on="alpha")


def _swept(dial: Dial, what: str, tries: Sequence[tuple[Side, list[Setting]]]) -> pd.DataFrame:
    """Prompts, each with the settings that they are tried under."""
    total = sum(len(side.prompts) * len(settings) for side, settings in tries)
    with progress_bar(what, total, "replies") as progress:
        parts = [sweep(dial, side.prepared, side.prompts, settings, progress) for side, settings in tries]
    return pd.concat(parts, ignore_index=True)


def _along(dial: Dial, tested: Tested, candidates: list[Candidate]) -> pd.DataFrame:
    """Every prompt at every alpha along every candidate."""
    name, alphas = dial.options.direction, dial.options.dial
    settings = [dial.setting(each, alpha, name=name) for each in candidates for alpha in alphas]
    return _swept(dial, "sweeping", [(side, settings) for side in tested.values()])


def _costs(dial: Dial, ordinary: PreparedPrompts, candidates: list[Candidate]) -> pd.DataFrame:
    """What the same settings cost on ordinary text."""
    settings = [dial.setting(candidate, alpha) for candidate in candidates for alpha in dial.options.dial]
    with progress_bar("ordinary text", len(settings) * ordinary.n_prompts, "runs") as progress:
        return ordinary_effect(dial, ordinary, settings, progress).drop(columns="direction")


def _controlled(
    dial: Dial, tested: Tested, chosen: Candidate, shuffled: list[Vector], alphas: Mapping[str, float], seed: int
) -> pd.DataFrame:
    """Control directions at the chosen alphas, each on the prompts that its turn of the dial is meant for."""
    tries = [
        (tested[INTENDED_LABEL[intent]], control_settings(dial, chosen, shuffled, [alpha], seed))
        for intent, alpha in alphas.items()
    ]
    return _swept(dial, "controls", tries)


def _shuffled(learned: Learned, chosen: Candidate, options: SteeringOptions, seed: int) -> list[Vector]:
    """Differences of means between sides dealt by lot; none where nothing was learned from sides."""
    if options.contrast is None:
        return []
    contrast = learned.contrasts[options.contrast]
    return [learned.vector(contrast.shuffled(seed + number), chosen) for number in range(options.shuffled_directions)]


def _save_vectors(path: Path, chosen: Candidate, vectors: Mapping[str, Vector]) -> None:
    """The chosen direction, and each contrast's at the same place, in float64."""
    tensors = {"chosen": chosen.vector, **vectors}
    with replacing(path) as temporary:
        save_file({name: vector.contiguous() for name, vector in tensors.items()}, temporary, {"site": chosen.site})


def _result(
    dial: Dial,
    chosen: Candidate,
    tables: Mapping[str, pd.DataFrame],
    folds: list[Fold],
    alphas: Mapping[str, float],
    held_out: pd.DataFrame,
) -> dict[str, Any]:
    options, candidates = dial.options, tables["candidates"]
    sides = {"safe": [fold.safe for fold in folds], "toxic": [fold.toxic for fold in folds]}
    return {
        "direction": options.direction,
        "edit": options.edit,
        "units": options.units,
        "positions": options.positions,
        "during_reply": options.during_reply,
        "site": short_site(chosen.site),
        "layer": layer_of(chosen.site),
        "token": chosen.token,
        "norm": reported(chosen.norm),
        "length": reported(chosen.length),
        "n_candidates": len(candidates),
        "n_rejected": int((candidates["rejected"] != "").sum()),
        "max_loss": options.max_loss,
        "unsteered": {side: reported(dial.plain_scores(prompts).mean()) for side, prompts in sides.items()},
        "operating_points": {
            intent: _operating_point(intent, alpha, chosen, held_out, tables) for intent, alpha in alphas.items()
        },
        "xstest": _xstest_figures(tables["trade_off"], options) if "trade_off" in tables else None,
    }


def _operating_point(
    intent: str, alpha: float, chosen: Candidate, held_out: pd.DataFrame, tables: Mapping[str, pd.DataFrame]
) -> dict[str, Any]:
    """What the dial does at the alpha chosen for an intent: on the test split, on held-out folds, and by chance."""
    dial, controls, label = tables["rates"], tables["controls"], INTENDED_LABEL[intent]
    tested = dial[(dial["site"] == chosen.site) & (dial["alpha"] == alpha) & (dial["label"] == label)].iloc[0]
    before = held_out[(held_out["alpha"] == alpha) & (held_out["intent"] == intent)].iloc[0]
    chance = controls[(controls["alpha"] == alpha) & (controls["intent"] == intent)]
    at_random, shuffled = (by_chance(chance, control, "changed_rate") for control in (RANDOM, SHUFFLED))
    figures = ["changed_rate", "changed_low", "changed_high", "score_change", "loss_rise", "later_loss_rise", "kl"]
    return {
        "alpha": alpha,
        "prompts": label,
        **{name: int(tested[name]) for name in ("eligible", "changed")},
        **{name: reported(tested[name]) for name in figures},
        "held_out_rate": reported(before["changed_rate"]),
        "held_out_loss_rise": reported(before["loss_rise"]),
        "random_mean": reported(at_random[0]),
        "random_highest": reported(at_random[1]),
        "shuffled_mean": reported(shuffled[0]),
        "shuffled_highest": reported(shuffled[1]),
    }


def _xstest_figures(points: pd.DataFrame, options: SteeringOptions) -> dict[str, Any]:
    """The trade-off as it is, and at the best defensive point, which may not exist."""
    curve = points[points["direction"] == options.direction]
    best = best_defence(curve)
    there = curve[curve["alpha"] == best]
    first = curve.iloc[0]
    return {
        "n_unsafe": int(first["n_unsafe"]),
        "n_safe": int(first["n_safe"]),
        "unsteered": {side: reported(first[f"{side}_unsteered"]) for side in ("unsafe", "safe")},
        "best_defence": None
        if best is None
        else {"alpha": best, **{side: reported(there[side].iloc[0]) for side in ("unsafe", "safe")}},
    }


_PACKED = 2048
_FILES = 12_000_000
"""bytes of its page and tables, about, with default options"""


def work(study: Steer, sketch: Sketch) -> list[Work]:
    """The steps of `sfc steer`, without XSTest's prompts and without conditions.

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
