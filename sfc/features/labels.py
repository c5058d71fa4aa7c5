"""Labels of features as they are shown: the automatic one with its score, and the one that a reader gives it.

Automatic labels stand in `features.json` (see `sfc.features.contexts`); those of a reader, in `labels.json`, take their
place.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sfc.core.artifacts import read_json, read_model
from sfc.core.errors import UserError

ADDRESS = "https://www.neuronpedia.org/"
CARDS_FILE, LABELS_FILE = "features.json", "labels.json"


def caption(card: Mapping[str, Any]) -> str:
    """A card's label, with its score behind it; labels that a reader gave have none."""
    score = card.get("score")
    return card["label"] if score is None else f"{card['label']} · {score:.2f}"


def explained(card: Mapping[str, Any]) -> str:
    """The explanations of a feature: a model's, with its score, and Neuronpedia's; empty without one."""
    told = []
    if explanation := card.get("explanation"):
        score = "not scored" if explanation["score"] is None else f"{explanation['score']:.2f}"
        told.append(f"explanation by the model {explanation['model']}: {explanation['text']} · {score}")
    if (published := card.get("published")) and published["text"]:
        by = f" (by {published['model']})" if published["model"] else ""
        told.append(f"Neuronpedia{by}: {published['text']}")
    return "; ".join(told)


def said(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a table says of a card: `label`, `score` and `explanation`, without what there is not."""
    told = {"label": card.get("label"), "score": card.get("score"), "explanation": explained(card)}
    return {key: value for key, value in told.items() if value not in (None, "")}


def own_labels(folder: Path, known: Iterable[str]) -> dict[str, str]:
    """The labels of `labels.json` in a circuit's folder, `{"resid_post.21/F463": "a label"}`; none without the file.

    Raises:
        UserError: the file is not of that form, or names a feature that the circuit does not have.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return {}
    labels = read_json(path)
    if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
        raise UserError(f'{path} must hold labels by feature: {{"resid_post.21/F463": "a label"}}')
    if unknown := sorted(labels.keys() - set(known)):
        raise UserError(f"{path} names {unknown[0]!r}, which is no feature of this circuit's page")
    return labels


class _Card(BaseModel):
    """What every card has, whatever else it says; lists are checked no further."""

    model_config = ConfigDict(extra="allow", strict=True)

    label: str
    score: float | None
    density: float
    max: float
    histogram: dict[str, Any]
    firing: list[float | None]
    contexts: list[dict[str, Any]]
    raises: list[Any]
    lowers: list[Any]
    fires_on: str
    neighbours: list[dict[str, Any]]


class _Cards(BaseModel):
    groups: list[dict[str, Any]]
    features: dict[str, _Card]


NO_CARDS: Mapping[str, Any] = {"groups": [], "features": {}}
"""what is known of features where there are no cards"""


def read_cards(folder: Path) -> dict[str, Any]:
    """The cards of a circuit's `features.json`, as `sfc.features.cards` wrote them.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_model(folder / CARDS_FILE, _Cards).model_dump()


def shown_cards(folder: Path) -> Mapping[str, Any]:
    """The cards of a circuit as they are shown, with the labels of a reader; `NO_CARDS` where it has none.

    Raises:
        UserError: as `read_cards` and `own_labels`.
    """
    return with_own_labels(read_cards(folder), folder) if (folder / CARDS_FILE).is_file() else NO_CARDS


def with_own_labels(cards: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The cards of `features.json`, with the labels of `labels.json`, which have no score, in place of automatic ones.

    Raises:
        UserError: as `own_labels`.
    """
    labels = own_labels(folder, cards["features"])
    own = {name: {"label": label, "score": None} for name, label in labels.items()}
    return {**cards, "features": {name: {**card, **own.get(name, {})} for name, card in cards["features"].items()}}


def labels_of(folder: Path) -> dict[str, str]:
    """The labels of a circuit's features, own and automatic ones, as `caption` has them; none where it has no cards.

    Raises:
        UserError: as `shown_cards`.
    """
    return {name: caption(card) for name, card in shown_cards(folder)["features"].items()}
