"""One experiment on one data set below one root folder: where its artifacts lie, and what each depends on.

Nothing here imports torch: asking whether anything has to be done takes no time.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sfc.circuits.options import DiscoveryOptions, EvaluationOptions, base_model
from sfc.core.artifacts import Artifact, hash_of_file
from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.core.options import Options
from sfc.data.corpus import corpus_identity
from sfc.data.or_bench import CleaningReport
from sfc.data.pairs import pairs_fingerprint
from sfc.data.prepare import Prepared, prepare_prompts, prompts_fingerprint
from sfc.data.schema import TOPICS_FILE
from sfc.models.identity import model_identity
from sfc.saes.source import saes_identity

# Raised by hand when the meaning of an artifact changes.
STORE_SCHEMA, SAES_SCHEMA, CIRCUIT_SCHEMA = 3, 3, 3

_EMBEDDED_DATA = Path(__file__).parent / "data"


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
            from sfc.data.pairs import load_counterfactuals, prompts_of

            pairs = load_counterfactuals(self.pairs, self.experiment.prompts, self.experiment.seed)
            return Prepared(prompts_of(pairs, self.category_of_pairs), CleaningReport(()))
        return prepare_prompts(self.data_folder, self.experiment.prompts, self.experiment.seed)

    @property
    def category_of_pairs(self) -> str:
        """What stands in the place of a category where the prompts are pairs: the name of their file."""
        return self.pairs.stem if self.pairs else ""

    def having(self, section: type[Options], **values: Any) -> "Run":
        """The same run with other values in a registered section. Prompts, store and SAEs stay what they are.

        Raises:
            ValidationError: a value is not valid.
        """
        options = section.model_validate({**section.of(self.experiment).model_dump(), **values})
        run = replace(self, experiment=self.experiment.model_copy(update={section.section: options}))
        kept = {name: self.__dict__[name] for name in ("prompts", "store", "corpus", "saes") if name in self.__dict__}
        run.__dict__.update(kept)
        return run

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

    @property
    def base_inputs(self) -> dict[str, Any]:
        """What a fingerprint says of the base model, where the contrast has one."""
        experiment = self.experiment
        is_wanted = DiscoveryOptions.of(experiment).contrast == "model-base"
        return {"base": model_identity(base_model(experiment))} if is_wanted else {}

    def circuit(self, category: str) -> Artifact:
        """The circuit of one category, with its evaluation and its page."""
        experiment = self.experiment
        about = DiscoveryOptions.of(experiment).name_of_prompts
        features = DiscoveryOptions.of(experiment).nodes == "features"
        discovery = DiscoveryOptions.of(experiment).identity()
        if features:
            del discovery["nodes"]
        inputs = {
            "schema": CIRCUIT_SCHEMA,
            "seed": experiment.seed,
            "prompts": self.store.inputs,
            "saes": self.saes.inputs if features else None,
            "category": category,
            "hard_share": experiment.prompts.hard_share,
            "discovery": discovery,
            "evaluation": EvaluationOptions.of(experiment).model_dump(),
        }
        if DiscoveryOptions.of(experiment).reference_choice == "paired":
            inputs["pairs"] = hash_of_file(self.pairs) if self.pairs else pairs_fingerprint(self.data_folder)
        inputs |= self.base_inputs
        topics = None if self.pairs else self.data_folder / TOPICS_FILE
        if topics and DiscoveryOptions.of(experiment).method == "correlation" and topics.is_file():
            inputs["topics"] = hash_of_file(topics)
        if not features:
            inputs["layers"] = experiment.activations.layers
            about += f"-{DiscoveryOptions.of(experiment).nodes}"
        name = f"circuit-{category}{about}-{DiscoveryOptions.of(experiment).method}"
        return Artifact.of(self.root / "circuits" / experiment.name, name, inputs)


def about_pairs(run: Run, path: Path) -> Run:
    """The same experiment on the counterfactual pairs of a file: no template, and each prompt against its partner.

    The SAEs are those of the experiment as it was: of a few short prompts none could be learned.

    Raises:
        UserError: there is no such file, or `discovery.reference` is none for pairs.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: --pairs takes JSON lines with clean_prefix, patch_prefix, clean_answer, …")
    discovery = DiscoveryOptions.of(run.experiment)
    if discovery.reference not in (None, "paired"):
        raise UserError(
            f"--pairs: each prompt's reference is its partner, so that {discovery.reference!r} cannot be had"
        )
    update = {
        "model": run.experiment.model.model_copy(update={"template": "{prompt}", "system_prompt": None}),
        "discovery": discovery.model_copy(update={"reference": "paired"}),
    }
    return replace(run, experiment=run.experiment.model_copy(update=update), pairs=path, learned_by=run)
