"""What a circuit proves: figures on pairs of a prompt and its counterfactual, on prompts of both sides, and replies.

A circuit that scores high whatever it is asked has a faithfulness of 1 on the side that should score high. These
figures look at both sides. Under counterfactual ablation (`sfc.circuits.counterfactuals`), on pairs:

    recovered       (F(C) - F(0)) / (F(M) - F(0)), F means over the pairs of one side, F(0) the counterfactuals' scores
    agreement       1 - sum (s_C - s_M)^2 / sum (s_0 - s_M)^2, over all pairs; 1 - (1 - r)^2 where all recover r alike
    KL recovered    1 - KL(M to C) / KL(M to 0) of the next token, by side

and under mean ablation, on all prompts:

    gap kept        what is left of the difference between the sides' mean scores
    separation      the chance that a prompt of the positive side scores above one of the other (AUROC)
    prompt-free     faithfulness on the positive side with every node of the first site ablated as well, so that nothing
                    of the prompt can enter but its length: what no circuit should have
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from sfc.circuits.ablation import Ablation
from sfc.circuits.counterfactuals import Counterfactuals
from sfc.circuits.faithfulness import Ablations, ablated_scores, full_scores, prepared, top_circuits
from sfc.circuits.options import LARGE_PROMPT_FREE
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.sites import WHOLE_STREAM, kind_of
from sfc.models import engine
from sfc.models.batches import PACKED_TOKENS
from sfc.models.engine import NO_EDIT, Edits, Progress
from sfc.models.loading import Model
from sfc.models.score import DirectedScore, Score
from sfc.stats import UNMEASURABLE, Estimate, bootstrap_auroc, bootstrap_gap, bootstrap_ratio, judged_rate

SMALL = 0.1
"""figures below this are called none"""


class PairScores(NamedTuple):
    """What a circuit does to pairs under counterfactual ablation: scores and divergences, in nats."""

    model: Float[np.ndarray, " pairs"]
    empty: Float[np.ndarray, " pairs"]
    """with nothing kept: the counterfactuals' scores"""
    circuit: Float[np.ndarray, " pairs"]
    kl_empty: Float[np.ndarray, " pairs"]
    """KL(model || nothing kept)"""
    kl_circuit: Float[np.ndarray, " pairs"]
    """KL(model || circuit)"""
    positive: Bool[np.ndarray, " pairs"]
    """whether the prompt is of the positive side"""
    prompt: Int[np.ndarray, " pairs"]
    """which prompt it is: a prompt is in several pairs"""


class SideScores(NamedTuple):
    """Scores of prompts of both sides under mean ablation, in nats."""

    model: Float[np.ndarray, " prompts"]
    empty: Float[np.ndarray, " prompts"]
    circuit: Float[np.ndarray, " prompts"]
    prompt_free: Float[np.ndarray, " prompts"]
    """of the circuit with every node as well up to the first site through which all of the prompt passes; NaN where no
    site is such"""
    positive: Bool[np.ndarray, " prompts"]


def pair_scores(
    model: Model,
    score: Score,
    ablation: Ablation,
    runs: PromptRuns,
    keep: Bool[np.ndarray, "circuits nodes"],
    progress: Progress = lambda _runs: None,
) -> list[PairScores]:
    """What each circuit does to the pairs of the runs.

    Args:
        score: a `DirectedScore`.
        ablation: by `Counterfactuals`.
        progress: called with the number of pairs of a circuit and a row that are done since the last call; there is one
            circuit more, the empty one.
    """
    baseline = ablation.baseline
    assert isinstance(baseline, Counterfactuals) and isinstance(score, DirectedScore)
    circuits = Ablations(ablation, np.concatenate([np.zeros_like(keep[:1]), keep]))
    found = engine.next_tokens(prepared(model, runs), score.score, circuits, progress)
    whole = full_scores(model, score.score, runs)
    pair = pair_numbers(runs)
    positive, prompt = (values.cpu().numpy()[pair] for values in (baseline.pairs.positive, baseline.pairs.prompt))
    (empty, *scores), (kl_empty, *divergences) = found
    return [
        PairScores(whole, empty, circuit, kl_empty, kl_circuit, positive, prompt)
        for circuit, kl_circuit in zip(scores, divergences, strict=True)
    ]


def pair_numbers(runs: PromptRuns) -> Int[np.ndarray, " pairs"]:
    """Which pair each row of the runs is, by its number in the baseline's list of pairs."""
    pair = np.zeros(runs.n_prompts, dtype=int)
    for batch in runs.batches:
        assert batch.pair is not None
        pair[batch.prompts.cpu().numpy()] = batch.pair.cpu().numpy()
    return pair


