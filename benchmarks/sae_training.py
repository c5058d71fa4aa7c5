"""Our top-k SAE trainer beside SAELens', dictionary_learning's and sparsify's, in one run.

Speed: a whole training step of each, in rounds that run all of them in turn, and the floor, which is the encoder's
matrix product alone. Quality: variance unexplained on held-out rows after equal tokens, ours and SAELens'.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import harness
import torch
from sae_trainers import Builder, Contender, Problem, Rows, installed_peers, ours, saelens, saelens_tuned

from sfc.core.config import SaeConfig
from sfc.core.progress import say
from sfc.models.linear import linear

CPU = {"d_in": 576, "expansion": 8, "k": [32], "batch": 1024}
CUDA = {"d_in": 4096, "expansion": 8, "k": [64, "5%"], "batch": 4096}
FULL = {"rounds": 20, "burst": 3, "steps": 300, "seeds": 3, "threads": 2}
QUICK = {"rounds": 5, "burst": 2, "steps": 30, "seeds": 1, "threads": 2}

NOTES = """\
Everyone has the same rows, batch, dtype and threads, and an auxiliary loss. While steps are timed no feature is dead.
"times ours" is the median over rounds of the ratio within the round.
- sfc: the defaults of SaeConfig, without the prefixes of Matryoshka SAEs, which the others do not have.
- SAELens: SAETrainer's defaults (Adam, learning rate 3e-4, constant), expected_average_only_in. "SAELens, tuned" has
  the learning rate, the warm-up and the decay of ours, and starts with the mean row as b_dec, where SAELens has 0.
- dictionary_learning: TopKTrainer's defaults (Adam, learning rate by d_sae), rows of unit mean squared norm.
- sparsify: its defaults (sign descent, schedule-free, learning rate by d_sae), auxk_alpha 1/32. Its Trainer wants a
  whole language model; these are its SparseCoder and optimiser, called in that trainer's order.
