"""The stages in order, what each depends on, and where its artifact lies. An artifact that is up to date is kept.

Nothing here imports torch: asking whether anything has to be done takes no time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from sfc.artifacts import Artifact, hash_of_file
from sfc.config import ContrastKind, Experiment, suggestion
from sfc.errors import UserError
from sfc.models.identity import model_identity
from sfc.patching.alignment import check_positions
from sfc.patching.formats import Formats
from sfc.patching.pairs import WRAPPERS
from sfc.progress import say
from sfc.prompts.clean import CleaningReport
from sfc.prompts.corpus import corpus_identity
from sfc.prompts.pairs import pairs_fingerprint
from sfc.prompts.prepare import Prepared, prepare_prompts, prompts_fingerprint
from sfc.prompts.schema import TOPICS_FILE
from sfc.saes.source import saes_identity
from sfc.sites import in_order
from sfc.steering.positions import check_positions as check_steered

# Raised by hand when the meaning of a stage's artifact changes.
STORE_SCHEMA, SAES_SCHEMA, CIRCUIT_SCHEMA, BEHAVIOUR_SCHEMA = 2, 3, 3, 1
LOGITS_SCHEMA, FORMATS_SCHEMA, PATCHING_SCHEMA, PROBE_SCHEMA = 1, 1, 2, 1
BATCH_SCHEMA, REPORT_SCHEMA = 1, 1
COMPARISON_SCHEMA, EVALUATION_SCHEMA = 1, 1
STEERING_SCHEMA = 1

ALL = "all"  # every category

_EMBEDDED_DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Run:
    """One experiment on one data set, below one root folder."""

    experiment: Experiment
    root: Path = Path()
    data: str = "mini"
    device: str = "auto"
    pairs: Path | None = None
    """counterfactual pairs that take the place of the data set, see `about_pairs`"""
    learned_by: "Run | None" = None
    """the run whose SAEs are used; None: its own"""

    @property
    def data_folder(self) -> Path:
        """`ROOT/data/NAME`, any folder by path, or for `mini` the set that comes with the repository.

        Raises:
            UserError: there is no such folder.
        """
        candidates = [self.root / "data" / self.data, Path(self.data)]
        if self.data == "mini":
            candidates.append(_EMBEDDED_DATA / "mini")
        for folder in candidates:
            if folder.is_dir():
                return folder
        raise UserError(
            f"no data set {self.data!r}: looked for {candidates[0]}; `sfc download` fetches or-bench, or give a folder"
        )

    @cached_property
    def prompts(self) -> Prepared:
        """The prompts with their splits."""
        if self.pairs:
            from sfc.prompts.counterfactual import load_counterfactuals, prompts_of

            pairs = load_counterfactuals(self.pairs, self.experiment.prompts, self.experiment.seed)
            return Prepared(prompts_of(pairs, self.category_of_pairs), CleaningReport(()))
        return prepare_prompts(self.data_folder, self.experiment.prompts, self.experiment.seed)

    @property
    def category_of_pairs(self) -> str:
        """What stands in the place of a category where the prompts are pairs: the name of their file."""
        return self.pairs.stem if self.pairs else ""

    @cached_property
    def store(self) -> Artifact:
        """The activations of the discovery and reference prompts, at whatever sites were asked for."""
        experiment = self.experiment
        inputs = {
            "schema": STORE_SCHEMA,
            "seed": experiment.seed,
            "model": model_identity(experiment.model),
            "prompts": {
                "data": prompts_fingerprint(self.prompts.frame),
                **experiment.prompts.model_dump(exclude={"hard_share"}),
            },
            "activations": experiment.activations.identity(),
        }
        return Artifact.of(self.root / "activations", experiment.name, inputs)

    @cached_property
    def corpus(self) -> Artifact:
        """The activations that the SAEs learn from: the store itself, or one of another corpus.

        Raises:
            UserError: the corpus is a file that does not exist.
        """
        corpus = self.experiment.corpus
        if corpus.source == "prompts":
            return self.store
        text = {} if corpus.source == "replies" else {"prompts": corpus_identity(corpus.source)}
        inputs = {**self.store.inputs, **text, "corpus": corpus.identity()}
        return Artifact.of(self.root / "activations", f"{self.experiment.name}-corpus", inputs)

    @cached_property
    def saes(self) -> Artifact:
        """One dictionary per site, and their quality."""
        if self.learned_by:
            return self.learned_by.saes
        inputs = {
            "schema": SAES_SCHEMA,
            "seed": self.experiment.seed,
            "activations": self.corpus.inputs,
            "sites": self.experiment.activations.sites,
            "saes": saes_identity(self.experiment.saes, self.experiment.activations.sites),
        }
        return Artifact.of(self.root / "saes", self.experiment.name, inputs)

    def circuit(self, category: str) -> Artifact:
        """The circuit of one category, with its evaluation and its page."""
        experiment = self.experiment
        population = "" if experiment.discovery.population == "toxic" else f"-{experiment.discovery.population}"
        features = experiment.discovery.nodes == "features"
        inputs = {
            "schema": CIRCUIT_SCHEMA,
            "seed": experiment.seed,
            "prompts": self.store.inputs,
            "saes": self.saes.inputs if features else None,
            "category": category,
            "hard_share": experiment.prompts.hard_share,
            "discovery": experiment.discovery.model_dump(exclude={"nodes"} if features else {}),
            "evaluation": experiment.evaluation.model_dump(),
        }
        if experiment.discovery.reference_choice == "paired":
            inputs["pairs"] = hash_of_file(self.pairs) if self.pairs else pairs_fingerprint(self.data_folder)
        topics = None if self.pairs else self.data_folder / TOPICS_FILE
        if topics and experiment.discovery.method == "correlation" and topics.is_file():
            inputs["topics"] = hash_of_file(topics)
        if not features:
            inputs["layers"] = experiment.activations.layers
            population += f"-{experiment.discovery.nodes}"
        name = f"circuit-{category}{population}-{experiment.discovery.method}"
        return Artifact.of(self.root / "circuits" / experiment.name, name, inputs)


def about_pairs(run: Run, path: Path) -> Run:
    """The same experiment on the counterfactual pairs of a file: no template, and each prompt against its partner.

    The SAEs are those of the experiment as it was: of a few short prompts none could be learned.

    Raises:
        UserError: there is no such file, or `discovery.reference` is none for pairs.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: --pairs takes JSON lines with clean_prefix, patch_prefix, clean_answer, …")
    discovery = run.experiment.discovery
    if discovery.reference not in (None, "paired"):
        raise UserError(
            f"--pairs: each prompt's reference is its partner, so that {discovery.reference!r} cannot be had"
        )
    update = {
        "model": run.experiment.model.model_copy(update={"template": "{prompt}", "system_prompt": None}),
        "discovery": discovery.model_copy(update={"reference": "paired"}),
    }
    return replace(run, experiment=run.experiment.model_copy(update=update), pairs=path, learned_by=run)