def side_scores(
    problem: Problem,
    runs: PromptRuns,
    positive: Bool[np.ndarray, " prompts"],
    keep: Bool[np.ndarray, "circuits nodes"],
    progress: Progress = lambda _runs: None,
) -> list[SideScores]:
    """What each circuit does to prompts of both sides under the problem's own ablation, which is by means.

    Args:
        positive: of which side each prompt of the runs is.
        progress: as `ablated_scores`; there are twice as many circuits and one more.
    """
    nodes = problem.ablation.nodes
    entries = [number for number, site in enumerate(nodes.sites) if kind_of(site) in WHOLE_STREAM]
    deaf = keep & (nodes.site_numbers > (entries[0] if entries else len(nodes.sites)))
    packed = np.concatenate([np.zeros_like(keep[:1]), keep, deaf])
    scores = ablated_scores(problem.model, problem.score, problem.ablation, runs, packed, progress)
    model = full_scores(problem.model, problem.score, runs)
    circuits, prompt_free = np.split(scores[1:], 2)
    if not entries:
        prompt_free = np.full_like(circuits, np.nan)
    return [
        SideScores(model, scores[0], circuit, free, positive)
        for circuit, free in zip(circuits, prompt_free, strict=True)
    ]


def pair_figures(scores: PairScores, min_denominator: float, seed: int) -> dict[str, float | None]:
    """`recovered_toxic`, `recovered_safe`, `agreement`, `kl_recovered_toxic` and `kl_recovered_safe`.

    Each with the ends of its 95 % interval, over prompts drawn again, as `…_low` and `…_high`; None where it cannot be
    measured. Of the two sides `toxic` is the positive and `safe` the negative one.

    Args:
        min_denominator: a smaller mean difference of scores between prompts and counterfactuals is not measurable.
    """
    estimates = {}
    for name, side in (("toxic", scores.positive), ("safe", ~scores.positive)):
        of_side = PairScores(*(values[side] for values in scores))
        moved, whole = of_side.circuit - of_side.empty, of_side.model - of_side.empty
        estimates[f"recovered_{name}"] = bootstrap_ratio(moved, whole, of_side.prompt, seed, min_denominator)
        lost = bootstrap_ratio(of_side.kl_circuit, of_side.kl_empty, of_side.prompt, seed)
        estimates[f"kl_recovered_{name}"] = lost.complement
    missed, whole = np.square(scores.circuit - scores.model), np.square(scores.empty - scores.model)
    unlike = bootstrap_ratio(missed, whole, scores.prompt, seed, min_denominator**2)
    return _flat(estimates | {"agreement": unlike.complement})


def side_figures(scores: SideScores, min_denominator: float, seed: int) -> dict[str, float | None]:
    """`gap_kept`, `separation`, `separation_model` and `prompt_free`, each with the ends of its 95 % interval.

    Args:
        min_denominator: a smaller gap, or F(M) - F(0), is not measurable.
    """
    of_side = SideScores(*(values[scores.positive] for values in scores))
    left, whole = of_side.prompt_free - of_side.empty, of_side.model - of_side.empty
    known = np.isfinite(left).all()
    free = bootstrap_ratio(left, whole, np.arange(len(left)), seed, min_denominator) if known else UNMEASURABLE
    return _flat(
        {
            "gap_kept": bootstrap_gap(scores.circuit, scores.model, scores.positive, seed, min_denominator),
            "separation": bootstrap_auroc(scores.circuit, scores.positive, seed),
            "separation_model": bootstrap_auroc(scores.model, scores.positive, seed),
            "prompt_free": free,
        }
    )


def _flat(estimates: Mapping[str, Estimate]) -> dict[str, float | None]:
    figures = {}
    for name, (value, low, high) in estimates.items():
        figures |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return figures


def figures_by_size(
    problem: Problem,
    ranking: Int[np.ndarray, " ranked"],
    sizes: Sequence[int],
    min_denominator: float,
    progress: Progress = lambda _runs: None,
) -> pd.DataFrame:
    """For each size of the ranking its `agreement` on the discovery pairs, and `recovered`, that of the worse side.

    Missing where not measurable.
    """
    circuits = top_circuits(ranking, sizes, problem.ablation.nodes.n_nodes)
    by_size = pair_scores(problem.model, problem.score, problem.ablation, problem.runs, circuits, progress)
    rows = []
    for scores in by_size:
        figures = pair_figures(scores, min_denominator, seed=0)
        sides = [figures["recovered_toxic"], figures["recovered_safe"]]
        recovered = min(np.nan if side is None else side for side in sides) if None not in sides else np.nan
        agreement = figures["agreement"]
        rows.append({"agreement": np.nan if agreement is None else agreement, "recovered": recovered})
    return pd.DataFrame(rows)


