"""What is known of each feature of a circuit, as plain JSON: `features.json` in the circuit's folder.

{"groups": [{"population": "toxic", "category": "violence", "n_prompts": 65}, …],
 "features": {"resid_post.21/F463": {
     "label", "score",            what it fires on, and how well that tells; see `sfc.features.contexts`
     "explanation",               perhaps: {"text", "score", "model"}; see `sfc.features.explainer`
     "published",                 perhaps: {"text", "model"}; see `sfc.features.neuronpedia`
     "fires_on",                  see `fires_on`
     "raises", "lowers",          tokens, as the circuit has them
     "density", "max",            share of the store's tokens at which it is active; its largest value
     "histogram": {"from", "counts"},   active tokens by value: bins of half an octave from `from` on
     "firing",                    by group: the share of prompts in which it is active at some token
     "contexts": [{"tokens", "values", "peak", "in_template", "population", "category"}],
                                  strongest first, from different prompts; `peak`: the place of the strongest token
     "neighbours": [{"node", "cosine"}],      by decoder direction, in the same dictionary
     "neuronpedia"}}}             the feature's page, where the dictionary is one they host
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.behaviors.behavior import Words
from sfc.core.sites import short_site
from sfc.data.render import Role
from sfc.features.activity import AFTER, BEFORE, BIN_EDGES, Activity, activity
from sfc.features.contexts import Evidence, evidence_of, rows_for_labels
from sfc.features.labels import ADDRESS
from sfc.models.loading import Model
from sfc.saes.dictionary import Dictionary
from sfc.saes.plan import TokenTable
from sfc.saes.store import Store


class Neighbour(NamedTuple):
    """Another feature of the same dictionary, and the cosine of the two decoder directions."""

    feature: int
    cosine: float


@torch.no_grad()
def nearest_neighbours(
    decoder: Float[Tensor, "d_sae d_in"], features: Sequence[int], count: int = 5
) -> list[list[Neighbour]]:
    """For each of these features the `count` others of largest cosine, nearest first."""
    directions = torch.nn.functional.normalize(decoder.float(), dim=1)
    cosines = directions[list(features)] @ directions.T
    cosines[torch.arange(len(features)), torch.tensor(features, dtype=torch.long)] = -torch.inf
    nearest = cosines.topk(min(count, len(decoder) - 1), dim=1)
    return [
        [Neighbour(*pair) for pair in zip(indices, values, strict=True)]
        for indices, values in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    ]


_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def neuronpedia_page(config: Mapping[str, Any], feature: int) -> str | None:
    """The address of a feature's page; None where the dictionary's files name no place at Neuronpedia.

    Args:
        config: the dictionary's configuration, as `read_config` gives it. SAELens writes `neuronpedia_id` into it,
            such as `gpt2-small/8-res-jb`.
    """
    name = config["metadata"].get("neuronpedia_id") or config.get("neuronpedia_id")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or feature >= config["d_sae"]:
        return None
    return f"{ADDRESS}{name}/{feature}"


class TokenEffects(NamedTuple):
    """The tokens whose logits a direction raises and lowers most, strongest first; none where they do not stand out."""

    raises: list[str]
    lowers: list[str]


_MIXTURES, _STANDING_OUT = 400, 0.99


@torch.no_grad()
def token_effects(
    model: Model, decoder: Float[Tensor, "d_sae d_model"], features: Sequence[int], count: int = 6
) -> list[TokenEffects]:
    """The logit lens on directions of the residual stream, with the final norm's weights and without its scale.

    Some tokens come first for any direction. So they are named only where the first of them stands out: it is further
    from the mean of all logits, in standard deviations, than that of 99 % of random mixtures of the decoder's rows.
    """
    weights = torch.randn(_MIXTURES, len(decoder), generator=torch.Generator().manual_seed(0)).to(decoder)
    logits = _logits(model, torch.cat([decoder[list(features)], weights @ decoder]))
    named: list[list[list[str]]] = []
    for sign in (1, -1):
        values, tokens = (sign * logits).topk(count, dim=1)
        first = values[:, 0] / logits.std(dim=1)
        least = first[len(features) :].quantile(_STANDING_OUT)
        texts = [[model.tokenizer.decode([token]) for token in ids] for ids in tokens.tolist()]
        named.append([of_row if z > least else [] for z, of_row in zip(first, texts, strict=True)])
    return [TokenEffects(*pair) for pair in zip(*named, strict=True)][: len(features)]


def _logits(model: Model, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
    """What directions add to each logit, less the mean over tokens: what raises every logit alike raises none."""
    norm_weight = getattr(model.bridge.ln_final, "weight", None)
    if norm_weight is not None:
        directions = directions * norm_weight.to(directions)
    unembedding = model.hf.get_output_embeddings().weight.float()
    return directions.float() @ (unembedding - unembedding.mean(0)).T


_PREFERENCE = 2.0


def feature_cards(
    store: Store,
    dictionaries: Mapping[str, Dictionary],
    graph: nx.DiGraph,
    names: Sequence[str],
    prompts: pd.DataFrame,
    token_text: Callable[[int], str],
    words: Words,
) -> tuple[dict[str, Any], dict[str, Evidence]]:
    """The cards of the features named, of a circuit of these dictionaries, and what their labels were made of.

    Args:
        prompts: the store's prompt table, with `prompt`, `category` and `dataset_type`.
        token_text: the text of a token id.
        words: what the two sides of the prompts are called.
    """
    groups, group_of_prompt = _groups(prompts, words)
    is_kept = rows_for_labels(store.tokens, prompts)
    cards: dict[str, Any] = {}
    values: dict[str, Float[np.ndarray, "kept features"]] = {}
    for site, dictionary in dictionaries.items():
        of_site = [n for n in names if graph.nodes[n]["site"] == site and graph.nodes[n]["kind"] == "feature"]
        if not of_site:
            continue
        features = [int(name.rpartition("/F")[2]) for name in of_site]
        measured = activity(store, dictionary, features, group_of_prompt, is_kept)
        values |= dict(zip(of_site, measured.kept.T, strict=True))
        neighbours = nearest_neighbours(dictionary.W_dec, features)
        for number, name in enumerate(of_site):
            card = _card(measured, number, store, token_text)
            for context in card["contexts"]:
                group = groups[int(group_of_prompt[context.pop("prompt")])]
                context |= {key: group[key] for key in ("population", "category")}
            card |= {key: list(graph.nodes[name].get(key, [])) for key in ("raises", "lowers")}
            card["fires_on"] = fires_on(measured.mean_peak[number], groups, str(graph.graph.get("category")), words)
            card["neighbours"] = [
                {"node": f"{short_site(site)}/F{feature}", "cosine": _rounded(cosine)}
                for feature, cosine in neighbours[number]
            ]
            cards[name] = card
    rows = np.flatnonzero(is_kept)
    tokens = TokenTable(*(column[rows] for column in store.tokens))
    found = evidence_of(np.stack(list(values.values()), 1), tokens, prompts, words, token_text) if values else []
    evidence = {name: of._replace(rows=rows[of.rows]) for name, of in zip(values, found, strict=True)}
    shown = {
        name: {"label": evidence[name].label, "score": evidence[name].score, **cards[name]}
        for name in names
        if name in cards
    }
    return {"groups": groups, "features": shown}, evidence


def fires_on(
    mean_peak: Sequence[float] | np.ndarray, groups: Sequence[Mapping[str, Any]], category: str, words: Words
) -> str:
    """The side on whose prompts, of this category, the feature's peaks are on average twice as high.

    Else `shared`, also where one side has no prompts. All prompts that are not positive count as negative, hard ones
    among them.
    """
    positive, negative = words.positive, words.negative
    sums, counts = {positive: 0.0, negative: 0.0}, {positive: 0, negative: 0}
    for peak, group in zip(mean_peak, groups, strict=True):
        if category in ("all", group["category"]):
            side = positive if group["population"] == positive else negative
            sums[side] += float(peak) * group["n_prompts"]
            counts[side] += group["n_prompts"]
    if not all(counts.values()):
        return "shared"
    on_positive, on_negative = (sums[side] / counts[side] for side in (positive, negative))
    if on_positive >= _PREFERENCE * on_negative and on_positive > 0:
        return positive
    return negative if on_negative >= _PREFERENCE * on_positive and on_negative > 0 else "shared"


def _groups(prompts: pd.DataFrame, words: Words) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The groups of prompts, a population of a category each, and the number of each prompt's group."""
    populations = [words.kinds.get(kind, kind) for kind in prompts["dataset_type"]]
    keys = list(zip(populations, prompts["category"], strict=True))
    order = list(words.kinds.values())
    known = sorted(set(keys), key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key))
    number = {key: i for i, key in enumerate(known)}
    group_of_prompt = np.array([number[key] for key in keys])
    sizes = np.bincount(group_of_prompt, minlength=len(known)).tolist()
    groups = [
        {"population": population, "category": category, "n_prompts": size}
        for (population, category), size in zip(known, sizes, strict=True)
    ]
    return groups, group_of_prompt


