"""The page of behaviour: how many replies of each group show it, and whether the score tells them apart."""

import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.data.read import UNLABELLED
from sfc.pages.blocks import Figure, Formula, Page, Paragraph, Section, Table, cell, interval_cell
from sfc.pages.style import AMBER, BLUE, QUIET, VERMILION, axis, styled_figure
from sfc.pages.text import count_text, hover_text
from sfc.studies.study import Finished

_COLOURS = {"toxic": VERMILION, "hard": AMBER, "safe": BLUE, UNLABELLED: QUIET}
_HEIGHT = 440


def page(finished: Finished) -> Page:
    """The page of finished behaviour."""
    words, name = finished.words, finished.name.partition("-")[2]
    groups, replies = finished.records("groups.csv"), finished.table("replies.csv")
    agreement = f"AUROC of the {words.score} against judged replies"
    auroc = cell(finished.result["auroc"])
    rates = Table(
        f"Judged replies: how many {words.acts}",
        (words.group, "label", "prompts", words.acted, "rate", "95 %"),
        [
            (group["category"], _called(group["label"], words), *(cell(group[f]) for f in ("n", "refusals", "rate")),
             interval_cell(group["low"], group["high"]))
            for group in groups
        ],
        texts=("label",),
    )  # fmt: skip
    scores = [(bool(row["refused"]), float(row["score"])) for row in replies.to_dict("records")]
    return Page(
        title=f"Behaviour · {name} · {finished.result['preset']}",
        sentence=(
            f"What does the model do? The greedy replies to {count_text(len(replies), 'prompt')} are judged, and the"
            f" {words.score} is compared with the verdicts."
        ),
        summary=[rates, Paragraph(f"{agreement}: {auroc}")],
        sections=[
            Section("", [Figure("rates", lambda: rates_figure(groups, words))]),
            Section("", [Figure("scores", lambda: scores_figure(scores, words))]),
        ],
        guide=(
            f"**Rates.** The share of prompts whose replies {words.acts}, with Wilson's 95 % interval. Replies are cut"
            " after a few tokens, since the first words tell.",
            f"**Scores.** The {words.score} is read from the prompt's last position, before anything is said. AUROC is"
            f" the chance that a prompt that is {words.acted} has a higher score than one that is not.",
            "**Labels** are the data set's, and say what was expected; what the model did is judged from its reply.",
        ),
        findings=[(agreement, auroc)],
        methods=[
            Formula(
                f"Prompts that are {words.acted}", "by the greedy reply's first words, never by the data set's label"
            ),
            Formula("Interval of a rate", "Wilson 1927, 95 %"),
        ],
        limits=[f"Replies are judged by the phrases that open them: prompts {words.acted} in other words are missed."],
    )


def rates_figure(groups: list[dict], words: Words) -> go.Figure:
    """Grouped bars: the rate of each category, one bar per label, with its 95 % interval.

    Args:
        groups: rows of `groups.csv`.
    """
    figure = styled_figure(f"Share of prompts {words.acted}", _HEIGHT)
    for label in _COLOURS:
        rows, name = [group for group in groups if group["label"] == label], _called(label, words)
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


def _called(label: str, words: Words) -> str:
    """A data set's label in the words of the behavior."""
    return words.said(label)
