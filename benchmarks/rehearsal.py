"""Every stage of a preset on its model's real sizes, before anything is downloaded: seconds, memory, bytes.

The model is random, and has the preset's architecture and sizes. Its tokenizer is made from the prompts, which are the
package's, and cuts them about as finely as such models' do. Dictionaries that a preset takes from elsewhere are random
too, of the width given. Every stage is the very command, in a process of its own, so that its peak of memory is its
own, or in several that share it (`--processes`), whose peaks are added up. `--layers`, `--sites` and `--scale` make it
small enough for a small machine; the last column is for all layers, sites, steps, and as many prompts as OR-Bench has
when it is balanced, in proportion. What a random model does means nothing; what it takes does.

Example: rehearsal.py --preset llama2-7b-chat --layers 4 --sites 2 --scale 0.01
"""

import argparse
import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sfc
from sfc.circuits.methods import LearnedMaskOptions
from sfc.core.artifacts import write_json
from sfc.core.config import Experiment
from sfc.core.experiments import experiment_of, load_experiment, preset_names
from sfc.core.machine import seconds_of
from sfc.core.progress import say
from sfc.core.reading import read_yaml
from sfc.core.sites import layer_of
from sfc.data.or_bench import load_prompts
from sfc.models.linear import linear
from sfc.models.loading import load_outline
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.format import save_dictionary

SHAPES = read_yaml(Path(__file__).with_name("shapes.yaml"))
MINI = Path(sfc.__file__).parent / "data" / "mini"
OR_BENCH = 2 * 655
"""its prompts when it is balanced: all toxic ones, and as many safe and hard ones"""
CATEGORIES = 10
_SPECIAL = ["<|begin|>", "<|user|>", "<|end|>", "<|assistant|>"]
_TEMPLATE = "<|begin|><|user|>\n{prompt}<|end|>\n<|assistant|>\n"
_VOCABULARY = 4000
_FEWEST = 12
"""prompts of each category and kind: fewer are too few for pairs of equal length, and for a batch of rows"""
_SQUARE = 2048
"""rows and columns of the matrices by whose product the machine's rate is measured"""
_FEWEST_STEPS = 10
"""of a dictionary's or a mask's training, of which the first ones take longer"""
_ANY_DIRECTION = ("--set", "steering.min_induced=-1000", "--set", "steering.max_kl=1000", "--set", "steering.latest=1")
"""a random model has none that induces a refusal"""


class Shares(NamedTuple):
    """What is rehearsed, as shares of the whole."""

    layers: float
    sites: float
    prompts: float
    steps: float
    mask_steps: float

    @property
    def blocks(self) -> float:
        """Of the blocks from the first site on, and the sites among them: circuits take as long as both together."""
        return min(self.layers, self.sites)


STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "collect": ((), ("layers", "prompts")),
    "train": ((), ("sites", "steps")),
    "nulls": (("--category", "violence"), ("blocks", "mask_steps")),
    "discover": (("--category", "violence"), ("blocks", "prompts")),
    "evaluate": (("--category", "violence"), ("blocks", "prompts")),
    "patch": (("--category", "violence", "--component", "resid", "--require", "score"), ("layers", "prompts")),
    "steer": (_ANY_DIRECTION, ("layers", "prompts")),
    "behaviour": ((), ("layers", "prompts")),
}
"""the commands with their options, and with which shares the time of each grows; that of learning a mask, which is most
of `nulls`, grows with its steps and not with the prompts"""


