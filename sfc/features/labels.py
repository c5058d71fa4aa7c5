"""Short names for features: an automatic one by rule, and the one that a reader gives it in `labels.json`.

The rule, from a feature's strongest contexts (each in another prompt) and the tokens that it raises:

1. A feature without contexts is `never fires here`.
2. Where the strongest token is one of the chat template in at least half of the contexts: `at “↵” of toxic violence
   prompts → “I” “Sorry”`: the commonest such token, the population of three quarters of the contexts and the category
   of half of them, if there are such, and the two tokens the feature raises most.
3. Else the strongest tokens that recur, case and spaces aside, in at least a quarter of the contexts, at most three,
   commonest first: `“kill” “attack”`.
4. Where none recurs: `many tokens → “weapon” “gun”`, the two tokens it raises most.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sfc.core.artifacts import read_json
from sfc.core.errors import UserError

ADDRESS = "https://www.neuronpedia.org/"
CARDS_FILE, LABELS_FILE = "features.json", "labels.json"
_MOST_TOKENS, _MOST_RAISED = 3, 2
_SIGNS = {"\n": "↵", "\t": "⇥"}


class Peak(NamedTuple):
    """A context as the rule sees it."""

    token: str
    """the strongest one"""
    in_template: bool
    population: str
    category: str


def automatic_label(peaks: Sequence[Peak], raises: Sequence[str]) -> str:
    """The label by the rule above; `raises` are the tokens that the feature raises, strongest first."""
    if not peaks:
        return "never fires here"
    effect = " ".join(_quoted(token) for token in raises[:_MOST_RAISED])
    effect = f" → {effect}" if effect else ""
    in_template = [peak.token for peak in peaks if peak.in_template]
    if 2 * len(in_template) >= len(peaks):
        token = Counter(in_template).most_common(1)[0][0]
        return f"at {_quoted(token)}{_prompts(peaks)}{effect}"
    common = Counter(peak.token.strip().lower() for peak in peaks).most_common(_MOST_TOKENS)
    recurring = [token for token, count in common if count > 1 and 4 * count >= len(peaks)]
    return " ".join(map(_quoted, recurring)) if recurring else f"many tokens{effect}"


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


def with_own_labels(cards: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The cards of `features.json`, with the labels of `labels.json` in place of automatic ones.

    Raises:
        UserError: as `own_labels`.
    """
    labels = own_labels(folder, cards["features"])
    features = {name: {**card, "label": labels.get(name, card["label"])} for name, card in cards["features"].items()}
    return {**cards, "features": features}


def labels_of(folder: Path) -> dict[str, str]:
    """The labels of a circuit's features, own and automatic ones; none where it has no cards.

    Raises:
        UserError: as `own_labels`.
    """
    if not (folder / CARDS_FILE).is_file():
        return {}
    cards = with_own_labels(read_json(folder / CARDS_FILE), folder)
    return {name: card["label"] for name, card in cards["features"].items()}


def _prompts(peaks: Sequence[Peak]) -> str:
    """` of toxic violence prompts`, as far as the contexts agree."""
    population, of_population = Counter(peak.population for peak in peaks).most_common(1)[0]
    category, of_category = Counter(peak.category for peak in peaks).most_common(1)[0]
    words = [population] * (4 * of_population >= 3 * len(peaks)) + [category] * (2 * of_category >= len(peaks))
    return f" of {' '.join(words)} prompts" if words else ""


def _quoted(token: str) -> str:
    return f"“{''.join(_SIGNS.get(character, character) for character in token.strip(' ')) or ' '}”"