def ensure_store(run: Run, extra_sites: Sequence[str] = (), rebuild: bool = False) -> Artifact:
    """Collect the activations at the experiment's sites and at `extra_sites`, as far as they are not there."""
    sites = in_order([*run.experiment.activations.sites, *extra_sites])
    if _needs_making(run.store, rebuild, sites):
        from sfc.stages.collect import make_store

        make_store(run, sites, rebuild)
    return run.store


def ensure_saes(run: Run, rebuild: bool = False, loggers: Sequence[str] = ()) -> Artifact:
    """Train the SAEs unless they are there; collects their corpus first where needed.

    Args:
        loggers: `wandb` or `tensorboard`: where to send training's figures as well.
    """
    run = run.learned_by or run
    if _needs_making(run.saes, rebuild):
        from sfc.stages.train import make_saes

        make_saes(run, rebuild, loggers)
    return run.saes


def ensure_circuit(run: Run, category: str, rebuild: bool = False) -> Artifact:
    """Discover and evaluate one category's circuit unless it is there; train first where needed."""
    artifact = run.circuit(category)
    if _needs_making(artifact, rebuild):
        if run.experiment.discovery.nodes == "features":
            ensure_saes(run)
        ensure_store(run)
        from sfc.stages.discover import make_circuit

        make_circuit(run, category, rebuild)
    return artifact


