"""What Neuronpedia says of the features of published dictionaries, fetched when `labels.neuronpedia` asks for it.

Only the names of features are sent, never a prompt. What comes back is untrusted: it is cut to one short line, shown as
text only, and named as Neuronpedia's. It is kept below the root, so that no feature is asked for twice, and written
into `features.json`; where there is no network, nothing changes.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from pydantic import BaseModel, RootModel

from sfc.core.artifacts import read_model, write_json
from sfc.core.files import below
from sfc.core.progress import progress_bar, say
from sfc.features.explainer import LabelOptions, answer_within, one_line
from sfc.features.labels import ADDRESS, CARDS_FILE, read_cards

SERVER = "SFC_NEURONPEDIA"
"""the environment variable with the address of another server that answers as Neuronpedia does"""
FOLDER = "neuronpedia"
_SECONDS = 20
_PLACE = re.compile(re.escape(ADDRESS) + r"([\w.-]+)/([\w.-]+)/(\d+)")


class Published(BaseModel):
    """An explanation that is published."""

    text: str
    """empty where there is none"""
    model: str
    """what explained the feature; empty where that is not told"""


class _Kept(RootModel[dict[str, Published]]):
    """The explanations of a dictionary's features, by their numbers."""


def unfetched(folder: Path, options: LabelOptions) -> list[str]:
    """The features of a finished circuit with a place at Neuronpedia that has not been looked at, if that is wanted."""
    if not options.neuronpedia or not (folder / CARDS_FILE).is_file():
        return []
    features = read_cards(folder)["features"]
    return [name for name, card in features.items() if _place(card) and "published" not in card]


def fetch_explanations(root: Path, folder: Path, options: LabelOptions) -> bool:
    """Write into a circuit's `features.json` what is published of its features; what is known below `root` comes first.

    Returns:
        Whether there was anything to write. What cannot be fetched is left for another time, and said.

    Raises:
        UserError: a file is damaged.
    """
    names, cards = unfetched(folder, options), read_cards(folder)
    server = os.environ.get(SERVER, ADDRESS).rstrip("/")
    kept: dict[Path, dict[str, Published]] = {}
    done = 0
    with progress_bar(f"asking {server}", len(names), "features") as progress:
        for name in names:
            model, source, number = _place(cards["features"][name]) or ("", "", "")
            path = below(root, FOLDER) / f"{model}--{source}.json"
            if path not in kept:
                kept[path] = read_model(path, _Kept).root if path.is_file() else {}
            known = kept[path]
            try:
                found = known[number] if number in known else _fetch(f"{server}/api/feature/{model}/{source}/{number}")
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = f"answers {error.code}" if isinstance(error, urllib.error.HTTPError) else "gives no answer"
                say(f"{server} {reason}: {len(names) - done} features are left for another time, by the same command")
                break
            known[number] = found
            cards["features"][name]["published"] = found.model_dump()
            done += 1
            progress(1)
    for path, known in kept.items():
        if known:
            write_json(path, _Kept(known).model_dump())
    if done:
        write_json(folder / CARDS_FILE, cards)
    return done > 0


def _place(card: dict[str, Any]) -> tuple[str, str, str] | None:
    """Model, source and number of a card's feature at Neuronpedia."""
    match = _PLACE.fullmatch(str(card.get("neuronpedia")))
    return (match[1], match[2], match[3]) if match else None


def _fetch(address: str) -> Published:
    """The first explanation that an address gives of a feature.

    Raises:
        OSError, ValueError, HTTPException: there is no answer, or it is not of the documented form.
    """
    request = urllib.request.Request(address, headers={"Accept": "application/json"})
    try:
        answer = json.loads(answer_within(request, _SECONDS))
    except urllib.error.HTTPError as error:
        if error.code == 404:  # they do not have the feature, and say so
            return Published(text="", model="")
        raise
    if not isinstance(answer, dict):
        raise ValueError("it is no object")
    explanations = answer.get("explanations")
    for each in explanations if isinstance(explanations, list) else []:
        text = one_line(str(each.get("description") or "")) if isinstance(each, dict) else ""
        if text:
            return Published(text=text, model=one_line(str(each.get("explanationModelName") or "")))
    return Published(text="", model="")
