"""Explanations of features by a language model behind an OpenAI-compatible endpoint, scored by detection.

Nothing is sent to anyone unless `labels.explainer` names an endpoint. It is shown contexts of the half that labels are
made on and says what they have in common; then, without their values, contexts of the other half, strong and quiet
ones, of which it says whether its explanation fits. The score is the AUROC by which labels are scored
(`sfc.features.claims`; Paulo et al. 2024), here over the contexts shown. What comes back is untrusted: it
is cut to one short line, and shown as text only.
"""

import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import field_validator

from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.features.claims import weighted_auroc
from sfc.features.contexts import Evidence
from sfc.features.labels import CARDS_FILE, read_cards

KEY = "SFC_EXPLAINER_KEY"
_SHOWN, _QUIET, _JUDGED = 10, 5, 10
"""strong and quiet contexts that an explanation is made of; as many of each as are judged"""
_LONGEST_EXPLANATION = 200
_MOST_BYTES = 1 << 20
_ROUTE = "/v1/chat/completions"


class LabelOptions(Options):
    """Who explains features, beside the rule that labels them."""

    section = "labels"

    explainer: str | None = option(
        None,
        description="also ask this OpenAI-compatible endpoint, such as http://127.0.0.1:8080, what features fire on;"
        f" prompts are sent to it, with the key in the environment variable {KEY} if there is one",
    )
    explainer_model: str = option("default", description="the model that the endpoint is asked for")
    explainer_seconds: float = option(60, gt=0, allow_inf_nan=False, description="the longest wait for one answer")

    neuronpedia: bool = option(
        False,
        description="also fetch what Neuronpedia says of the features of published dictionaries: their names are sent"
        " to it, and no prompt",
    )

    @field_validator("explainer")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if address is not None and not re.fullmatch(r"https?://[^\s/@]+[^\s@?#]*", address):
            # Not a ValueError, whose message would show what may hold a password.
            raise UserError(f"labels.explainer is no address such as http://127.0.0.1:8080; a key goes into {KEY}")
        return address


def unexplained(folder: Path, options: LabelOptions) -> list[str]:
    """The features of a finished circuit that lack the explanation that is asked for."""
    if options.explainer is None or not (folder / CARDS_FILE).is_file():
        return []
    features = read_cards(folder)["features"]
    return [
        name for name, card in features.items() if card.get("explanation", {}).get("model") != options.explainer_model
    ]


class Endpoint:
    """An OpenAI-compatible endpoint."""

    def __init__(self, options: LabelOptions) -> None:
        """Nothing is sent yet.

        Raises:
            UserError: the key is none.
        """
        address = (options.explainer or "").rstrip("/")
        self.address = address.removesuffix(_ROUTE).removesuffix("/v1") + _ROUTE
        self.model = options.explainer_model
        self._seconds = options.explainer_seconds
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"the key in {KEY} has characters that no key has")

    def ask(self, instruction: str, text: str) -> str:
        """The model's answer, at temperature 0.

        Raises:
            UserError: there is none in time, or it is not of the form that OpenAI's has.
        """
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 400}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        try:
            answer = json.loads(answer_within(request, self._seconds))["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            self._fail(f"answers {error.code}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._fail(f"gives no answer ({getattr(error, 'reason', error)})"[:200])
        except (KeyError, IndexError, TypeError):
            self._fail("does not answer as OpenAI's API does: there is no choices[0].message.content")
        if not isinstance(answer, str):
            self._fail("answers without a text")
        return answer

    def _fail(self, what: str) -> NoReturn:
        raise UserError(
            f"the explainer {self.address} {what}; what was explained so far is kept, and the same command goes on"
        )


def answer_within(request: urllib.request.Request, seconds: float) -> bytes:
    """The body of an answer, of bounded length, within the time: a timeout alone would wait for each further byte.

    Raises:
        OSError, ValueError, HTTPException: there is none, or it is too long or too slow.
    """
    # A redirect could take prompts and key to someone who was not named.
    opener = urllib.request.build_opener(_NoRedirect)
    until, body = time.monotonic() + seconds, b""
    with opener.open(request, timeout=seconds) as response:
        while piece := response.read1(1 << 16):
            body += piece
            if len(body) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES:,} bytes")
            if time.monotonic() > until:
                raise TimeoutError(f"not complete within {seconds:g} s")
    return body