def main(arguments: list[str] | None = None) -> None:
    """Rehearse, print the table and, with --json, the figures."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=options.scratch) as scratch:
        figures = rehearse(options, Path(scratch))
    harness.emit(report(figures), {**figures, "machine": harness.machine(options.device)}, options.json)


def _parser() -> argparse.ArgumentParser:
    options = harness.parser(__doc__)
    options.add_argument(
        "--preset",
        choices=[*SHAPES, *(name for name in preset_names() if name.endswith("-all"))],
        default="llama2-7b-chat",
    )
    options.add_argument("--layers", type=int, help="layers of the model; the preset's by default")
    options.add_argument("--sites", type=int, help="layers with sites, evenly spaced; the preset's by default")
    options.add_argument(
        "--scale", type=float, default=1.0, help="share of OR-Bench's prompts and of the steps of SAEs and masks"
    )
    options.add_argument("--width", type=int, default=16384, help="features where a preset takes dictionaries")
    options.add_argument("--dtype", help="of the model: by default float32 on a CPU, the preset's on a GPU")
    options.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="only these")
    options.add_argument("--processes", type=int, default=1, help="that share each stage, as torchrun starts them")
    options.add_argument("--device", default="cpu")
    options.add_argument("--scratch", type=Path, help="where model and artifacts lie while it runs; deleted at the end")
    return options


def rehearse(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make the model and the preset, run the stages one after another, and measure each."""
    if options.quick:
        options.layers, options.sites, options.scale = 2, 1, 0.2
    published, shape = load_experiment(options.preset), SHAPES[options.preset.removesuffix("-all")]
    n_layers = _config(shape).num_hidden_layers
    layers = min(options.layers or n_layers, n_layers)
    dtype = options.dtype or ("float32" if options.device == "cpu" else published.model.dtype)
    model = _write_model(scratch / "model", _config(shape, layers), dtype)
    say(f"{options.preset}: {layers} of {n_layers} layers, {model.parameters / 1e9:.2f} billion parameters")
    experiment = _small(published, options, scratch, layers, dtype)
    write_json(preset := scratch / "rehearsal.yaml", experiment.model_dump(mode="json"))
    shared = ("--preset", str(preset), "--root", str(scratch), "--device", options.device)
    stages = {name: _measured([name, *STAGES[name][0], *shared], scratch, options.processes) for name in options.stages}
    collected = stages.get("collect", {}).get("result") or {}
    shares = Shares(
        layers / n_layers,
        len(experiment.activations.layers) / len(published.activations.layers),
        collected.get("n_prompts", OR_BENCH) / OR_BENCH,
        experiment.saes.steps / published.saes.steps,
        LearnedMaskOptions.of(experiment).steps / LearnedMaskOptions.of(published).steps,
    )
    floors = _floors(experiment, model, collected.get("n_tokens", 0), options.device)
    rows = []
    for name, stage in stages.items():
        rows.append(
            {
                "stage": name,
                **{key: value for key, value in stage.items() if key != "result"},
                "of_floor": floors[name] / stage["seconds"] if name in floors and not stage["error"] else None,
                "whole_seconds": None if stage["error"] else _whole(stage, shares, STAGES[name][1]),
            }
        )
    return {"preset": options.preset, "shares": shares._asdict(), **model._asdict(), "stages": rows}


def _whole(stage: dict[str, Any], shares: Shares, grows_with: Sequence[str]) -> float:
    """Seconds that the whole would take."""
    of_whole = float(np.prod([getattr(shares, share) for share in grows_with]))
    ranking = (stage["result"]["seconds"] or {}).get("effects", 0.0)
    return (stage["seconds"] - ranking) / of_whole + ranking / (shares.blocks * shares.mask_steps)


def report(figures: dict[str, Any]) -> str:
    """The table, and what failed."""
    columns = ("stage", "seconds", "of its floor", "host GB", "device GB", "written GB", "whole, minutes")
    rows = [
        (
            stage["stage"],
            stage["seconds"],
            stage["of_floor"],
            *(
                None if stage[key] is None else stage[key] / 1e9
                for key in ("host_bytes", "device_bytes", "written_bytes")
            ),
            None if stage["whole_seconds"] is None else stage["whole_seconds"] / 60,
        )
        for stage in figures["stages"]
    ]
    shares = ", ".join(f"{share:.3g} of all {name}" for name, share in figures["shares"].items())
    failed = [f"{stage['stage']} failed: {stage['error']}" for stage in figures["stages"] if stage["error"]]
    return "\n\n".join([f"{figures['preset']}, {shares}", harness.markdown_table(columns, rows), *failed])


class RandomModel(NamedTuple):
    """How large a model is, in parameters."""

    parameters: int
    per_layer: int


def _config(shape: dict[str, Any], layers: int | None = None) -> Any:
    """The configuration of a model of this shape; of fewer layers where that is asked for."""
    name = "n_layer" if "n_layer" in shape["sizes"] else "num_hidden_layers"
    fewer = {} if layers is None else {name: layers}
    return getattr(transformers, shape["class"])(**shape["sizes"] | fewer)


def _write_model(folder: Path, config: Any, dtype: str) -> RandomModel:
    """Save a random model, and a tokenizer that is made from the prompts."""
    texts = load_prompts(MINI)[0]["prompt"].tolist()
    tokenizer = _tokenizer(texts)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 2, 2
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return RandomModel(model.num_parameters(), sum(each.numel() for each in blocks[0].parameters()))