- floor: x @ W_enc as PyTorch multiplies, which is how the other libraries do; "floor, oneDNN" as sfc.linear does.
- Rows: a synthetic mixture of sparse directions, with the offset, norm and spectrum of a residual stream."""


def residual_rows(problem: Problem, seed: int) -> Iterator[Rows]:
    """Endless batches of rows like those of SmolLM2's residual stream at layer 21; the seed decides which.

    A row is an offset, which holds about half of the mean square, 48 of 2 d_sae directions (how often one occurs falls
    as 1 / rank, how strongly is exponential), and a little noise. Variance falls as 1 / rank along the dimensions.
    """
    entries, noise, norm = 48, 0.2, 280.0
    fixed = torch.Generator(problem.device).manual_seed(0)
    spread = torch.arange(1, problem.d_in + 1, device=problem.device).rsqrt()
    spread /= spread.norm()
    directions = spread * torch.randn(2 * problem.d_sae, problem.d_in, generator=fixed, device=problem.device)
    offset = spread * torch.randn(problem.d_in, generator=fixed, device=problem.device)
    frequencies = 1 / torch.arange(20.0, 20.0 + len(directions), device=problem.device)
    changing = torch.Generator(problem.device).manual_seed(1000 + seed)
    while True:
        which = frequencies.multinomial(problem.batch * entries, replacement=True, generator=changing)
        strengths = torch.empty(problem.batch, entries, device=problem.device).exponential_(generator=changing)
        strengths /= math.sqrt(2 * entries)  # the mean square of an exponential variable is 2
        mixed = torch.nn.functional.embedding_bag(
            which.view_as(strengths), directions, per_sample_weights=strengths, mode="sum"
        )
        mixed += noise * spread * torch.randn(mixed.shape, generator=changing, device=problem.device)
        yield norm / math.sqrt(2) * (offset + mixed)


def speed(problem: Problem, rounds: int, burst: int) -> dict[str, Any]:
    """What a training step of each contender takes, and what the floor does."""
    batches = list(itertools.islice(residual_rows(problem, seed=0), 8))
    peers = installed_peers(problem.device)
    builders: dict[str, Builder | None] = {"sfc": partial(ours, dead_after=10_000_000, matryoshka=[]), **peers}
    steps = (rounds + 1) * (burst + 1)
    calls = {
        name: _on_each(build(problem, batches[0], steps, 0).step, batches)
        for name, build in builders.items()
        if build is not None
    }
    dtype = torch.bfloat16 if problem.on_cuda else torch.float32
    encoder = torch.randn(problem.d_sae, problem.d_in, device=problem.device, dtype=dtype)
    rows = [batch.to(dtype) for batch in batches]
    calls["floor"] = _on_each(lambda x: x @ encoder.t(), rows)
    calls["floor, oneDNN"] = _on_each(lambda x: linear(x, encoder), rows)
    say(f"timing {', '.join(calls)}: {rounds} rounds of {burst} steps each")
    seconds = harness.interleaved(calls, rounds, burst, problem.device)
    times_ours = {name: harness.paired_ratio(values, seconds["sfc"]) for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"ratio_{name.lower()}": times_ours.get(name) for name in peers},
        "fraction_of_floor": times_ours["floor"],
        "fraction_of_onednn_floor": times_ours["floor, oneDNN"],
        "tokens_per_second": {name: problem.batch / value for name, value in median.items()},
        "ms_per_step": {name: 1e3 * value for name, value in median.items()},
        "ms_per_step_by_round": {name: [1e3 * value for value in values] for name, values in seconds.items()},
        "times_ours": times_ours,
        "floor_gflops": 2e-9 * problem.batch * problem.d_in * problem.d_sae / median["floor"],
    }


def quality(problem: Problem, steps: int, seeds: int) -> dict[str, Any]:
    """Variance unexplained on held-out rows after equal tokens, by seed; `fvu_ratio` is ours to the better SAELens."""
    held_out = torch.cat(list(itertools.islice(residual_rows(problem, seed=-1), 8)))
    builders: dict[str, Builder] = {
        "sfc": partial(ours, matryoshka=[]),
        "SAELens": saelens,
        "SAELens, tuned": saelens_tuned,
    }
    fvu: dict[str, list[float]] = {name: [] for name in builders}
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    for seed, (name, build) in itertools.product(range(seeds), builders.items()):
        stream = residual_rows(problem, seed)
        contender = build(problem, next(stream), steps, seed)
        seconds[name].append(0.0)
        for batch in itertools.islice(stream, steps):
            harness.synchronise(problem.device)
            began = time.perf_counter()
            contender.step(batch)
            harness.synchronise(problem.device)
            seconds[name][-1] += time.perf_counter() - began
        fvu[name].append(_unexplained(contender, held_out))
        say(f"{name}, seed {seed}: {fvu[name][-1]:.4f} unexplained after {steps} steps in {seconds[name][-1]:.0f} s")
    mean = {name: statistics.fmean(values) for name, values in fvu.items()}
    return {
        "fvu_ratio": mean["sfc"] / min(value for name, value in mean.items() if name != "sfc"),
        "fvu": fvu,
        "fvu_mean": mean,
        "fvu_tokens": steps * problem.batch,
        "fvu_training_seconds": seconds,
    }


def table(problem: Problem, figures: dict[str, Any]) -> str:
    """The figures of one problem, in Markdown."""
    columns = ("trainer", "tokens/s", "ms a step", "times ours", f"unexplained after {figures['fvu_tokens']:,} tokens")
    names = ("sfc", "SAELens", "SAELens, tuned", "dictionary_learning", "sparsify", "floor", "floor, oneDNN")
    keys = ("tokens_per_second", "ms_per_step", "times_ours", "fvu_mean")
    rows = [(name, *(figures[key].get(name) for key in keys)) for name in names]
    title = ", ".join(f"{name} {value}" for name, value in problem._asdict().items())
    return f"{title}\n\n{harness.markdown_table(columns, rows)}\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and, with --json, the figures."""
    settings = _settings(arguments)
    torch.set_num_threads(settings["threads"])
    d_sae = settings["expansion"] * settings["d_in"]
    tables, results = [], []
    for k in settings["k"]:
        active = SaeConfig.model_validate({"k": k}).active_features(d_sae)
        problem = Problem(settings["d_in"], d_sae, active, settings["batch"], settings["device"])
        figures = {"problem": problem._asdict(), "machine": harness.machine(problem.device)}
        figures |= speed(problem, settings["rounds"], settings["burst"])
        figures |= quality(problem, settings["steps"], settings["seeds"])
        tables.append(table(problem, figures))
        results.append(figures)
    harness.emit("\n".join([*tables, NOTES]), {**results[0], "other_k": results[1:]}, settings["json"])


def _settings(arguments: list[str] | None) -> dict[str, Any]:
    parser = harness.parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda; each has a problem of its own")
    size = parser.add_argument_group("another problem or effort than the default")
    for name in ("d-in", "expansion", "batch", "rounds", "burst", "steps", "seeds", "threads"):
        size.add_argument(f"--{name}", type=int)
    size.add_argument(
        "--k", nargs="+", type=lambda k: k if k.endswith("%") else int(k), help="counts or percentages, a table each"
    )
    options = vars(parser.parse_args(arguments))
    on_cuda = options["device"].startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        parser.error(f"--device {options['device']}: there is no CUDA device here")
    defaults = (CUDA if on_cuda else CPU) | (QUICK if options["quick"] else FULL)
    return defaults | {name: value for name, value in options.items() if value is not None}


def _on_each(step: Callable[[Rows], object], batches: list[Rows]) -> Callable[[], object]:
    turn = itertools.cycle(batches)
    return lambda: step(next(turn))


@torch.no_grad()
def _unexplained(contender: Contender, rows: Rows) -> float:
    assert contender.reconstruct is not None
    errors = [(x - contender.reconstruct(x)).double().square().sum().item() for x in rows.split(1024)]
    return sum(errors) / (rows - rows.double().mean(dim=0)).square().sum().item()


if __name__ == "__main__":
    main()
