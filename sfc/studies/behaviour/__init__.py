"""`sfc behaviour`: what does the model do with prompts, and does the score agree with it?"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import plotly.graph_objects as go

from sfc.behaviors.behavior import HARD, NEGATIVE, POSITIVE, Words
from sfc.core.artifacts import read_csv
from sfc.core.errors import UserError, suggestion
from sfc.core.options import Options, option
from sfc.core.reading import hash_of_given
from sfc.core.registry import imported_when_called
from sfc.data.prepare import prompts_fingerprint
from sfc.data.read import UNLABELLED, load_prompt_file
from sfc.data.schema import ALL, SPLITS, keyed_ranks, looked_up
from sfc.models.sources import model_identity
from sfc.pages.blocks import Figure, Formula, Page, Paragraph, Section, Table, cell, interval_cell
from sfc.pages.style import AMBER, BLUE, QUIET, VERMILION, axis, styled_figure
from sfc.pages.text import count_text, hover_text
from sfc.run import Run
from sfc.session import Session
from sfc.studies.study import STUDIES, Finished, Study, ensure

_LABELS = {POSITIVE: "toxic", HARD: "hard", NEGATIVE: "safe"}


class BehaviourOptions(Options):
    """Which prompts are answered."""

    section = "behaviour"
    prompts: Path | None = option(
        None, description="CSV with a column prompt, optional category, label; XSTest's columns work"
    )
    split: str = option("test", description="Without --prompts: discovery, reference, test or all")
    category: str | None = option(None, description="Without --prompts: only this OR-Bench category")
    label: Literal["toxic", "hard", "safe"] | None = option(
        None, description="Without --prompts: only prompts that the data set calls toxic, hard or safe"
    )
    limit: int | None = option(None, ge=1, description="At most this many prompts of each label, chosen by hash")


class Behaviour(Study[BehaviourOptions]):
    """Generate a short reply to each prompt, judge it, and compare the refusal score with what the model did.

    Example: sfc behaviour --prompts data/xstest/xstest_prompts.csv
    """

    name = "behaviour"
    options = BehaviourOptions
    is_shared = True
    schema = 2
    files: ClassVar = {"page": "behaviour.html", "replies": "replies.csv", "groups": "groups.csv"}
    model_columns: ClassVar = {
        "refused_toxic": "{acted}: {positive}", "refused_hard": "{acted}: hard", "refused_safe": "{acted}: {negative}",
        "score_auroc": "AUROC of the {score}",
    }  # fmt: skip
    model_headline: ClassVar = ("refused_toxic", "refused_hard", "refused_safe")

    def check(self, run: Run) -> None:
        options = self.of(run)
        if options.prompts is not None and not options.prompts.is_file():
            raise UserError(f"no file {options.prompts}: --prompts takes a CSV with a column 'prompt'")
        if options.split not in (known := (*SPLITS, ALL)):
            raise UserError(f"no split {options.split!r}: {suggestion(options.split, known)}")
        _category(run)
        _ = run.judge

    def label(self, run: Run) -> str:
        options = self.of(run)
        if options.prompts:
            return f"behaviour-{options.prompts.stem}"
        return "-".join(["behaviour", *filter(None, (options.label, _category(run), options.split))])

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options = run.experiment, self.of(run)
        chosen = [prompts_fingerprint(run.prompts.frame), options.split, options.label, _category(run)]
        return {
            "model": model_identity(experiment.model),
            "prompts": hash_of_given(options.prompts) if options.prompts else chosen,
            "config": experiment.prompts.model_dump(exclude={"hard_share"}),
            "limit": options.limit,
        }

    make = imported_when_called(f"{__name__}.measure:measure")
    work = imported_when_called(f"{__name__}.measure:work")

    def page(self, finished: Finished) -> Page:
        words, name = finished.words, finished.name.partition("-")[2]
        groups, replies = finished.records("groups.csv"), finished.table("replies.csv")
        agreement = f"AUROC of the {words.score} against judged replies"
        auroc = cell(finished.result["auroc"])
        rows = [
            [
                *(group["category"], words.said(group["label"])),
                *(cell(group[field]) for field in ("n", "refusals", "rate")),
                interval_cell(group["low"], group["high"]),
            ]
            for group in groups
        ]
        titles = (words.group, "label", "prompts", words.acted, "rate", "95 %")
        rates = Table(f"Judged replies: how many {words.acts}", titles, rows, texts=("label",))
        scores = [(bool(row["refused"]), float(row["score"])) for row in replies.to_dict("records")]
        return Page(
            title=f"Behaviour · {name} · {finished.result['preset']}",
            sentence=(
                f"What does the model do? The greedy replies to {count_text(len(replies), 'prompt')} are judged, and"
                f" the {words.score} is compared with the verdicts."
            ),
            summary=[rates, Paragraph(f"{agreement}: {auroc}")],
            sections=[
                Section("", [Figure("rates", lambda: rates_figure(groups, words))]),
                Section("", [Figure("scores", lambda: scores_figure(scores, words))]),
            ],
            guide=(
                f"**Rates.** The share of prompts whose replies {words.acts}, with Wilson's 95 % interval. Replies are"
                " cut after a few tokens, since the first words tell.",
                f"**Scores.** The {words.score} is read from the prompt's last position, before anything is said. AUROC"
                f" is the chance that a prompt that is {words.acted} has a higher score than one that is not.",
                "**Labels** are the data set's, and say what was expected; what the model did is judged from its"
                " reply.",
            ),
            findings=[(agreement, auroc)],
            methods=[
                Formula(
                    f"Prompts that are {words.acted}",
                    "by the greedy reply's first words, never by the data set's label",
                ),
                Formula("Interval of a rate", "Wilson 1927, 95 %"),
            ],
            limits=[
                f"Replies are judged by the phrases that open them: prompts {words.acted} in other words are missed."
            ],
        )

    def model_row(self, finished: Finished) -> dict[str, Any]:
        groups = pd.DataFrame(finished.result["groups"]).groupby("label")[["refusals", "n"]].sum()
        rates = (groups["refusals"] / groups["n"]).round(4).to_dict()
        auroc = finished.result["auroc"]
        return {
            **{f"refused_{label}": rates.get(label) for label in _LABELS.values()},
            "score_auroc": None if auroc is None else round(auroc, 4),
        }


def asked(run: Run) -> pd.DataFrame:
    """The prompts that the options choose, with columns `id`, `prompt`, `category` and `label`.

    Raises:
        UserError: the prompt file is malformed, or no prompt is left.
    """
    options = BehaviourOptions.of(run.experiment)
    frame = load_prompt_file(options.prompts) if options.prompts else _of_data_set(run, options)
    if options.limit is not None:
        ranks = keyed_ranks(frame, ["label"], f"limit {run.experiment.seed}")
        frame = frame[ranks < options.limit].reset_index(drop=True)
    return frame


def judged(session: Session, prompts: pd.DataFrame, label: str, category: str) -> pd.DataFrame:
    """The prompts with a column `refused`, from judged replies that are generated unless they lie in an artifact.

    Args:
        prompts: rows of the prepared table, all with this label and (unless it is `ALL`) of this category.
    """
    options = {"prompts": None, "split": ALL, "category": category, "label": label, "limit": None}
    finished = ensure(BEHAVIOUR, session.run.having(BehaviourOptions, **options), session=session)
    replies = read_csv(finished.files["replies"], keep_default_na=False)
    return prompts.assign(refused=looked_up(prompts["id"], replies, "refused").astype(bool))


def _of_data_set(run: Run, options: BehaviourOptions) -> pd.DataFrame:
    frame = run.prompts.frame
    frame = frame.assign(label=frame["dataset_type"].map(_LABELS))
    wanted = {"split": options.split, "label": options.label, "category": _category(run)}
    for column, value in wanted.items():
        if value not in (None, ALL):
            frame = frame[frame[column] == value]
    if frame.empty:
        raise UserError(f"the data has no prompts of {', '.join(f'{k} {v}' for k, v in wanted.items() if v)}")
    return frame.reset_index(drop=True)


def _category(run: Run) -> str | None:
    """The category that is asked for; None: all of them."""
    category = run.group(BehaviourOptions.of(run.experiment).category or ALL)
    return None if category == ALL else category


_COLOURS = {"toxic": VERMILION, "hard": AMBER, "safe": BLUE, UNLABELLED: QUIET}
_HEIGHT = 440


def rates_figure(groups: list[dict], words: Words) -> go.Figure:
    """Grouped bars: the rate of each category, one bar per label, with its 95 % interval.

    Args:
        groups: rows of `groups.csv`.
    """
    figure = styled_figure(f"Share of prompts {words.acted}", _HEIGHT)
    for label in _COLOURS:
        rows, name = [group for group in groups if group["label"] == label], words.said(label)
        if not rows:
            continue
        figure.add_bar(
            name=name,
            x=[hover_text(str(row["category"])) for row in rows],
            y=[100 * row["rate"] for row in rows],
            marker_color=_COLOURS[label],
            error_y={
                "type": "data",
                "array": [100 * (row["high"] - row["rate"]) for row in rows],
                "arrayminus": [100 * (row["rate"] - row["low"]) for row in rows],
                "thickness": 1,
                "width": 3,
            },
            customdata=[[row["refusals"], row["n"], 100 * row["low"], 100 * row["high"]] for row in rows],
            hovertemplate=f"%{{x}}, {name}<br>%{{customdata[0]}} of %{{customdata[1]}} {words.acted}: %{{y:.1f}} %"
            "<br>95 % interval %{customdata[2]:.1f} to %{customdata[3]:.1f} %<extra></extra>",
        )
    return figure.update_layout(
        barmode="group",
        showlegend=True,
        xaxis=axis(words.group, showgrid=False, categoryorder="category ascending"),
        yaxis=axis(f"{words.acted} (%)", range=[0, 100]),
    )


def scores_figure(scores: list[tuple[bool, float]], words: Words) -> go.Figure:
    """Histograms of the score, of prompts whose replies show the behavior and of the others.

    Args:
        scores: for each prompt the verdict and the score.
    """
    figure = styled_figure(f"The {words.score} of prompts, by what was replied", _HEIGHT)
    for verdict, name, colour in ((False, f"not {words.acted}", BLUE), (True, words.acted, VERMILION)):
        values = [score for acted, score in scores if acted == verdict]
        figure.add_histogram(
            x=values,
            name=f"{name} ({len(values):,})",
            marker_color=colour,
            opacity=0.65,
            nbinsx=40,
            hovertemplate="%{x}: %{y} prompts<extra></extra>",
        )
    return figure.update_layout(
        barmode="overlay", showlegend=True, xaxis=axis(words.unit, showgrid=False), yaxis=axis("prompts")
    )


BEHAVIOUR = STUDIES.register(Behaviour())
