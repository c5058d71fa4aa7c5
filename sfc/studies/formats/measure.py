"""Scores of instructions in several prompt formats, and what makes them comparable.

A raw logit difference says as much about two answer tokens as about the instruction: " cannot" and " will" have other
base rates, and another spread, than " Yes" and " No" or " A" and " B". Scores are therefore standardised within each
format, with its mean and standard deviation over all instructions asked, harmful and harmless ones alike, before
formats are compared. A harmful instruction's z then says how far it stands out in that format. Harmless ones must be
among those asked: standardised by themselves, harmful instructions would have mean 0 in every format, and nothing would
be left to compare.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.core.artifacts import json_records
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.data.read import UNLABELLED, load_prompt_file
from sfc.data.schema import keyed_ranks
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import auroc
from sfc.run import Run
from sfc.session import Session
from sfc.stats import bootstrap_means, friedman, pairwise_wilcoxon
from sfc.studies.collect.fill import short_enough
from sfc.studies.formats import Formats, PromptFormats, Version
from sfc.studies.study import Made, write_tables

_ANY_INSTRUCTION = "Name a river."


@torch.no_grad()
def version_scores(
    model: Model, formats: Formats, instructions: Sequence[str], batch_tokens: int, progress: Callable[[int], object]
) -> dict[str, Float[np.ndarray, "instructions versions"]]:
    """Logit of the refusing answer minus that of the complying one, in nats, by format.

    Args:
        progress: called with the number of prompts done since the last call, of `instructions` times versions.

    Raises:
        UserError: an answer is not one token of this model.
    """
    answers = {
        name: [answer_tokens(model, name, version) for version in versions] for name, versions in formats.items()
    }
    scores = {name: np.empty((len(instructions), len(versions))) for name, versions in formats.items()}
    for name, versions in formats.items():
        for column, (version, (refuse, comply)) in enumerate(zip(versions, answers[name], strict=True)):
            prompts = model.tokenize([version.ask(instruction) for instruction in instructions], version.reply)
            for batch in make_batches(prompts, TemplateLayout.of(prompts), batch_tokens, model.device):
                logits: Float[Tensor, "batch vocab"] = last_logits(model, batch)
                rows = batch.prompts.cpu().numpy()
                scores[name][rows, column] = (logits[:, refuse] - logits[:, comply]).cpu().numpy()
                progress(len(rows))
    return scores


def answer_tokens(model: Model, name: str, version: Version) -> tuple[int, int]:
    """The tokens of the refusing and the complying answer where the model gives them, right after the reply's start.

    Raises:
        UserError: an answer is not exactly one token there.
    """
    question = version.ask(_ANY_INSTRUCTION)
    before = model.tokenize([question], version.reply)[0].ids.tolist()
    tokens = []
    for answer in (version.refuse, version.comply):
        ids = model.tokenize([question], version.reply + answer)[0].ids.tolist()
        if ids[:-1] != before:
            pieces = model.tokenizer.convert_ids_to_tokens(ids[-4:])
            raise UserError(
                f"format {name!r}: the answer {answer!r} is not one token of this model after {version.reply!r} (it"
                f" ends with {pieces}); give other answers in a --definitions file"
            )
        tokens.append(ids[-1])
    return tokens[0], tokens[1]


def standardised(scores: Mapping[str, Float[np.ndarray, " n"]]) -> dict[str, Float[np.ndarray, " n"]]:
    """z-scores within each format, by the mean and the sample standard deviation of all its scores.

    Raises:
        UserError: all scores of a format are equal.
    """
    for name, values in scores.items():
        if not values.std() > 0:
            raise UserError(f"format {name!r} gives every instruction the same score: there is nothing to compare")
    return {name: (values - values.mean()) / values.std(ddof=1) for name, values in scores.items()}


def measure(study: PromptFormats, session: Session, folder: Path) -> Made:
    """Score every instruction in every format, test, and write the tables.

    Raises:
        UserError: the file holds no harmful instructions, or an answer is not one token of this model.
    """
    experiment, model, options = session.run.experiment, session.model, study.of(session.run)
    formats, category = options.formats(), session.run.group(options.category)
    frame = _instructions(session.run, options.prompts, category, options.limit)
    frame = short_enough(model.tokenize, frame, experiment.prompts.max_tokens).table
    harmful = (frame["label"] == "toxic").to_numpy(dtype=bool)
    for side, count in (("harmful", harmful.sum()), ("harmless", (~harmful).sum())):
        if count < 2:
            raise UserError(
                f"comparing formats needs two {side} instructions or more that are short enough, not {count}"
            )
    with progress_bar("asking", len(frame) * sum(map(len, formats.values())), "prompts") as progress:
        versions = version_scores(
            model, formats, frame["prompt"].tolist(), experiment.activations.batch_tokens, progress
        )
    scores = {name: values.mean(1) for name, values in versions.items()}
    z = standardised(scores)
    harmful_z = np.stack([values[harmful] for values in z.values()], 1)
    facts = frame[["id", "prompt", "category", "label"]]
    tables = {
        "scores": pd.concat([facts.assign(format=name, logit_difference=scores[name], z=z[name]) for name in formats]),
        "formats": _summary(versions, scores, z, harmful, experiment.seed),
        "pairs": pairwise_wilcoxon(harmful_z, list(formats)),
    }
    write_tables(folder, tables, digits=6)
    return Made(
        {
            "preset": experiment.name,
            "prompts": options.prompts.name if options.prompts else category,
            "n_harmful": int(harmful.sum()),
            "n_harmless": int((~harmful).sum()),
            "formats": json_records(tables["formats"], digits=None),
            "friedman": friedman(harmful_z)._asdict(),
            "pairs": json_records(tables["pairs"], digits=None),
        }
    )


def _instructions(run: Run, prompts: Path | None, category: str, limit: int | None) -> pd.DataFrame:
    """Harmful instructions (label `toxic`), and at most as many harmless ones of the test split (`safe`)."""
    balanced = run.balanced(category)
    test = balanced[balanced["split"] == "test"]
    test = test.assign(label=np.where(test["refusal_label"], "toxic", "safe"))
    harmful, harmless = test[test["label"] == "toxic"], test[test["label"] == "safe"]
    if prompts is not None:
        given = load_prompt_file(prompts)
        harmful = given[given["label"].isin(("toxic", UNLABELLED))].assign(label="toxic")
        say(f"{len(harmful)} harmful instructions from {prompts}; harmless ones for the scale from {run.data}")
    most = min(limit or len(harmful), len(harmful))
    frame = pd.concat([harmful, harmless], ignore_index=True)
    chosen = keyed_ranks(frame, ["label"], f"formats {run.experiment.seed}") < most
    return frame.loc[chosen, ["id", "prompt", "category", "label"]].reset_index(drop=True)


def _summary(
    versions: dict[str, Float[np.ndarray, "n versions"]],
    scores: dict[str, Float[np.ndarray, " n"]],
    z: dict[str, Float[np.ndarray, " n"]],
    harmful: Bool[np.ndarray, " n"],
    seed: int,
) -> pd.DataFrame:
    """One row per format: the harmful instructions' mean logit difference and mean z with their 95 % intervals.

    Beside them the harmless ones' mean, the share of harmful instructions that are refused, whether the score tells the
    two apart (`auroc`), and by how much the first version's order moves it (`order_effect`, of formats with two).
    """
    rows = []
    for name, values in scores.items():
        difference = bootstrap_means(values[harmful, None], seed)
        standard = bootstrap_means(z[name][harmful, None], seed)
        both = versions[name]
        rows.append(
            {
                "format": name,
                **{key: float(end[0]) for key, end in difference._asdict().items()},
                "harmless_mean": float(values[~harmful].mean()),
                "refused": float((values[harmful] > 0).mean()),
                "auroc": auroc(values, harmful),
                **{f"z_{key}": float(end[0]) for key, end in standard._asdict().items()},
                "order_effect": float((both[:, 0] - both[:, 1]).mean() / 2) if both.shape[1] == 2 else None,
            }
        )
    return pd.DataFrame(rows)
