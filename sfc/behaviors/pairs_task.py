"""The task that a file of counterfactual pairs sets: what makes the model prefer a prompt's own answer?"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sfc.circuits.baselines import check_covered, paired_baseline
from sfc.circuits.counterfactuals import Counterfactuals, Pairs
from sfc.circuits.options import DiscoveryOptions
from sfc.circuits.problem import Task
from sfc.circuits.spaces import sites_of
from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.core.progress import say
from sfc.data.pairs import aligned, load_counterfactuals
from sfc.data.render import TokenizedPrompt
from sfc.data.schema import with_ids
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.running import activations_at
from sfc.models.score import AnswerDifference, DirectedScore, auroc, score_prompts
from sfc.saes.dictionary import Dictionary, reconstruction

LOW_SHARE, LOW_VARIANCE_EXPLAINED = 0.8, 0.5


def pairs_task(experiment: Experiment, path: Path, model: Model, dictionaries: Mapping[str, Dictionary]) -> Task:
    """The pairs of a file: each prompt of the population (toxic: the clean ones) has its partner as its baseline.

    With counterfactuals as the baseline both prompts of a pair are explained, each against the other, and must be
    equally long. A pair whose prompts cannot be aligned, or are too long, is left out, and said to be.

    Raises:
        UserError: the file is malformed, an answer is not one token, or no pair of some split can be used.
    """
    clean_is_explained = DiscoveryOptions.of(experiment).population == "toxic"
    pairs = load_counterfactuals(path, experiment.prompts, experiment.seed)
    ours, theirs = ("clean", "patch") if clean_is_explained else ("patch", "clean")
    tokenized = {side: model.tokenize(pairs[f"{side}_prefix"].tolist()) for side in (ours, theirs)}
    answers = {side: _answer_ids(model, path, pairs, f"{side}_answer", tokenized) for side in (ours, theirs)}
    roles = [aligned(a.ids, b.ids) for a, b in zip(tokenized[ours], tokenized[theirs], strict=True)]
    longest = [max(len(a.ids), len(b.ids)) for a, b in zip(tokenized[ours], tokenized[theirs], strict=True)]
    is_short = np.array(longest) <= experiment.prompts.max_tokens
    is_aligned = np.array([pair is not None for pair in roles])
    both_ways = DiscoveryOptions.of(experiment).baseline_choice == "counterfactual"
    if both_ways:
        is_aligned &= [
            # Each may be the other's counterfactual: as many tokens, and the same first one, a sink.
            len(a.ids) == len(b.ids) and a.ids[0] == b.ids[0]
            for a, b in zip(tokenized[ours], tokenized[theirs], strict=True)
        ]
    counts = _counts(pairs, is_short, is_aligned)
    pairs = pairs[is_short & is_aligned].reset_index(drop=True)
    if set(pairs["split"]) != {"discovery", "test"}:
        otherwise = (
            ", or take --set discovery.baseline=paired, which pools what is not equally long" if both_ways else ""
        )
        raise UserError(
            f"{path}: no usable pair for discovery or for test; write more pairs of equally many tokens{otherwise}"
        )

    chosen = np.flatnonzero(is_short & is_aligned)
    explained, partners = zip(*(roles[i] for i in chosen), strict=True)  # pyright: ignore[reportArgumentType]
    layout = TemplateLayout.of([*explained, *partners])
    ids = torch.from_numpy(np.stack([answers["clean"], answers["patch"]], 1)[chosen]).to(model.device)
    score = AnswerDifference(layout, ids if clean_is_explained else ids.flip(1))
    budget = experiment.activations.batch_tokens

    def batches(prompts: Sequence[TokenizedPrompt], wanted: Bool[np.ndarray, " pairs"]) -> list[Batch]:
        numbers = torch.from_numpy(np.flatnonzero(wanted)).to(model.device)
        plain = make_batches([prompts[int(i)] for i in numbers], layout, budget, model.device)
        return [batch.with_tables(numbers[batch.prompts], layout) for batch in plain]

    in_discovery = (pairs["split"] == "discovery").to_numpy()
    discovery, test = batches(explained, in_discovery), batches(explained, ~in_discovery)
    partners_batches = batches(partners, in_discovery)
    sides = [score_prompts(model, score, side) for side in (discovery, partners_batches)]
    variance = _variance_explained(model, dictionaries, [*discovery, *partners_batches])
    rows = [_side(pairs, side, path.stem) for side in (ours, theirs)]
    if both_ways:
        prompts, numbers, n = [*explained, *partners], torch.arange(2 * len(explained)), len(explained)
        both = Pairs(*(values.to(model.device) for values in (numbers, (numbers + n) % (2 * n), numbers < n)))
        baseline = Counterfactuals.of(model, dictionaries, prompts, both, layout, budget)
        discovery, test = (
            [
                batch.with_tables(batch.pair % n, layout)  # pyright: ignore[reportOptionalOperand]
                for batch in baseline.batches(prompts, torch.from_numpy(np.tile(wanted, 2)).to(model.device), budget)
            ]
            for wanted in (in_discovery, ~in_discovery)
        )
        task_score = DirectedScore(score, both.direction)
        pair_table = _pair_table(*rows)
    else:
        baseline = paired_baseline(model, dictionaries, make_batches(partners, layout, budget, model.device), layout)
        check_covered(baseline, [*discovery, *test])
        task_score, pair_table = score, None
    return Task(
        score=task_score,
        baseline=baseline,
        discovery=discovery,
        test=test,
        labelled=pd.concat([side[in_discovery] for side in rows]),
        population=f"{ours} and {theirs}" if both_ways else ours,
        facts={
            "prompts": pd.concat([rows[0], rows[1] if both_ways else rows[1].assign(split="reference")]),
            "pairs": counts | _preference(sides[0]),
            "variance_explained": variance,
            "score_auroc": auroc(np.concatenate(sides), np.repeat([True, False], len(sides[0]))),
        },
        pair_table=pair_table,
    )


def _pair_table(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Both directions: our prompts against theirs, and theirs against ours; see `Problem.pair_table`."""
    both = pd.concat([ours, theirs])
    kinds = both["refusal_label"].map({True: "clean", False: "patch"})
    against = pd.concat([theirs, ours])["id"].to_numpy()
    return pd.DataFrame({"id": both["id"].to_numpy(), "counterfactual": against, "kind": kinds.to_numpy()})