def one_line(text: str) -> str:
    """An explanation as it is kept: one short line without anything invisible."""
    return "".join(filter(str.isprintable, " ".join(text.split())))[:_LONGEST_EXPLANATION]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Follow nothing: the redirect itself is then an error."""


_EXPLAIN = (
    "You explain what a feature inside a language model responds to. You get texts with the feature's strength in each,"
    " from 0 to 9; where a token stands between « and », the strength is that at this token. Answer with one phrase of"
    " at most 20 words that says what the strong ones have in common and the others do not, and nothing else."
)
_JUDGE = (
    "A feature inside a language model is said to respond to: {explanation}\nYou get {count} numbered texts; where a"
    " token stands between « and », it is about this token. Answer with a JSON list of {count} numbers and nothing"
    " else: 1 where the feature will respond, 0 where it will not."
)


def explain(endpoint: Endpoint, evidence: Evidence, text_of: Callable[[int, bool], str]) -> Mapping[str, Any]:
    """A feature's explanation, as its card keeps it: `text`, `score` and `model`.

    The score is None where the endpoint's verdicts cannot be read, or all contexts are alike.

    Args:
        text_of: what is shown of the context at a row of the store, and of a prompt as a whole.

    Raises:
        UserError: as `Endpoint.ask`.
    """
    first = evidence.made_on
    if not evidence.values[first].any():
        return {"text": "never fires here", "score": None, "model": endpoint.model}
    mean = float(evidence.values[first].mean())
    shown = _chosen(evidence, first, mean, _SHOWN, _QUIET)
    judged = _chosen(evidence, ~first, mean, _JUDGED, _JUDGED)
    most = float(evidence.values[shown].max())
    strengths = [round(9 * max(0.0, float(evidence.values[number])) / most) for number in shown]
    texts = [text_of(int(evidence.rows[number]), evidence.in_template) for number in [*shown, *judged]]
    examples = "\n".join(f"{strength}: {text}" for strength, text in zip(strengths, texts, strict=False))
    explanation = one_line(endpoint.ask(_EXPLAIN, examples))
    asked = "\n".join(f"{number}. {text}" for number, text in enumerate(texts[len(shown) :], start=1))
    verdicts = _verdicts(endpoint.ask(_JUDGE.format(explanation=explanation, count=len(judged)), asked), len(judged))
    score = None if verdicts is None else weighted_auroc(verdicts, evidence.values[judged], mean)
    return {"text": explanation, "score": None if score is None else round(score, 3), "model": endpoint.model}


def _chosen(
    evidence: Evidence, half: Bool[np.ndarray, " contexts"], mean: float, strong: int, quiet: int
) -> Int[np.ndarray, " chosen"]:
    """The numbers of the strongest contexts of a half, and of quiet ones spread over it, in the order of the store."""
    members = np.flatnonzero(half)
    values = evidence.values[members]
    top = members[np.argsort(-values, kind="stable")[:strong]]
    low = members[values < mean]
    spread = np.unique(np.linspace(0, len(low) - 1, min(quiet, len(low))).astype(int)) if len(low) else []
    return np.unique(np.concatenate([top[evidence.values[top] >= mean], low[spread]]).astype(np.int64))


def _verdicts(answer: str, count: int) -> Float[np.ndarray, " judged"] | None:
    """The numbers of the first list in an answer; None where it is not one of so many numbers."""
    found = re.search(r"\[[^\[\]]*\]", answer)
    try:
        numbers = json.loads(found[0]) if found else []
    except ValueError:
        return None
    if len(numbers) != count or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return None
    return np.array(numbers, dtype=float)
