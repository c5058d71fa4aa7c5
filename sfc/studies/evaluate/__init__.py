"""`sfc evaluate`: any circuits, ours or others', judged on test prompts, or on prompts of files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from pydantic import Field

from sfc.behaviors.behavior import Words
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.core.reading import hash_of_given
from sfc.core.registry import imported_when_called
from sfc.data.read import LABELS
from sfc.pages.blocks import Figure, Page, Paragraph, Section, Table, cell, figure_cell
from sfc.pages.proof import both_sides, proof_by_size, verdict
from sfc.pages.style import AMBER, BLUE, INK, LINE, QUIET, VERMILION, axis, styled_figure
from sfc.pages.text import count_text, hover_text
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover import DISCOVER, circuit_of
from sfc.studies.nulls import circuit_inputs, needs_of_circuits, nulls_of
from sfc.studies.study import STUDIES, Finished, Made, Need, Study


class EvaluateOptions(Options):
    """Which circuits are judged, on whose test prompts."""

    section = "evaluate"
    circuits: list[str] = option(
        [],
        positional=True,
        description="circuit.json files, node lists (.json or .csv), graph files of circuit-tracer; none: the"
        " category's own circuit",
    )
    category: str | None = option(None, description="OR-Bench category, or all, whose test prompts judge them")
    prompts: list[str] = option(
        [],
        description="judge on the prompts of these CSV files instead (column prompt, and label: toxic, hard or safe;"
        " XSTest's columns work). FILE=toxic says what prompts without a label are. A side that no file has is that of"
        " the category's test prompts",
    )
    limit: int = Field(100, ge=1, description="with --prompts: at most this many prompts of each kind, chosen by hash")


class PromptFile(NamedTuple):
    """A file of prompts, and the label of those that have none."""

    path: Path
    label: str | None

    @classmethod
    def of(cls, text: str) -> "PromptFile":
        """What `FILE` or `FILE=toxic` names."""
        path, _, label = text.rpartition("=")
        return cls(Path(path), label) if path and label in LABELS else cls(Path(text), None)


class Evaluate(Study[EvaluateOptions]):
    """Judge any circuits, ours or others', on test prompts of both sides: do they decide, or refuse whatever is asked?

    Nodes are named resid_post.21/F12 or resid_post.21/error, or by SAELens' or Neuronpedia's ids of the dictionaries
    in use, such as gpt2-small/6-res-jb/650.

    Example: sfc evaluate mine.csv circuits/smollm2/circuit-privacy-*/circuit.json --category violence
    """

    name = "evaluate"
    options = EvaluateOptions
    is_shared = True
    schema = 2
    also = ((DiscoveryOptions, "population"), (DiscoveryOptions, "contrast"))
    files: ClassVar = {
        "page": "evaluation.html",
        "curves": "curves.csv",
        "scores": "scores.csv",
        "replies": "replies.csv",
        "prompts": "prompts.csv",
    }

    def check(self, run: Run) -> None:
        for path in self.of(run).circuits:
            if not Path(path).is_file():
                raise UserError(
                    f"no file {path}: `sfc evaluate` takes circuits, node lists in JSON or CSV, or graph files"
                )
        for file in self.prompt_files(run):
            if not file.path.is_file():
                raise UserError(f"no file {file.path}: --prompts takes CSV files with a column 'prompt'")
        discovery = DiscoveryOptions.of(run.experiment)
        of_its_own = discovery.contrast == "refused-complied" or discovery.baseline_choice == "paired"
        if self.of(run).prompts and (of_its_own or not run.behavior.has_own_saes):
            raise UserError(
                f"--prompts: contrast {discovery.contrast!r} with baseline {discovery.baseline_choice!r} has prompts of"
                " its own, which no file can replace"
            )

    def prompt_files(self, run: Run) -> list[PromptFile]:
        """The files whose prompts judge; none where the test prompts do."""
        return [PromptFile.of(text) for text in self.of(run).prompts]

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        asked = "".join(f"-{file.path.stem}" for file in self.prompt_files(run))
        of_prompts = run.behavior.words.said(discovery.name_of_prompts)
        return f"evaluation-{run.group(self.of(run).category)}{of_prompts}{asked}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options, discovery = run.experiment, self.of(run), DiscoveryOptions.of(run.experiment)
        files = [Path(path) for path in options.circuits]
        listed = [[path.resolve().parent.name, path.name, hash_of_given(path)] for path in files]
        asked = [[file.path.name, file.label, hash_of_given(file.path)] for file in self.prompt_files(run)]
        return {
            **circuit_inputs(run),
            "category": run.group(options.category),
            "nodes": discovery.nodes,
            "population": discovery.population,
            "contrast": discovery.contrast,
            "baseline": discovery.baseline_choice,
            "pairs_per_prompt": discovery.pairs_per_prompt,
            "edge_nodes": discovery.edge_nodes,
            "evaluation": EvaluationOptions.of(experiment).model_dump(),
            "circuits": listed or DISCOVER.artifact(self._own(run)).inputs,
            "asked": [*asked, options.limit] if asked else None,
        }

    def needs(self, run: Run) -> list[Need]:
        own = [] if self.of(run).circuits else [Need(DISCOVER, self._own(run))]
        return [*needs_of_circuits(run), *own]

    work = imported_when_called("sfc.studies.discover.work:work_of_evaluation")

    def make(self, session: Session, folder: Path) -> Made:
        evaluate = imported_when_called(f"{__name__}.measure:evaluate")
        # Whoever reads the category from the run's options reads the one whose prompts judge.
        run, files = self._own(session.run), self.prompt_files(session.run)
        if circuits := [Path(path) for path in self.of(run).circuits]:
            return evaluate(session, run, folder, circuits, files)
        own = circuit_of(run, run.group(self.of(run).category), session)
        return evaluate(session, run, folder, [own.files["circuit"]], files, None if files else nulls_of(run))

    def page(self, finished: Finished) -> Page:
        result, words = finished.result, finished.words
        circuits, scores = result["circuits"], finished.table("scores.csv")
        columns = {**_DECIDES, **_RESTORES}
        summary = {title: name for title, name in columns.items() if name in _SUMMARY}
        told = [f"{each['name']}: {each['says']}." for each in circuits if each["says"]]
        return Page(
            title=f"Evaluation · {result['category']} · {result['preset']}",
            sentence=_sentence(result),
            summary=[_table("", summary, circuits, words), *map(Paragraph, told)],
            sections=[
                *(_of_circuit(finished, each, scores[scores["circuit_name"] == each["name"]]) for each in circuits),
                Section("Does it decide?", [_table("Test prompts of both sides", _DECIDES, circuits, words)]),
                Section("What it restores, and what is left without it", [
                    Figure("scores", lambda: scores_figure(result, words)),
                    _table("", _RESTORES, circuits, words),
                ]),
            ],
            guide=_guide(words),
            findings=[
                (f"{title.format(**words._asdict())}, {each['name']}", figure_cell(each, name))
                for each in circuits
                for title, name in summary.items()
                if each.get(name) is not None
            ],
        )  # fmt: skip

    def _own(self, run: Run) -> Run:
        """The run that discovers the category's own circuit."""
        return run.having(DiscoveryOptions, category=self.of(run).category)


