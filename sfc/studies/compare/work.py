"""What `sfc compare` takes: the circuits of all categories, of their halves and of pools, on every one's prompts."""

import itertools

from sfc.circuits.work import ablated, edges
from sfc.core.work import Amounts, Work, total
from sfc.models.work import rows_of, some_of
from sfc.studies.compare import Compare
from sfc.studies.discover.work import preparing, question, ranking, replying, running
from sfc.studies.sketch import Sketch

_HALVES, _RESTS = 2, 3
"""circuits of a category beside its own; and those judged on its prompts beside those of all categories"""
_FILES = 6_000_000
"""bytes of its page and tables, most of them plotly's own script"""


def work(study: Compare, sketch: Sketch) -> list[Work]:
    """Its steps.

    Raises:
        UserError: a category lacks prompts.
    """
    options, categories = study.of(sketch.run), study.categories(sketch.run)
    asked = [question(sketch, category) for category in categories]
    # Circuits to be compared come from their own prompts alone.
    asked = [asks._replace(asked=asks.asked._replace(pooled=())) for asks in asked]
    n_pools = min(options.shuffles, len(list(itertools.combinations(categories, 2))))
    n_judged, prompts = len(categories) + _RESTS, sketch.run.experiment.prompts
    of_discovery = prompts.discovery / (prompts.discovery + prompts.test)  # circuits are found without test prompts
    # A pool's two halves have as many prompts as a category's.
    halves = _HALVES * (1 + n_pools / len(categories))
    found, judged = [], []
    for asks in asked:
        prepared, discovery = preparing(sketch, asks).amounts, asks.asked.discovery
        found += [(prepared * of_discovery + ranking(sketch, asks).amounts) * (1 + halves)]
        if options.edges:
            half = some_of(discovery, rows_of(discovery) // 2)
            found += [edges(asks.asked, discovery, options.size), edges(asks.asked, half, options.size) * halves]
        judged += [prepared, ablated(asks.asked, asks.by_means, 2 * n_judged + 1)]
        judged += [ablated(asks.asked, asks.test, n_judged + 1), ablated(asks.asked, asks.positives, 2 * n_judged + 1)]
        if options.replies:
            judged += [replying(sketch, asks, 2 * options.replies, _RESTS, options.reply_tokens).amounts]
    largest = max(asked, key=lambda asks: rows_of(asks.asked.discovery))
    rank, scoring = ranking(sketch, largest), running(sketch, largest, "", largest.test, Amounts())
    return [
        sketch.loading(),
        Work("circuits", total(found), rank.device, rank.host, note=rank.note),
        Work("test prompts", total(judged), scoring.device, kept=_FILES),
    ]
