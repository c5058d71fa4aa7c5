"""`sfc nulls`: what the method of discovery finds in dictionaries that know nothing of the model."""

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions, base_model, discovery_identity
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.core.ranks import is_leader
from sfc.core.reading import hash_of_given
from sfc.core.registry import imported_when_called
from sfc.data.pairs import pairs_fingerprint
from sfc.data.schema import TOPICS_FILE
from sfc.models.sources import model_identity
from sfc.pages.blocks import Page, Section, Table, cell, interval_cell
from sfc.run import Run
from sfc.session import Session
from sfc.stats import reported
from sfc.studies.collect import COLLECT
from sfc.studies.study import PARTS, STUDIES, Finished, Made, Need, Study, made_in_parts, write_tables
from sfc.studies.train import TRAIN


def needs_of_circuits(run: Run) -> list[Need]:
    """What has to be finished before circuits are found or judged."""
    trained = [Need(TRAIN, run)] if NODES[DiscoveryOptions.of(run.experiment).nodes].needs_saes else []
    return [*trained, Need(COLLECT, run)]


def circuit_inputs(run: Run) -> dict[str, Any]:
    """What fingerprints say of prompts, SAEs and baseline: files of pairs and topics, the base model, where used."""
    options = DiscoveryOptions.of(run.experiment)
    inputs: dict[str, Any] = {
        "prompts": run.store.inputs,
        "saes": run.saes.inputs if NODES[options.nodes].needs_saes else None,
        "hard_share": run.experiment.prompts.hard_share,
    }
    if run.behavior.reads_data_set:
        topics = run.data_folder / TOPICS_FILE
        if options.baseline_choice == "paired":
            inputs["pairs"] = pairs_fingerprint(run.data_folder)
        if METHODS[options.method].reads_topics and topics.is_file():
            inputs["topics"] = hash_of_given(topics)
    if options.contrast == "model-base":
        inputs["base"] = model_identity(base_model(run.experiment))
    return inputs


_OF_GRAPHS = {
    "edges", "edge_share", "edge_threshold", "edges_per_node", "edge_nodes", "edge_prompts", "edge_tokens",
    "drop_dead_ends", "halves", "checked_nodes", "checked_prompts",
}  # fmt: skip
"""options of discovery that the circuits of null dictionaries, which are not drawn, do not depend on"""


class Nulls(Study[DiscoveryOptions]):
    """Run the method of discovery on random and on rotated dictionaries: what would it find in any?

    Random unit directions have the trained dictionaries' widths, numbers of active features and scale; rotated ones are
    the trained ones, turned. The circuits are judged by counterfactual ablation, as those of `sfc discover` are.

    Example: sfc nulls --category privacy --set evaluation.null_draws=3
    """

    name = "nulls"
    options = DiscoveryOptions
    is_shared = True
    files: ClassVar = {"page": "nulls.html", "nulls": "nulls.csv"}

    def label(self, run: Run) -> str:
        options = self.of(run)
        of_prompts = run.behavior.words.said(options.name_of_prompts)
        return f"nulls-{run.group(options.category)}{of_prompts}-{options.method}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options = run.experiment, self.of(run)
        fields = {"error_mode", "sizes", "min_denominator", "null_draws"}
        return {
            **circuit_inputs(run),
            "category": run.group(options.category),
            "discovery": {name: v for name, v in discovery_identity(experiment).items() if name not in _OF_GRAPHS},
            "evaluation": EvaluationOptions.of(experiment).model_dump(include=fields),
        }

    def needs(self, run: Run) -> list[Need]:
        return needs_of_circuits(run)

    work = imported_when_called("sfc.studies.discover.work:work_of_nulls")

    def make(self, session: Session, folder: Path) -> Made:
        table = null_circuits(session, folder / PARTS)
        if not is_leader():
            return Made({})
        files = write_tables(folder, {"nulls": table})
        best = table.groupby("null")["agreement"].max()
        return Made({f"{null}_agreement": reported(value) for null, value in best.items()}, files)

    def page(self, finished: Finished) -> Page:
        records = finished.records(self.files["nulls"])
        rows = [
            (
                f"{row['null']} {int(row['draw']) + 1}", cell(int(row["size"])), cell(row["agreement"]),
                interval_cell(row["agreement_low"], row["agreement_high"]),
                cell(row["recovered_toxic"]), cell(row["recovered_safe"]),
            )
            for row in records
        ]  # fmt: skip
        columns = ("dictionaries", "features", "agreement", "95 %", "recovered", "recovered, other direction")
        return Page(
            title=f"Null dictionaries · {finished.name}",
            sentence="What the same method finds, at the same sizes, in dictionaries that know nothing of the model.",
            sections=[Section("", [Table("Circuits of null dictionaries, test pairs", columns, rows)])],
            findings=[(name, cell(value)) for name, value in finished.result.items()],
        )