def _answer_ids(
    model: Model, path: Path, pairs: pd.DataFrame, answer: str, prompts: Mapping[str, Sequence[TokenizedPrompt]]
) -> Int[np.ndarray, " pairs"]:
    """The token that each answer is after both prompts of its pair.

    Raises:
        UserError: it is not one token there, or not the same one.
    """
    ids = np.zeros(len(pairs), dtype=np.int64)
    for side, prefixes in prompts.items():
        texts = pairs[f"{side}_prefix"]
        followed = model.tokenize((texts + pairs[answer]).tolist())
        for row, (prefix, whole) in enumerate(zip(prefixes, followed, strict=True)):
            added = whole.ids[len(prefix.ids) :]
            if len(added) != 1 or not np.array_equal(whole.ids[: len(prefix.ids)], prefix.ids):
                pieces = model.tokenizer.convert_ids_to_tokens(whole.ids.tolist())
                raise UserError(
                    f"{path}: pair {row + 1}: the {answer.replace('_', ' ')} {pairs[answer][row]!r} is not one token of"
                    f" this model after {texts[row]!r} ({pieces})"
                )
            if ids[row] not in (0, added[0]):
                raise UserError(
                    f"{path}: pair {row + 1}: {answer} is one token after the one prefix and another after the other"
                )
            ids[row] = added[0]
    return ids


def _counts(pairs: pd.DataFrame, is_short: np.ndarray, is_aligned: np.ndarray) -> dict[str, int]:
    """How many pairs are used, and how many are not; these are said as well, with an example."""
    if not is_short.all():
        say(f"left out: {(~is_short).sum():,} pairs with a prompt of more than prompts.max_tokens tokens")
    if not is_aligned.all():
        row = pairs[~is_aligned].iloc[0]
        example = f"{row['clean_prefix']!r} and {row['patch_prefix']!r}"
        say(f"left out: {(~is_aligned).sum():,} of {len(pairs):,} pairs whose tokens do not correspond: {example}, …")
    used = pairs.loc[is_short & is_aligned, "split"]
    say(f"pairs: {(used == 'discovery').sum():,} for discovery, {(used == 'test').sum():,} for test")
    return {
        "read": len(pairs),
        "not_aligned": int((~is_aligned).sum()),
        "too_long": int((~is_short).sum()),
        "discovery": int((used == "discovery").sum()),
        "test": int((used == "test").sum()),
    }


def _preference(scores: np.ndarray) -> dict[str, float]:
    """How often the model prefers a prompt's own answer, on the discovery pairs; where it seldom does, this is said."""
    share = float((scores > 0).mean())
    if share < LOW_SHARE:
        say(f"warning: the model prefers the prompt's own answer in {share:.0%} of the discovery pairs only")
    return {"own_answer_preferred": round(share, 4)}


@torch.no_grad()
def _variance_explained(
    model: Model, dictionaries: Mapping[str, Dictionary], batches: Sequence[Batch]
) -> dict[str, float]:
    """Of the activations at each site with features, on these prompts; the dictionaries were learned on others."""
    dictionaries = {site: dictionary for site, dictionary in dictionaries.items() if dictionary.d_sae}
    if not dictionaries:
        return {}
    sites = sites_of(dictionaries)
    rows: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in batches:
        for site, x in activations_at(model, batch, sites).items():
            rows[site].append(x[batch.touchable].float())
    explained = {}
    for site, dictionary in dictionaries.items():
        x, read = (torch.cat(rows[each]) for each in (site, dictionary.reads))
        error = x - reconstruction(dictionary, dictionary.encode_sparse(read), read, x)
        explained[site] = round(1 - float(error.square().sum() / (x - x.mean(0)).square().sum()), 4)
    worst = min(explained, key=explained.__getitem__)
    if explained[worst] < LOW_VARIANCE_EXPLAINED:
        say(
            f"warning: at {worst} the SAE explains only {explained[worst]:.2f} of the variance on these prompts, the"
            " rest is in the error nodes; --set corpus.source=… learns SAEs from texts that are more like them"
        )
    return explained


def _side(pairs: pd.DataFrame, side: str, category: str) -> pd.DataFrame:
    """The prompts of one side, as rows of the table of prompts; a clean prompt's label is true."""
    prompts = pd.DataFrame(
        {
            "prompt": pairs[f"{side}_prefix"],
            "category": category,
            "refusal_label": side == "clean",
            "dataset_type": "pair",
            "split": pairs["split"],
            "case": pairs["case"],
            "clean_answer": pairs["clean_answer"],
            "patch_answer": pairs["patch_answer"],
        }
    )
    return with_ids(prompts)
