"""What `sfc compare` takes: the circuits of all categories, of their halves and of pools, on every one's prompts."""

import itertools

from sfc.circuits.work import ablated, edges
from sfc.core.work import Amounts, Work, total
from sfc.models.work import rows_of
from sfc.studies.compare import Compare
from sfc.studies.discover.work import preparing, question, ranking, replying, runs, share_of
from sfc.studies.sketch import Sketch

_PARTS, _RESTS = 2, 3
"""halves of a category; and circuits of each that are judged beside those of all categories"""
_FILES = 6_000_000
"""bytes of its page and tables, most of them plotly's own script"""


def work(study: Compare, sketch: Sketch) -> list[Work]:
    """Its steps.

    Raises:
        UserError: a category lacks prompts.
    """
    run, options = sketch.run, study.of(sketch.run)
    categories = study.categories(run)
    asked = [question(sketch, category) for category in categories]
    n_pools = min(options.shuffles, len(list(itertools.combinations(categories, 2))))
    n_judged = len(categories) + _RESTS
    # A pool's two halves have as many prompts as a category's.
    parts = 1 + _PARTS * (1 + n_pools / len(categories))
    found, judged = [], []
    for asks in asked:
        rank, half = ranking(sketch, asks), share_of(asks.asked.discovery, rows_of(asks.asked.discovery) // 2)
        between = edges(asks.asked, asks.asked.discovery, options.size) if options.edges else Amounts()
        of_halves = edges(asks.asked, half, options.size) if options.edges else Amounts()
        found += [rank.amounts * parts, between, of_halves * (parts - 1), preparing(sketch, asks).amounts * parts]
        both_sides = ablated(asks.asked, asks.by_means, 2 * n_judged + 1) + ablated(asks.asked, asks.test, n_judged + 1)
        published = ablated(asks.asked, asks.by_means or asks.test, 2 * n_judged + 1) * asks.positive
        answered = replying(sketch, asks, 2 * options.replies, _RESTS, options.reply_tokens) if options.replies else None
        judged += [preparing(sketch, asks).amounts, both_sides, published, answered.amounts if answered else Amounts()]
    largest = max(asked, key=lambda asks: rows_of(asks.asked.discovery))
    rank = ranking(sketch, largest)
    scoring = runs(sketch, largest, "", largest.test, n_judged)
    return [
        sketch.loading(),
        Work("circuits", total(found), rank.device, rank.host),
        Work("test prompts", total(judged), scoring.device, scoring.host, _FILES),
    ]


