"""Every discovery method on the same prompts, judged by the same proof.

Each method ranks the nodes on the discovery prompts of one category; the size of its circuit is chosen on them too, as
`sfc discover` does; the figures are of the test prompts, and beside them what its best 500 and 2,000 nodes recover, in
the direction in which they recover less. Seconds are those that the processor was busy with the ranking alone, beside
the forward passes over the same prompts that would have taken as long. Each row is told when it is known.

Activations and SAEs are those of the root folder, made first where they are missing.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import category
import harness

from sfc.circuits.faithfulness import curve_sizes, top_circuits
from sfc.circuits.methods import METHODS
from sfc.circuits.options import EvaluationOptions
from sfc.core.progress import say
from sfc.models.score import score_prompts
from sfc.stats import reported
from sfc.studies.discover.evidence import Evidence, chosen_size, judge

QUICK = ("attribution", "relevance")
FIGURES = ("recovered_toxic", "recovered_safe", "agreement", "gap_kept", "prompt_free")
SIZES = (500, 2000)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and, with --json, the figures."""
    options = _options(arguments)
    methods = options.methods.split(",") if options.methods else QUICK if options.quick else METHODS.names()
    session = category.session(options)
    problem, test_runs = category.problem_of(session, options.category)
    rows = measure(Evidence.of(session, problem, test_runs), methods, options.device)
    figures = {"methods": rows, "machine": harness.machine(options.device)}
    harness.emit(report(rows), figures, options.json)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = category.parser(__doc__)
    parser.add_argument("--methods", help="names, separated by commas; all by default")
    return parser.parse_args(arguments)


def measure(evidence: Evidence, methods: Sequence[str], device: str) -> list[dict[str, Any]]:
    """A row for each method: its size, `FIGURES`, what its best `SIZES` recover, `seconds` and `passes`."""
    problem, rows = evidence.problem, []
    one_pass, _ = _seconds(lambda: score_prompts(problem.model, problem.score, problem.runs.batches), device)
    for name in methods:
        say(f"{name} …")
        seconds, effects = _seconds(lambda name=name: METHODS[name].rank(problem), device)
        sizes = curve_sizes(EvaluationOptions.of(problem.experiment).sizes, len(effects.ranking))
        size, on_discovery = chosen_size(problem, effects.ranking, sizes)
        filled = [wanted for wanted in SIZES if wanted <= len(effects.ranking)]
        circuits = top_circuits(effects.ranking, [size, *filled], problem.ablation.nodes.n_nodes)
        judged, *others = judge(evidence, circuits, problem.experiment.seed)
        rows.append(
            {
                "method": name,
                "size": size,
                "ranked": len(effects.ranking),
                "on_discovery": reported(on_discovery[sizes.index(size)]),
                **{figure: judged.figures[figure] for figure in FIGURES},
                **{f"at_{wanted}": None for wanted in SIZES},
                **{f"at_{wanted}": _worse(other.figures) for wanted, other in zip(filled, others, strict=True)},
                "seconds": seconds,
                "passes": seconds / one_pass,
            }
        )
        say(str(rows[-1]))
    return rows


def _worse(figures: dict[str, float | None]) -> float | None:
    toxic, safe = figures["recovered_toxic"], figures["recovered_safe"]
    return None if toxic is None or safe is None else min(toxic, safe)


def _seconds(call: Any, device: str) -> tuple[float, Any]:
    """Of the processor, all threads together, which other programs hardly change; on a GPU by the clock."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    result = call()
    harness.synchronise(device)
    return clock() - began, result


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    return harness.markdown_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: Any) -> str:
    return (
        "" if value is None else value if isinstance(value, str) else f"{value:,.2f}" if value % 1 else f"{value:,.0f}"
    )


if __name__ == "__main__":
    main()
