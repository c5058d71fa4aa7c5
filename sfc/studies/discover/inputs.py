"""What circuits are made from, beside their options: what has to be finished before, and files that are read."""

from typing import Any

from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, base_model
from sfc.core.artifacts import hash_of_file
from sfc.data.pairs import pairs_fingerprint
from sfc.data.schema import TOPICS_FILE
from sfc.models.sources import model_identity
from sfc.run import Run
from sfc.studies.collect.study import COLLECT
from sfc.studies.study import Need
from sfc.studies.train.study import TRAIN


def needs_of_circuits(run: Run) -> list[Need]:
    """What has to be finished before circuits are found or judged."""
    trained = [Need(TRAIN, run)] if NODES[DiscoveryOptions.of(run.experiment).nodes].needs_saes else []
    return [*trained, Need(COLLECT, run)]


def baseline_inputs(run: Run) -> dict[str, Any]:
    """What fingerprints say of the reference: files of pairs and topics, and the base model, where they are used."""
    options, inputs = DiscoveryOptions.of(run.experiment), {}
    if run.behavior.reads_data_set:
        topics = run.data_folder / TOPICS_FILE
        if options.baseline_choice == "paired":
            inputs["pairs"] = pairs_fingerprint(run.data_folder)
        if METHODS[options.method].reads_topics and topics.is_file():
            inputs["topics"] = hash_of_file(topics)
    if options.contrast == "model-base":
        inputs["base"] = model_identity(base_model(run.experiment))
    return inputs