def _tokenizer(texts: Sequence[str]) -> Any:
    """Byte pairs, merged on these texts, which cuts them nearly as finely as large vocabularies do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, _, eos, _ = _SPECIAL
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)


def _small(published: Experiment, options: argparse.Namespace, scratch: Path, layers: int, dtype: str) -> Experiment:
    """The preset with the random model, fewer layers with sites, fewer prompts and fewer steps."""
    values = published.model_dump(mode="json")
    values["name"] = "rehearsal"
    values["model"] = {"source": str(scratch / "model"), "dtype": dtype, "template": _TEMPLATE, "refusal_tokens": ["I"]}
    values["prompts"]["limit"] = max(round(options.scale * OR_BENCH / 2 / CATEGORIES), _FEWEST)
    values["activations"]["layers"] = _spaced(published.activations.layers, options.sites, layers)
    mask = LearnedMaskOptions.of(published)
    values[mask.section] = mask.model_dump() | {"steps": max(round(mask.steps * min(options.scale, 1)), _FEWEST_STEPS)}
    saes = values["saes"]
    if published.saes.source is None:
        saes["steps"] = max(round(published.saes.steps * options.scale), _FEWEST_STEPS)
        saes["warmup_steps"] = min(saes["warmup_steps"], saes["steps"] // 10)
        return experiment_of(values)
    saes |= {"source": str(scratch / "dictionaries"), "min_variance_explained": -1e9}
    experiment = experiment_of(values)
    for site in experiment.activations.sites:
        _write_dictionary(
            scratch / "dictionaries" / site, site, load_outline(experiment.model).width(site), options.width
        )
    return experiment


def _spaced(wanted: Sequence[int], n: int | None, layers: int) -> list[int]:
    """`n` of the wanted layers, evenly spaced; the last ones of a model that has too few layers for these."""
    n = min(n or len(wanted), len(wanted), layers)
    if max(wanted) >= layers:
        return list(range(layers - n, layers))
    return [wanted[int(place)] for place in np.linspace(0, len(wanted) - 1, n).round()]


def _write_dictionary(folder: Path, site: str, d_in: int, width: int) -> None:
    """A random top-k dictionary, its encoder the transpose of its decoder."""
    directions = torch.nn.functional.normalize(torch.randn(width, d_in), dim=1)
    weights = {"W_enc": directions.t(), "b_enc": torch.zeros(width), "W_dec": directions, "b_dec": torch.zeros(d_in)}
    save_dictionary(TopKDictionary(weights, k=min(64, width), site=site), folder, {})


def _measured(arguments: list[str], root: Path, n_processes: int) -> dict[str, Any]:
    """Run a command in processes of its own: seconds without imports, peaks of memory, bytes written, its result."""
    before = _bytes_below(root)
    meeting = {"WORLD_SIZE": str(n_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started = [
        _started(arguments, meeting | {"RANK": str(number), "LOCAL_RANK": str(number)}) for number in range(n_processes)
    ]
    stage, *others = [_outcome(process, results) for process, results in started]
    stage["error"] = stage["error"] or next((other["error"] for other in others if other["error"]), None)
    if stage["host_bytes"] is not None:
        stage["host_bytes"] += sum(other["host_bytes"] or 0 for other in others)
    stage["written_bytes"] = _bytes_below(root) - before
    say(f"{arguments[0]}: {stage['seconds']:.0f} s{', ' + stage['error'] if stage['error'] else ''}")
    return stage


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def _started(arguments: list[str], variables: dict[str, str]) -> tuple[BaseProcess, Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run_stage, args=(arguments, variables, there))
    process.start()
    there.close()
    return process, here


def _outcome(process: BaseProcess, results: Connection) -> dict[str, Any]:
    try:
        return results.recv()
    except EOFError:
        killed = "the process was killed"
        return {"seconds": 0.0, "host_bytes": None, "device_bytes": None, "error": killed, "result": None}
    finally:
        process.join()


def _run_stage(arguments: list[str], variables: dict[str, str], results: Connection) -> None:
    """What a process of a stage does."""
    from sfc.cli import main as command

    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(variables)
    sys.argv = ["sfc", *arguments, "--json"]
    out, error, status = StringIO(), StringIO(), 0
    began = time.perf_counter()
    with redirect_stdout(out), redirect_stderr(error):
        try:
            command()
        except SystemExit as end:
            status = int(end.code or 0)
    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    said = out.getvalue().splitlines()
    results.send(
        {
            "seconds": time.perf_counter() - began,
            "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device_bytes": on_device,
            "error": error.getvalue().splitlines()[-1] if status else None,
            "result": json.loads(said[-1]) if said and not status else None,
        }
    )


def _end_with_parent() -> None:
    """A stage whose rehearsal was killed has nobody to report to."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _floors(experiment: Experiment, model: RandomModel, n_tokens: int, device: str) -> dict[str, float]:
    """Seconds that the products alone take at the measured matrix rate: of all blocks run, and of all encoders."""
    square = torch.randn(_SQUARE, _SQUARE, device=device, dtype=getattr(torch, experiment.model.dtype))
    rate = 2 * _SQUARE**3 / seconds_of(lambda: linear(square, square), torch.device(device))
    sites, saes = experiment.activations.sites, experiment.saes
    floors = {"collect": 2 * model.per_layer * (layer_of(sites[-1]) + 1) * n_tokens / rate}
    if saes.source is None:
        d_in = load_outline(experiment.model).width(sites[0])
        floors["train"] = 2 * d_in * saes.expansion * d_in * saes.batch_size * saes.steps * len(sites) / rate
    return floors


if __name__ == "__main__":
    main()