_SCORES = {
    "f_model": ("F(M): full model", INK, "line-ns-open"),
    "f_empty": ("F(0): everything ablated", QUIET, "line-ns-open"),
    "f_circuit": ("F(C): the circuit alone", VERMILION, "circle"),
    "f_complement": ("F(M\\C): all but the circuit", BLUE, "diamond"),
}
_DECIDES = {
    "recovered, {positive}": "recovered_toxic",
    "recovered, {negative}": "recovered_safe",
    "agreement": "agreement",
    "agreement of random features": "null_agreement",
    "agreement of rotated ones": "rotated_agreement",
    "KL recovered, {positive}": "kl_recovered_toxic",
    "KL recovered, {negative}": "kl_recovered_safe",
    "gap kept": "gap_kept",
    "separation": "separation",
    "separation, the model's": "separation_model",
    "prompt-free": "prompt_free",
}
"""what only a circuit that decides has: those of both sides"""
_RESTORES = {
    "faithfulness": "faithfulness",
    "faithfulness of random circuits": "random_faithfulness",
    "completeness, normalised": "completeness_normalised",
    "the same of random circuits": "random_completeness_normalised",
    "completeness, as published": "completeness",
    "KL(M to M\\C), {negative}": "kl_without_safe",
    "edges": "n_edges",
    "faithfulness of edges": "edge_faithfulness",
    "faithfulness of random edges": "random_edge_faithfulness",
    "F(M)": "f_model",
    "F(C)": "f_circuit",
    "F(M\\C)": "f_complement",
    "F(0)": "f_empty",
}
"""what a circuit restores of the score, and what is left without it"""
_SUMMARY = (
    "recovered_toxic", "recovered_safe", "agreement", "gap_kept", "separation", "separation_model", "prompt_free",
    "faithfulness", "random_faithfulness", "completeness_normalised",
)  # fmt: skip
_REPLIES = {"as it is": "model", "circuit alone": "circuit", "without it": "without"}


