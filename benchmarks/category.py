"""What the benchmarks on the prompts of one category share: their options, and the problem that these name."""

import argparse
from pathlib import Path

import harness

from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.experiments import load_experiment
from sfc.run import Run
from sfc.session import Session
from sfc.studies.collect import COLLECT
from sfc.studies.discover.problem import prepare_problem
from sfc.studies.study import ensure
from sfc.studies.train import TRAIN


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark, and those that name a problem."""
    options = harness.parser(description)
    options.add_argument("--preset", default="smollm2")
    options.add_argument("--category", default="violence")
    options.add_argument("--root", type=Path, default=Path(), help="where activations/ and saes/ lie")
    options.add_argument("--device", default="cpu")
    options.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as sfc's own --set")
    return options


def session(options: argparse.Namespace) -> Session:
    """What is loaded for a category's problem; activations and SAEs are made first where they are missing."""
    run = Run(load_experiment(options.preset, options.set), options.root, device=options.device)
    loaded = Session(run)
    for study in (TRAIN, COLLECT):
        ensure(study, run, session=loaded)
    return loaded


def prepared(options: argparse.Namespace) -> tuple[Problem, PromptRuns]:
    """The problem, and the runs of its test prompts."""
    return problem_of(session(options), options.category)


def problem_of(loaded: Session, name: str) -> tuple[Problem, PromptRuns]:
    """The problem of a category, and the runs of its test prompts."""
    problem, test_runs, _ = prepare_problem(loaded, name)
    return problem, test_runs