def _card(measured: Activity, number: int, store: Store, token_text: Callable[[int], str]) -> dict[str, Any]:
    """What one pass over the store says of a feature."""
    rows = [int(row) for row in measured.peak_rows[number] if row >= 0]
    contexts = [
        _context(store, row, window, token_text) for row, window in zip(rows, measured.windows[number], strict=False)
    ]
    counts = measured.counts[number]
    filled = np.flatnonzero(counts)
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, -1)
    return {
        "density": _rounded(counts.sum() / store.n_tokens),
        "max": max((value for context in contexts for value in context["values"]), default=0.0),
        "histogram": {"from": _rounded(BIN_EDGES[first]), "counts": counts[first : last + 1].tolist()},
        "firing": [_rounded(share) for share in measured.firing[number]],
        "contexts": contexts,
    }


def _context(store: Store, peak: int, window: np.ndarray, token_text: Callable[[int], str]) -> dict[str, Any]:
    """The tokens of a prompt around its strongest one, and the feature's values there."""
    rows = np.arange(peak - BEFORE, peak + AFTER + 1)
    inside = (rows >= 0) & (rows < store.n_tokens)
    inside[inside] = store.tokens.prompt[rows[inside]] == store.tokens.prompt[peak]
    kept = rows[inside]
    return {
        "prompt": int(store.tokens.prompt[peak]),
        "tokens": [token_text(int(token)) for token in store.tokens.token[kept]],
        "values": [_rounded(value) for value in window[inside]],
        "peak": int(np.flatnonzero(kept == peak)[0]),
        "in_template": bool(store.tokens.role[peak] == Role.SUFFIX),
    }


def _rounded(value: float) -> float:
    """Four significant digits: more would only make the file larger."""
    return float(f"{value:.4g}")