def _of_circuit(finished: Finished, circuit: Mapping[str, Any], scores: pd.DataFrame) -> Section:
    """What one circuit does to each prompt, and of its best nodes: the sentence, the pictures, and the replies."""
    words, curves = finished.words, finished.table("curves.csv")
    curve = curves[curves["circuit"] == circuit["name"]]
    shown = [*both_sides(scores, words), *(proof_by_size(curve, circuit["n_nodes"], words) if len(curve) > 1 else [])]
    rows = [
        [kind, cell(counts["n"]), *(cell(counts.get(under)) for under in _REPLIES.values())]
        for kind, counts in circuit["refused"].items()
    ]
    replies = Table(f"Replies that {words.acts}", ["prompts", "n", *_REPLIES], rows)
    blocks = [block for section in shown for block in section.blocks]
    return Section(circuit["name"], [*verdict(circuit), *blocks, *([replies] if rows else [])])


def _table(title: str, names: Mapping[str, str], circuits: Sequence[Mapping[str, Any]], words: Words) -> Table:
    """Figures with their intervals, a column per circuit; those that none of the circuits has are left out."""
    rows = [
        [head.format(**words._asdict()), *(figure_cell(each, name) for each in circuits)]
        for head, name in {"nodes": "n_nodes", **names}.items()
        if any(each.get(name) is not None for each in circuits)
    ]
    return Table(title, ["figure", *(each["name"] for each in circuits)], rows)


def scores_figure(result: Mapping[str, Any], words: Words) -> go.Figure:
    """A row per circuit, in the order of the files: the four mean scores in nats."""
    circuits = result["circuits"]
    rows = [hover_text(circuit["name"]) for circuit in circuits]
    figure = styled_figure(f"Mean {words.score} on the test prompts", 150 + 44 * len(circuits))
    for circuit, row in zip(circuits, rows, strict=True):
        span = [circuit["f_empty"], circuit["f_model"]]
        figure.add_scatter(
            x=span, y=[row, row], mode="lines", line={"color": LINE, "width": 6}, hoverinfo="skip", showlegend=False
        )
    for key, (name, colour, symbol) in _SCORES.items():
        figure.add_scatter(
            x=[circuit[key] for circuit in circuits],
            y=rows,
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 13, "line": {"width": 2, "color": colour}},
            hovertemplate=f"%{{y}}<br>{name}: %{{x:.3f}} nats<extra></extra>",
        )
    return figure.update_layout(
        xaxis=axis("nats", zeroline=True, zerolinecolor=AMBER),
        yaxis=axis("", autorange="reversed", automargin=True, type="category"),
        showlegend=True,
    )


def _sentence(result: Mapping[str, Any]) -> str:
    asked = f"prompts of {', '.join(result['asked'])}" if result["asked"] else "test prompts"
    pairs = "" if result["n_pairs"] is None else f" in {count_text(result['n_pairs'], 'pair')}"
    return (
        f"{count_text(len(result['circuits']), 'circuit')} on {result['n_prompts']:,} {asked}{pairs}"
        f" ({result['category']}, {result['population']}); baseline {result['baseline']}, error mode"
        f" {result['error_mode']}."
    )


def _guide(words: Words) -> tuple[str, ...]:
    positive, negative = words.positive, words.negative
    return (
        f"**Does it decide?** A circuit that scores high whatever it is asked would restore the {words.score} of"
        f" {positive} prompts in full. **Recovered** is the share of the difference between a prompt and an equally"
        f" long one of the other side that the circuit brings back, everything else being as in the other: on"
        f" {positive} prompts against {negative} ones, and the other way round; one of the two is 0 of such a circuit."
        " **Agreement** = 1 − Σ(s_C − s_M)² / Σ(s_0 − s_M)² over all pairs.",
        "**Gap kept** and **separation** are measured by means: what is left of the difference between the sides' mean"
        " scores, and the chance that a prompt of the one side scores above one of the other, beside the model's own."
        " **Prompt-free** is what is left of the faithfulness where nothing of the prompt can enter: it should be 0.",
        f"**Scores.** F is the mean {words.score}, in nats: of the full model M, of the circuit C alone with everything"
        " else set to its baseline, of the model without it (M\\C), and with everything ablated (0). **Faithfulness** ="
        " (F(C) − F(0)) / (F(M) − F(0)) looks at one side only. **Completeness**, normalised = (F(M\\C) − F(0)) / (F(M)"
        " − F(0)): low where the circuit is needed; as published it is F(M\\C) / F(M). **Random circuits** have as many"
        " features at each site and as often active. Where a denominator is too small to divide by, a figure is not"
        " measurable. Figures have their 95 % interval over prompts beside them.",
        "**Edges.** Their faithfulness is that of the circuit when its nodes reach each other along these edges "
        "alone: each node gets a run of its own in which everything but its sources has its baseline value. With every"
        " edge between sites that write into one another it would be the circuit's own. Random edges lead from other"
        " nodes of the circuit at the same sites, as many into each node.",
    )


STUDIES.register(Evaluate())
