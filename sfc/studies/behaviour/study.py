"""`sfc behaviour`: what does the model do with prompts, and does the score agree with it?"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd

from sfc.behaviors.behavior import HARD, NEGATIVE, POSITIVE
from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError, suggestion
from sfc.core.options import Options, option
from sfc.data.prepare import prompts_fingerprint
from sfc.data.read import load_prompt_file
from sfc.data.schema import ALL, SPLITS, keyed_ranks, looked_up
from sfc.models.sources import model_identity
from sfc.pages.blocks import Page
from sfc.run import Run
from sfc.session import Session
from sfc.studies.study import STUDIES, Finished, Made, Study, ensure

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
        chosen = [options.split, options.label, _category(run)]
        return {
            "model": model_identity(experiment.model),
            "behavior": [experiment.behavior, run.behavior.inputs(experiment)],
            "prompts": hash_of_file(options.prompts)
            if options.prompts
            else [prompts_fingerprint(run.prompts.frame), *chosen],
            "config": experiment.prompts.model_dump(exclude={"hard_share"}),
            "limit": options.limit,
        }

    def make(self, session: Session, folder: Path) -> Made:
        from sfc.studies.behaviour.measure import measure

        prompts = asked(session.run)
        return measure(session, prompts, folder / self.files["replies"], folder / self.files["groups"])

    def page(self, finished: Finished) -> Page:
        from sfc.studies.behaviour.page import page

        return page(finished)

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
    replies = pd.read_csv(finished.files["replies"], keep_default_na=False)
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


BEHAVIOUR = STUDIES.register(Behaviour())
