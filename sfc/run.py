"""One experiment on one data set below one root folder: where its artifacts lie, and what each depends on.

Nothing here imports torch: asking whether anything has to be done takes no time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from sfc.behaviors.behavior import BEHAVIORS, Behavior
from sfc.core.artifacts import Artifact, hash_of_file
from sfc.core.config import Experiment, SampleOptions
from sfc.core.errors import UserError
from sfc.core.files import below
from sfc.core.options import Options
from sfc.core.sites import in_order
from sfc.data.corpus import PROMPTS, SAMPLED, corpus_identity
from sfc.data.prepare import Prepared, balance, prompts_fingerprint
from sfc.data.schema import ALL
from sfc.models.sources import model_identity
from sfc.saes.architectures import CONFIG_FILE, read_config
from sfc.saes.source import saes_identity

# Raised by hand when the meaning of an artifact changes.
STORE_SCHEMA, SAMPLED_SCHEMA, SAES_SCHEMA = 3, 1, 3

_EMBEDDED_DATA = Path(__file__).parent / "data"
EVERYDAY_STARTS = _EMBEDDED_DATA / "everyday_starts.txt"


@dataclass(frozen=True)
class Run:
    """One experiment on one data set, below one root folder."""

    experiment: Experiment
    root: Path = Path()
    data: str = "mini"
    device: str = "auto"
    learned_by: "Run | None" = None
    """the run whose SAEs are used; None: its own"""

    @classmethod
    def of(cls, experiment: Experiment, root: Path = Path(), data: str = "mini", device: str = "auto") -> "Run":
        """The run of an experiment, adapted to its behavior.

        Raises:
            UserError: the behavior does not exist, or does not go with the experiment's other sections.
        """
        behavior = BEHAVIORS[experiment.behavior]
        other = None if behavior.has_own_saes else experiment.model_copy(update={"behavior": "refusal"})
        learned_by = other and cls(other, root, data, device)
        return cls(behavior.adapted(experiment), root, data, device, learned_by)

    @property
    def data_folder(self) -> Path:
        """`ROOT/data/NAME`, any folder by path, or for `mini` the set that comes with the repository.

        Raises:
            UserError: there is no such folder, or a link there leads out of the root.
        """
        candidates = [self.root / "data" / self.data, Path(self.data)]
        if self.data == "mini":
            candidates.append(_EMBEDDED_DATA / "mini")
        if len(Path(self.data).parts) == 1 and candidates[0].is_dir():
            return below(self.root, "data", self.data)
        for folder in candidates:
            if folder.is_dir():
                return folder
        raise UserError(
            f"no data set {self.data!r}: looked for {candidates[0]}; `sfc download` fetches or-bench, or give a folder"
        )

    @property
    def behavior(self) -> Behavior:
        """What is explained."""
        return BEHAVIORS[self.experiment.behavior]

    @property
    def judge(self) -> Callable[[str], bool]:
        """Whether a reply shows the behavior.

        Raises:
            UserError: replies do not tell.
        """
        judge = self.behavior.judge()
        if judge is None:
            raise UserError(f"replies do not show {self.experiment.behavior!r}: that behavior has no judge of replies")
        return judge

    @cached_property
    def prompts(self) -> Prepared:
        """The prompts with their splits."""
        return self.behavior.prompts(self.data_folder, self.experiment)

    @property
    def identity(self) -> dict[str, Any]:
        """What running the model on the prompts depends on: it, its template, the prompts, and how they are split."""
        prompts = [prompts_fingerprint(self.prompts.frame), self.experiment.prompts.model_dump()]
        return {"model": model_identity(self.experiment.model), "prompts": prompts}

    def balanced(self, group: str = ALL) -> pd.DataFrame:
        """As many prompts of either side in a group, or in each of `all`; see `balance`.

        Raises:
            UserError: one of the two sides has none.
        """
        wanted, prompts = None if group == ALL else group, self.experiment.prompts
        return balance(self.prompts.frame, wanted, prompts.hard_share, self.experiment.seed)[0]

    def group(self, name: str | None) -> str:
        """The group of prompts, such as a category, that a name means.

        Raises:
            UserError: there is no such group.
        """
        return self.behavior.group(self.experiment, name)

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

    def with_prompts(self, frame: pd.DataFrame) -> "Run":
        """The same run about some of its prompts, or with other test prompts: its store and SAEs stay what they are.

        Args:
            frame: rows of the prepared table; those of the splits discovery and reference are among its own.
        """
        run = replace(self)
        run.__dict__.update(prompts=self.prompts._replace(frame=frame), store=self.store, saes=self.saes)
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
        return Artifact.of(below(self.root, "activations"), experiment.name, inputs)

    @cached_property
    def sampled(self) -> Artifact:
        """The conversations that the model writes itself, of however many tokens."""
        experiment = self.experiment
        inputs = {
            **{name: self.store.inputs[name] for name in ("seed", "model", "prompts")},
            "schema": SAMPLED_SCHEMA,
            "starts": hash_of_file(EVERYDAY_STARTS),
            "sample": SampleOptions.of(experiment).identity(),
        }
        return Artifact.of(below(self.root, "corpora"), experiment.name, inputs)

    @cached_property
    def corpus(self) -> Artifact:
        """The activations that the SAEs learn from: the store itself, or one of another corpus.

        Raises:
            UserError: one of the sources is a file that does not exist.
        """
        corpus = self.experiment.corpus
        if corpus.is_prompts_alone:
            return self.store
        inputs = {
            **self.store.inputs,
            "sources": [self._source_identity(source) for source in corpus.sources],
            "corpus": corpus.identity(),
        }
        return Artifact.of(below(self.root, "activations"), f"{self.experiment.name}-corpus", inputs)

    def _source_identity(self, source: str) -> Any:
        if source == PROMPTS:
            return source
        if source == SAMPLED:
            return {SAMPLED: self.sampled.fingerprint, "tokens": SampleOptions.of(self.experiment).tokens}
        return corpus_identity(source)

    @property
    def sites(self) -> list[str]:
        """Every site that dictionaries read or write; what transcoders read is known once they are in their folder."""
        sites = self.experiment.activations.sites
        if self.experiment.saes.source is None:
            return sites
        folders = [self.saes.folder / site for site in sites]
        return in_order([*sites, *(read_config(each).reads for each in folders if (each / CONFIG_FILE).is_file())])

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
        return Artifact.of(below(self.root, "saes"), self.experiment.name, inputs)
