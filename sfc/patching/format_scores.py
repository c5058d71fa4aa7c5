"""Scores of instructions in several prompt formats, and what makes them comparable.

A raw logit difference says as much about two answer tokens as about the instruction: " cannot" and " will" have other
base rates, and another spread, than " Yes" and " No" or " A" and " B". Scores are therefore standardised within each
format, with its mean and standard deviation over all instructions asked, harmful and harmless ones alike, before
formats are compared. A harmful instruction's z then says how far it stands out in that format. Harmless ones must be
among those asked: standardised by themselves, harmful instructions would have mean 0 in every format, and nothing would
be left to compare.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.errors import UserError
from sfc.models.batches import SlotLayout, make_batches
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.patching.formats import Formats, Version

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
            for batch in make_batches(prompts, SlotLayout.of(prompts), batch_tokens, model.device):
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