def null_circuits(session: Session, folder: Path) -> pd.DataFrame:
    """The circuits that the method finds in null dictionaries, judged on the test pairs.

    Those of each draw are written into the folder, so that several processes can share the draws. Where dictionaries
    have no fixed number of active features there are no random ones like them, and none is judged.

    Returns:
        a row per null, draw and size of the curve: `null`, `draw`, `size`, and the figures of
        `sfc.circuits.proof.pair_figures`.

    Raises:
        UserError: the baseline is no counterfactual.
    """
    from sfc.circuits.faithfulness import curve_sizes, top_circuits
    from sfc.circuits.proof import pair_figures, pair_scores
    from sfc.saes.nulls import NULLS
    from sfc.studies.discover.problem import prepared_once

    run, clock = session.run, session.clock
    config, evaluation = DiscoveryOptions.of(run.experiment), EvaluationOptions.of(run.experiment)
    problem, test_runs, _ = prepared_once(session, run.group(config.category))
    draws = {f"{name}-{draw}": (name, draw) for name in NULLS for draw in range(evaluation.null_draws)}

    def judged(part: str) -> dict[str, Any]:
        name, draw = draws[part]
        try:
            dictionaries = NULLS[name](session.dictionaries, run.experiment.seed + draw)
        except UserError as error:
            say(f"no {name} dictionaries to compare with: {error}")
            return {"rows": []}
        say(f"{config.method} on {name} dictionaries")
        null = problem.read_by(dictionaries)
        ranking = METHODS[config.method].rank(null).ranking
        sizes = curve_sizes(evaluation.sizes, len(ranking))
        circuits = top_circuits(ranking, sizes, null.ablation.nodes.n_nodes)
        with progress_bar("judging", (len(sizes) + 1) * test_runs.n_prompts, "runs") as progress:
            scores = pair_scores(null.model, null.score, null.ablation, test_runs, circuits, progress)
        clock.lap(f"{name} dictionaries")
        figures = [pair_figures(of_size, evaluation.min_denominator, run.experiment.seed) for of_size in scores]
        at_sizes = zip(sizes, figures, strict=True)
        return {"rows": [{"null": name, "draw": draw, "size": size, **figures} for size, figures in at_sizes]}

    return pd.DataFrame([row for part in made_in_parts(folder, list(draws), judged).values() for row in part["rows"]])


STUDY = Nulls()
STUDIES.register(STUDY)


def has_nulls(run: Run) -> bool:
    """Whether null dictionaries say something about the run's circuits."""
    options = DiscoveryOptions.of(run.experiment)
    judged = options.baseline_choice == "counterfactual" and EvaluationOptions.of(run.experiment).null_draws > 0
    return judged and NODES[options.nodes].needs_saes


def nulls_of(run: Run) -> pd.DataFrame | None:
    """The finished table of `null_circuits`; None where there is none to be had."""
    return Finished(STUDY.artifact(run).folder).table(STUDY.files["nulls"]) if has_nulls(run) else None


def beside(nulls: pd.DataFrame | None, size: int, agreement: float | None) -> dict[str, float | None]:
    """Of each null the best circuit of a size, and the share of nulls that agree no less than the circuit does.

    Returns:
        `null_agreement`, `rotated_agreement`, each with `…_low` and `…_high`, and `p_value`, which counts the circuit
        among the nulls: with n of them it is at least `1 / (n + 1)`. None where there is nothing to compare.
    """
    names = {"random": "null_agreement", "rotated": "rotated_agreement"}
    figures: dict[str, float | None] = {f"{n}{end}": None for n in names.values() for end in ("", "_low", "_high")}
    figures["p_value"] = None
    if nulls is None:
        return figures
    of_size = nulls[(nulls["size"] == size) & nulls["agreement"].notna()]
    for null, name in names.items():
        of_null = of_size[of_size["null"] == null]
        if len(of_null):
            best = of_null.iloc[int(of_null["agreement"].argmax())]
            figures |= {f"{name}{end}": float(best[f"agreement{end}"]) for end in ("", "_low", "_high")}
    if agreement is not None and len(of_size):
        figures["p_value"] = float((1 + (of_size["agreement"] >= agreement).sum()) / (1 + len(of_size)))
    return {name: reported(value) for name, value in figures.items()}