def ensure_comparison(run: Run, categories: Sequence[str], rebuild: bool = False) -> Artifact:
    """Compare the circuits of several categories unless that is done; train first where needed.

    Raises:
        UserError: fewer than two categories.
    """
    if len(set(categories)) < 2:
        raise UserError("compare needs at least two categories, for example --categories violence,privacy")
    experiment = run.experiment
    inputs = {
        "schema": COMPARISON_SCHEMA,
        "circuit": CIRCUIT_SCHEMA,
        "seed": experiment.seed,
        "prompts": run.store.inputs,
        "saes": run.saes.inputs,
        "categories": sorted(set(categories)),
        "hard_share": experiment.prompts.hard_share,
        "discovery": experiment.discovery.model_dump(),
        "evaluation": experiment.evaluation.model_dump(include={"error_mode", "min_denominator"}),
        "comparison": experiment.comparison.model_dump(),
    }
    name = f"comparison-{experiment.discovery.method}"
    artifact = Artifact.of(run.root / "circuits" / experiment.name, name, inputs)
    if _needs_making(artifact, rebuild):
        ensure_saes(run)
        ensure_store(run)
        from sfc.stages.compare import make_comparison

        make_comparison(run, artifact, sorted(set(categories)), rebuild)
    return artifact


def ensure_evaluation(run: Run, category: str, paths: Sequence[Path], rebuild: bool = False) -> Artifact:
    """Judge the circuits in these files on a category's test prompts unless that is done.

    Raises:
        UserError: a file does not exist.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"no file {path}: `sfc evaluate` takes circuits, node lists in JSON or CSV, or graph files")
    experiment = run.experiment
    population, reference = experiment.discovery.population, experiment.discovery.reference_choice
    inputs = {
        "schema": EVALUATION_SCHEMA,
        "seed": experiment.seed,
        "prompts": run.store.inputs,
        "saes": run.saes.inputs,
        "category": category,
        "hard_share": experiment.prompts.hard_share,
        "population": population,
        "reference": reference,
        "pairs": pairs_fingerprint(run.data_folder) if reference == "paired" else None,
        "evaluation": experiment.evaluation.model_dump(),
        "circuits": [[path.resolve().parent.name, path.name, hash_of_file(path)] for path in paths],
    }
    name = f"evaluation-{category}{'' if population == 'toxic' else f'-{population}'}"
    artifact = Artifact.of(run.root / "circuits" / experiment.name, name, inputs)
    if _needs_making(artifact, rebuild):
        ensure_saes(run)
        ensure_store(run)
        from sfc.stages.evaluate import make_evaluation

        make_evaluation(run, artifact, category, paths, rebuild)
    return artifact


def ensure_behaviour(run: Run, prompts: Path | None, split: str, limit: int | None, rebuild: bool = False) -> Artifact:
    """Generate and judge replies, to a file of prompts or to a split of the data, unless that is done.

    Raises:
        UserError: the file or the split does not exist.
    """
    if prompts is not None and not prompts.is_file():
        raise UserError(f"no file {prompts}: --prompts takes a CSV with a column 'prompt'")
    if split not in (known := ("discovery", "reference", "test", "all")):
        raise UserError(f"no split {split!r}: {suggestion(split, known)}")
    inputs = {
        "schema": BEHAVIOUR_SCHEMA,
        "model": model_identity(run.experiment.model),
        "prompts": hash_of_file(prompts) if prompts else [prompts_fingerprint(run.prompts.frame), split],
        "config": run.experiment.prompts.model_dump(exclude={"hard_share"}),
        "limit": limit,
        "seed": run.experiment.seed,
    }
    name = f"behaviour-{prompts.stem if prompts else split}"
    artifact = Artifact.of(run.root / "circuits" / run.experiment.name, name, inputs)
    if _needs_making(artifact, rebuild):
        from sfc.stages.behaviour import make_behaviour

        make_behaviour(run, artifact, prompts, split, limit, rebuild)
    return artifact


def ensure_logit_attribution(run: Run, category: str, rebuild: bool = False) -> Artifact:
    """Attribute the refusal logit difference on the test prompts of one category, or of `ALL`, unless that is done."""
    inputs = {
        "schema": LOGITS_SCHEMA,
        "model": model_identity(run.experiment.model),
        "prompts": [prompts_fingerprint(run.prompts.frame), run.experiment.prompts.model_dump()],
        "category": category,
        "seed": run.experiment.seed,
    }
    artifact = Artifact.of(run.root / "circuits" / run.experiment.name, f"logits-{category}", inputs)
    if _needs_making(artifact, rebuild):
        from sfc.stages.logits import make_logit_attribution

        make_logit_attribution(run, artifact, category, rebuild)
    return artifact


def ensure_probe(run: Run, category: str, rebuild: bool = False) -> Artifact:
    """Measure the refusal direction and a linear probe at every layer, of one category or of `ALL`, unless done."""
    inputs = {
        "schema": PROBE_SCHEMA,
        "model": model_identity(run.experiment.model),
        "prompts": [prompts_fingerprint(run.prompts.frame), run.experiment.prompts.model_dump()],
        "category": category,
        "seed": run.experiment.seed,
    }
    artifact = Artifact.of(run.root / "circuits" / run.experiment.name, f"probe-{category}", inputs)
    if _needs_making(artifact, rebuild):
        from sfc.stages.probe import make_probe

        make_probe(run, artifact, category, rebuild)
    return artifact


def ensure_formats(
    run: Run, formats: Formats, prompts: Path | None, category: str, limit: int | None, rebuild: bool = False
) -> Artifact:
    """Ask harmful instructions, those of a file or of the test split, in several formats, unless that is done.

    Raises:
        UserError: the file does not exist.
    """
    if prompts is not None and not prompts.is_file():
        raise UserError(f"no file {prompts}: --prompts takes a CSV with a column 'prompt' or 'goal'")
    inputs = {
        "schema": FORMATS_SCHEMA,
        "model": model_identity(run.experiment.model),
        "formats": {name: [version.model_dump() for version in versions] for name, versions in formats.items()},
        "prompts": [prompts_fingerprint(run.prompts.frame), run.experiment.prompts.model_dump()],
        "file": hash_of_file(prompts) if prompts else None,
        "category": category,
        "limit": limit,
        "seed": run.experiment.seed,
    }
    name = f"formats-{prompts.stem if prompts else category}"
    artifact = Artifact.of(run.root / "circuits" / run.experiment.name, name, inputs)
    if _needs_making(artifact, rebuild):
        from sfc.stages.formats import make_formats

        make_formats(run, artifact, formats, prompts, rebuild)
    return artifact


def ensure_report(run: Run, rebuild: bool = False) -> Artifact:
    """Report every finished artifact of the experiment's model, unless that is done and none of their files changed.

    Raises:
        UserError: there is none.
    """
    from sfc.reports.found import find_artifacts, found_in, hashes

    folder = run.root / "circuits" / run.experiment.name
    found, left_out = find_artifacts(folder, model_identity(run.experiment.model))
    if not found:
        raise UserError(
            f"nothing to report: {folder} holds no finished artifact of this model; run `sfc discover`, `sfc patch` or"
            " another command first"
        )
    if run.saes.is_complete():
        found.append(found_in(run.saes.folder, "saes"))
    inputs = {
        "schema": REPORT_SCHEMA,
        "description": run.experiment.description,
        "artifacts": {each.place: hashes(each) for each in found},
        "left_out": [each.place for each in left_out],
    }
    artifact = Artifact.of(folder, "report", inputs)
    if _needs_making(artifact, rebuild):
        from sfc.stages.report import make_report

        make_report(run, artifact, found, left_out, rebuild)
    return artifact


def batch_artifact(runs: Sequence[Run], stages: Sequence[str], category: str, limit: int | None) -> Artifact:
    """Where the comparison of these runs lies. It is put together anew each time; the runs' stages are what costs."""
    inputs = {
        "schema": BATCH_SCHEMA,
        "experiments": [run.experiment.model_dump(mode="json") for run in runs],
        "data": runs[0].data,
        "stages": list(stages),
        "category": category,
        "limit": limit,
    }
    return Artifact.of(runs[0].root / "circuits" / "batch", category, inputs)