def says(
    figures: Mapping[str, float | None],
    refused: Mapping[str, Sequence[int | None]] | None = None,
    positive: str = "toxic",
    negative: str = "safe",
    acts: str = "refuse",
) -> str:
    """What the figures of a circuit allow to say, and what they do not: a sentence.

    Args:
        figures: those of `pair_figures` or `side_figures`, or both, and perhaps `null_agreement`, that of a random
            dictionary's circuit of the same size.
        refused: for kinds of prompts that were answered, how many replies show the behavior by the model and by the
            circuit alone, and of how many.
        acts: what replies do that show it.
    """
    parts = [_restored(figures, positive, negative)] if "recovered_toxic" in figures else []
    null = figures.get("null_agreement")
    if null is not None:
        parts.append(f"random features agree {_share(null)}")
    kept, separation = figures.get("gap_kept"), figures.get("separation")
    if kept is not None and separation is not None:
        if kept < SMALL:
            parts.append(
                f"under mean ablation it scores {positive} and {negative} prompts alike, so it does not decide"
            )
        else:
            parts.append(f"under mean ablation it keeps {_share(kept)} of the gap between the sides")
    elif "gap_kept" in figures and "recovered_toxic" not in figures:
        parts.append(f"the model scores {positive} and {negative} prompts too much alike to tell whether it decides")
    free = figures.get("prompt_free")
    if free is not None and free > LARGE_PROMPT_FREE:
        parts.append(f"{_share(free)} of its faithfulness under mean ablation is left where the prompt cannot enter")
    for kind, (by_model, by_circuit, n) in (refused or {}).items():
        parts.append(f"{by_circuit} of {n} replies to {kind} prompts {acts} (the model's: {by_model})")
    return "; ".join(parts)


def _restored(figures: Mapping[str, float | None], positive: str, negative: str) -> str:
    forth, back, agreement = (figures.get(name) for name in ("recovered_toxic", "recovered_safe", "agreement"))
    if forth is None or back is None or agreement is None:
        return "prompts and their counterfactuals score too much alike for anything to be restored"
    if max(abs(forth), abs(back)) < SMALL:
        return (
            f"restores none of the difference between {positive} and {negative} prompts ({_share(forth)},"
            f" {_share(back)})"
        )
    return (
        f"restores {_share(forth)} of the difference on {positive} prompts and {_share(back)} on {negative} ones,"
        f" agreement {_share(agreement)}"
    )


def _share(value: float) -> str:
    return f"{value + 0.0:.2f}".replace("-0.00", "0.00")


_PACKED_TOKENS = 2 * PACKED_TOKENS  # those of the replies count too
REPLY_COLUMNS = ("kind", "under", "n", "refused", "rate", "low", "high")
EMPTY, CIRCUIT, WITHOUT = "everything ablated", "circuit", "without"


def judged_replies(
    problem: Problem, runs: PromptRuns, edits: Edits, reply_tokens: int
) -> Bool[np.ndarray, "edits prompts"]:
    """Whether the greedy reply to each prompt shows the behavior, under each edit. The problem has a judge.

    Tokens of the reply are not ablated, since no prompt says what a reply's baseline would be.
    """
    assert problem.judge is not None
    found = engine.replies(
        prepared(problem.model, runs), problem.score, edits, reply_tokens, batch_tokens=_PACKED_TOKENS
    )
    return np.array([[problem.judge(text) for text in of_edit] for of_edit in found.texts])


def replies_by_kind(
    problem: Problem,
    runs: PromptRuns,
    prompts: pd.DataFrame,
    circuit: Bool[np.ndarray, " nodes"],
    most: int,
    reply_tokens: int,
    seed: int,
) -> pd.DataFrame:
    """How many replies show the behavior: in the model, with everything ablated, all but the circuit, and it alone.

    Args:
        prompts: a row per row of the runs: `id` and `kind`. A prompt that is in several pairs is answered in one.
        most: prompts of each kind that are answered, drawn at random.

    Returns:
        `REPLY_COLUMNS`, a row per kind and ablation, with the 95 % interval of the rate after Wilson; no rows where
        replies are not judged or not wanted.
    """
    if most == 0 or problem.judge is None:
        return pd.DataFrame(columns=list(REPLY_COLUMNS))
    drawn = prompts.sample(frac=1, random_state=seed).drop_duplicates("id").groupby("kind", sort=False).head(most)
    rows = np.sort(drawn.index.to_numpy())
    some = runs.subset(rows)
    # A subset is numbered in the order of its batches.
    order = np.concatenate([batch.prompts.cpu().numpy() for batch in runs.batches])
    kinds = prompts["kind"].to_numpy()[order[np.isin(order, rows)]]
    keep = np.stack([np.zeros_like(circuit), circuit, ~circuit])
    by_edit = np.concatenate(
        [
            judged_replies(problem, some, NO_EDIT, reply_tokens),
            judged_replies(problem, some, Ablations(problem.ablation, keep), reply_tokens),
        ]
    )
    table = []
    for kind in dict.fromkeys(kinds):
        for under, refused in zip(("model", EMPTY, CIRCUIT, WITHOUT), by_edit[:, kinds == kind], strict=True):
            table.append((kind, under, *judged_rate(refused).values()))
    return pd.DataFrame(table, columns=list(REPLY_COLUMNS))


def counts_by_kind(replies: pd.DataFrame) -> dict[str, dict[str, int]]:
    """By kind: of how many prompts (`n`) the reply of the `model`, of the `circuit` alone and `without` it shows it."""
    counts: dict[str, dict[str, int]] = {}
    for row in replies.itertuples():
        if row.under != EMPTY:
            counts.setdefault(str(row.kind), {"n": int(row.n)})[str(row.under)] = int(row.refused)  # pyright: ignore
    return counts
