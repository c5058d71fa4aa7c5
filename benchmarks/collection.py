"""Collecting activations beside the bare forward pass of the same blocks, in one run.

The bare pass is the Hugging Face model itself, cut after the last wanted block, without hooks and without keeping
anything, over the same batches: once as it is, and once with its linear layers computed as ours are
(`sfc.models.linear`).
Collection is what `sfc collect` does: hooks, conversion, and a store on the disk that is fsynced after every batch.
"""

import copy
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch

from sfc.core.experiments import load_experiment
from sfc.data.prepare import prepare_prompts
from sfc.data.render import TokenizedPrompt
from sfc.models.linear import use_quick_products
from sfc.models.loading import Model, load_model, load_weights
from sfc.saes.collect import collect
from sfc.saes.plan import plan_batches

MINI = Path(__file__).parents[1] / "sfc" / "data" / "mini"
FULL = {"rounds": 7, "prompts": 200}
QUICK = {"rounds": 3, "prompts": 60}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and, with --json, the figures."""
    parser = harness.parser(__doc__)
    parser.add_argument("--preset", default="smollm2")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else FULL
    experiment = load_experiment(options.preset)
    frame = prepare_prompts(MINI, experiment.prompts, experiment.seed).frame.head(effort["prompts"])
    model = load_model(experiment.model, options.device)
    prompts = model.tokenize(frame["prompt"].tolist())
    config, sites = experiment.activations, experiment.activations.sites
    bare = _bare_blocks(experiment.model, config.layers[-1] + 1, options.device)
    quick = _bare_blocks(experiment.model, config.layers[-1] + 1, options.device)
    use_quick_products(quick)
    batches = [planned.batch.ids for planned in plan_batches(prompts, config, model.device)]
    with tempfile.TemporaryDirectory() as folder:
        seconds = harness.interleaved(
            {
                "collection": lambda: _collect_anew(model, prompts, sites, config, Path(folder)),
                "bare forward pass": lambda: _run(bare, batches),
                "bare forward pass, oneDNN": lambda: _run(quick, batches),
            },
            effort["rounds"],
            burst=1,
            device=options.device,
        )
    tokens = sum(len(prompt.ids) for prompt in prompts)
    figures = {
        "fraction_of_bare": harness.paired_ratio(seconds["bare forward pass"], seconds["collection"]),
        "fraction_of_bare_onednn": harness.paired_ratio(seconds["bare forward pass, oneDNN"], seconds["collection"]),
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "seconds_by_round": seconds,
        "tokens": tokens,
        "padding": 1 - tokens / sum(ids.numel() for ids in batches),
        "sites": len(sites),
        "machine": harness.machine(options.device),
    }
    rows = [(name, tokens / statistics.median(values)) for name, values in seconds.items()]
    rows.append(("collection, of the bare pass", figures["fraction_of_bare"]))
    rows.append(("collection, of the bare pass by oneDNN", figures["fraction_of_bare_onednn"]))
    harness.emit(harness.markdown_table(("what", "tokens/s"), rows), figures, options.json)


def _bare_blocks(config: Any, n_blocks: int, device: str) -> Any:
    """The model's blocks as Hugging Face runs them, without those after the last wanted one and the unembedding."""
    model = copy.copy(load_weights(config)[0].base_model).to(device).eval()
    blocks = next(child for child in model.children() if isinstance(child, torch.nn.ModuleList))
    del blocks[n_blocks:]
    return model


@torch.no_grad()
def _run(model: Any, batches: Sequence[torch.Tensor]) -> None:
    for ids in batches:
        model(input_ids=ids, use_cache=False)


def _collect_anew(model: Model, prompts: list[TokenizedPrompt], sites: list[str], config: Any, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    collect(model, prompts, sites, config, folder, lambda _: None)


if __name__ == "__main__":
    main()