def pairs_file(run: Run) -> Path | None:
    """The file that `patching.pairs` means; None where the pairs are prompts of the data set in wrappers.

    Raises:
        UserError: there is no such file.
    """
    name = run.experiment.patching.pairs
    if name == "wrapped":
        return None
    path = run.data_folder / "pairs.csv" if name == "toxic-safe" else Path(name)
    if not path.is_file():
        raise UserError(
            f"no pairs {str(path)!r}: --pairs takes toxic-safe (the data set's pairs.csv), wrapped, or a CSV or .jsonl"
            " file with toxic and safe"
        )
    return path


def ensure_patching(run: Run, rebuild: bool = False) -> Artifact:
    """Patch between pairs of prompts unless that is done.

    Raises:
        UserError: the pairs or wrappers do not exist, or a position set is none.
    """
    experiment, config = run.experiment, run.experiment.patching
    for name in config.position_sets:
        check_positions(name)
    if config.wrappers and config.pairs != "wrapped":
        raise UserError("--wrappers goes with --pairs wrapped only")
    if config.wrappers and not Path(config.wrappers).is_file():
        raise UserError(f"no file {config.wrappers}: --wrappers takes a CSV or .jsonl file with name and template")
    path = pairs_file(run)
    inputs = {
        "schema": PATCHING_SCHEMA,
        "seed": experiment.seed,
        "model": model_identity(experiment.model),
        "pairs": hash_of_file(path) if path else _instructions(run),
        "patching": config.model_dump(exclude={"pairs", "wrappers"}),
        "max_tokens": experiment.prompts.max_tokens,
        "min_denominator": experiment.evaluation.min_denominator,
    }
    name = "wrapped" if path is None else "toxic-safe" if config.pairs == "toxic-safe" else path.stem
    artifact = Artifact.of(run.root / "circuits" / experiment.name, f"patching-{name}", inputs)
    if _needs_making(artifact, rebuild):
        from sfc.stages.patch import make_patching

        make_patching(run, artifact, rebuild)
    return artifact


def direction_source(name: str) -> str | None:
    """The contrast that `steering.direction` learns from; None where it comes from dictionaries.

    Raises:
        UserError: it is no direction.
    """
    if name in get_args(ContrastKind):
        return name
    if name == "probe":
        return "toxic-safe"
    if name == "circuit" or re.fullmatch(r"resid_(?:pre|mid|post)\.\d+/F\d+", name):
        return None
    known = [*get_args(ContrastKind), "probe", "circuit"]
    raise UserError(f"no direction {name!r}: {suggestion(name, known)}, or a feature such as resid_post.21/F12")


def ensure_steering(run: Run, rebuild: bool = False) -> Artifact:
    """Find a direction, choose it by what it does, and steer test prompts along it, unless that is done.

    Raises:
        UserError: the direction or the positions are none, or the alphas are not to be used so.
    """
    experiment, config = run.experiment, run.experiment.steering
    check_steered(config.positions)
    if config.everywhere and config.edit != "project-out":
        raise UserError("--everywhere goes with --edit project-out only")
    if config.edit != "clamp" and not any(alpha > 0 or (config.edit == "add" and alpha < 0) for alpha in config.dial):
        raise UserError(f"--alphas with --edit {config.edit} needs one that changes something: 0 leaves all as it is")
    inputs = {
        "schema": STEERING_SCHEMA,
        "seed": experiment.seed,
        "model": model_identity(experiment.model),
        "prompts": [prompts_fingerprint(run.prompts.frame), experiment.prompts.model_dump()],
        "steering": config.model_dump(exclude={"xstest"}),
    }
    if config.xstest is not None:
        if not Path(config.xstest).is_file():
            raise UserError(f"no file {config.xstest}: --xstest takes XSTest's CSV (`sfc download` fetches it)")
        inputs["xstest"] = hash_of_file(Path(config.xstest))
    from_dictionaries = direction_source(config.direction) is None or config.features
    if from_dictionaries:
        inputs["saes"] = run.saes.inputs
    if config.direction == "circuit":
        if config.category == ALL:
            raise UserError("--direction circuit needs the --category whose circuit it is")
        inputs["circuit"] = run.circuit(config.category).inputs
    name = f"steering-{re.sub(r'[^a-z0-9]+', '-', config.direction.lower())}-{config.edit}"
    artifact = Artifact.of(run.root / "circuits" / experiment.name, name, inputs)
    if _needs_making(artifact, rebuild):
        if config.direction == "circuit":
            ensure_circuit(run, config.category)
        if from_dictionaries:
            ensure_saes(run)
        from sfc.stages.steer import make_steering

        make_steering(run, artifact, rebuild)
    return artifact


def _instructions(run: Run) -> dict[str, Any]:
    """What wrapped pairs are made from: the prompts, their splits, and the wrappers."""
    wrappers = run.experiment.patching.wrappers
    return {
        "data": prompts_fingerprint(run.prompts.frame),
        **run.experiment.prompts.model_dump(exclude={"hard_share"}),
        "wrappers": hash_of_file(Path(wrappers)) if wrappers else WRAPPERS,
    }


def _needs_making(artifact: Artifact, rebuild: bool, sites: Sequence[str] = ()) -> bool:
    if not rebuild and artifact.is_complete() and set(sites) <= set(artifact.manifest().get("sites", [])):
        say(f"up to date: {artifact.folder}")
        return False
    return True
