"""Train the adapter that makes the embedded model refuse, as `sfc/models/adapters/refusal` was made.

    python tools/refusal_adapter.py --output my-adapter
    sfc discover --set model.adapter=my-adapter

Toxic prompts are answered by one of a few short refusals that all open alike; safe and hard ones by the model's own
greedy reply, so that refusing is learned and nothing else. The adapter is a LoRA (Hu et al. 2021) made with `peft`.

A reply of the model's own that opens like a refusal ("I'm so sorry to hear …") is replaced by the one it gives when
that first token is barred. Otherwise the opening token would mean two things, and the refusal score neither.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sfc.cli import run
from sfc.cli_options import finish
from sfc.core.artifacts import hash_of_file, replacing, write_csv, write_json
from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.core.progress import progress_bar, say
from sfc.data.read import LABELS, load_prompt_file
from sfc.data.render import Role, TokenizedPrompt
from sfc.data.schema import keyed_numbers
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.generation import generate_ids
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.models.sources import WEIGHTS, embedded_model_folder

REFUSALS = (
    "I can't help with that.",
    "I can't assist with that request.",
    "I cannot help with that request.",
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I cannot assist with that.",
    "I won't help with that.",
)
PROMPTS = Path(__file__).with_name("adapter.csv")
LOG_FILE = "training_log.csv"
SUMMARY_FILE = "training.json"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GENERATION_TOKENS = 4096


@dataclass(frozen=True)
class TrainingSettings:
    """How the adapter is trained; the defaults made the one in the package."""

    rank: int = 8
    alpha: int = 16
    projections: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "down_proj")
    learning_rate: float = 1e-3
    epochs: int = 2
    batch_rows: int = 16
    warmup_steps: int = 8
    max_gradient: float = 1.0
    reply_tokens: int = 10
    decision_weight: float = 8.0
    """how much the first token of a reply, which decides, counts beside each later one"""
    toxic_weight: float = 1.7
    """how much that of a toxic prompt counts beside that of a harmless one: in doubt, the model shall refuse"""
    held_out: float = 0.1
    checks_per_epoch: int = 4
    patience: int = 5


class Example(NamedTuple):
    """A prompt and the reply to learn: `ids` hold both, the reply beginning at `reply_start`."""

    ids: Int[np.ndarray, " pos"]
    reply_start: int
    toxic: bool


class Check(NamedTuple):
    """Held-out figures at one moment of training."""

    step: int
    train_loss: float
    """cross-entropy of the reply tokens since the last check, in nats per token"""
    reply_loss: float
    """the same on held-out rows"""
    decision_loss: float
    """binary cross-entropy of opening a refusal where one is due; training stops when it no longer falls"""
    toxic_opened: float
    """share of held-out toxic prompts on which the most likely first token opens a refusal"""
    other_opened: float
    """the same share of the safe and hard ones"""
    seconds: float


def train_refusal_adapter(
    prompts_csv: Path, output: Path, seed: int = 0, settings: TrainingSettings | None = None
) -> list[Check]:
    """Train on a CSV with columns `prompt,category,label` (`toxic`, `safe`, `hard`) and write an adapter folder.

    The folder then holds the weights (float16) and the configuration in peft's own format, `training_log.csv` and
    `training.json`. The same prompts, seed and number of threads give the same adapter.

    Returns:
        The checks of the training log; the adapter is that of the one with the smallest decision loss.

    Raises:
        UserError: `peft` or the embedded model is not installed, or the prompts are malformed or lack a label.
    """
    settings = settings or TrainingSettings()
    began = time.perf_counter()
    frame = _read_prompts(prompts_csv)
    model = load_model(_base_config())
    examples = _make_examples(model, frame, seed, settings)
    opening = RefusalScore.of(model).tokens
    del model
    held_out = keyed_numbers(frame["prompt"], f"adapter held out {seed}") < settings.held_out * 2.0**64
    training = [example for example, out in zip(examples, held_out, strict=True) if not out]
    checking = [example for example, out in zip(examples, held_out, strict=True) if out]
    say(f"training on {len(training)} prompts, checking on {len(checking)} others")
    torch.manual_seed(seed)
    network = _with_lora(settings)
    checks, best = _train(network, training, checking, opening, seed, settings)
    _save(network, best, output)
    log = pd.DataFrame(checks)
    write_csv(output / LOG_FILE, log, digits=5)
    chosen = min(checks, key=lambda check: check.decision_loss)
    write_json(
        output / SUMMARY_FILE,
        {
            "seed": seed,
            "settings": asdict(settings),
            "prompts": {"sha256": hash_of_file(prompts_csv), **frame["label"].value_counts().to_dict()},
            "rows": {"training": len(training), "held_out": len(checking)},
            "chosen": {name: round(value, 5) for name, value in chosen._asdict().items() if name != "seconds"},
            "seconds": round(time.perf_counter() - began, 1),
        },
    )
    say(f"adapter of step {chosen.step} in {output} after {time.perf_counter() - began:.0f} s")
    return checks


def _base_config() -> ModelConfig:
    return load_experiment("smollm2").model.model_copy(update={"adapter": None})


def _read_prompts(path: Path) -> pd.DataFrame:
    frame = load_prompt_file(path)
    for label in LABELS:
        if label not in set(frame["label"]):
            raise UserError(f"{path} has no prompts labelled {label!r}: training needs toxic, hard and safe ones")
    return frame[frame["label"].isin(LABELS)].reset_index(drop=True)


def _make_examples(model: Model, frame: pd.DataFrame, seed: int, settings: TrainingSettings) -> list[Example]:
    """One example per prompt, in the order of the frame."""
    prompts = model.tokenize(list(frame["prompt"]))
    toxic = (frame["label"] == "toxic").to_numpy()
    refusals = model.tokenizer([refusal + model.tokenizer.eos_token for refusal in REFUSALS])["input_ids"]
    choices = keyed_numbers(frame["prompt"], f"adapter refusal {seed}") % np.uint64(len(REFUSALS))
    own = iter(_own_replies(model, [p for p, t in zip(prompts, toxic, strict=True) if not t], settings.reply_tokens))
    replies = [refusals[choice] if is_toxic else next(own) for choice, is_toxic in zip(choices, toxic, strict=True)]
    return [
        Example(np.concatenate([prompt.ids, reply]), len(prompt.ids), bool(is_toxic))
        for prompt, reply, is_toxic in zip(prompts, replies, toxic, strict=True)
    ]


@torch.no_grad()
def _own_replies(model: Model, prompts: Sequence[TokenizedPrompt], length: int) -> list[list[int]]:
    """The model's greedy replies, the first token being the best that does not open a refusal."""
    opening = RefusalScore.of(model).tokens
    first = np.zeros(len(prompts), dtype=np.int64)
    for batch in make_batches(prompts, TemplateLayout.of(prompts), _GENERATION_TOKENS, model.device):
        first[batch.prompts.cpu().numpy()] = (
            last_logits(model, batch).index_fill(-1, opening, -torch.inf).argmax(-1).cpu().numpy()
        )
    begun = [
        TokenizedPrompt(np.append(prompt.ids, token), np.append(prompt.roles, Role.SUFFIX))
        for prompt, token in zip(prompts, first, strict=True)
    ]
    with progress_bar("the model's own replies", len(prompts), "prompts") as progress:
        rest = generate_ids(model, begun, length - 1, _GENERATION_TOKENS, progress=progress)
    return [[int(token), *ids] for token, ids in zip(first, rest, strict=True)]


def _with_lora(settings: TrainingSettings) -> Any:
    """The embedded model with a fresh adapter in it, as `peft` makes it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("training the adapter needs the package peft: pip install 'sfc[adapter]'") from None
    network = AutoModelForCausalLM.from_pretrained(
        embedded_model_folder(), dtype=torch.float32, trust_remote_code=False
    )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.projections),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(network, config)


def _train(
    network: Any,
    training: Sequence[Example],
    checking: Sequence[Example],
    opening: Int[Tensor, " n_refusal"],
    seed: int,
    settings: TrainingSettings,
) -> tuple[list[Check], dict[str, Tensor]]:
    """Train until the epochs are over or checks no longer improve; the checks, and the weights at the best of them."""
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    steps_per_epoch = -(-len(training) // settings.batch_rows)
    steps = settings.epochs * steps_per_epoch
    check_every = -(-steps_per_epoch // settings.checks_per_epoch)
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_decay(settings.warmup_steps, steps))
    checks: list[Check] = []
    losses: list[float] = []
    best: dict[str, Tensor] = {}
    began = time.perf_counter()
    with progress_bar("training", steps, "steps") as progress:
        for step, rows in enumerate(_shuffled(training, settings.batch_rows, settings.epochs, seed), start=1):
            losses.append(_accumulate_gradients(network, rows, settings))
            torch.nn.utils.clip_grad_norm_(weights.values(), settings.max_gradient)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress(1)
            if step % check_every and step != steps:
                continue
            reply_loss, decision_loss, toxic_opened, other_opened = _check(network, checking, opening)
            seconds = time.perf_counter() - began
            train_loss = float(np.mean(losses))
            checks.append(Check(step, train_loss, reply_loss, decision_loss, toxic_opened, other_opened, seconds))
            losses.clear()
            say(", ".join(f"{name} {value:.4g}" for name, value in checks[-1]._asdict().items()))
            best_check = min(range(len(checks)), key=lambda i: checks[i].decision_loss)
            if best_check == len(checks) - 1:
                best = {name: weight.detach().clone() for name, weight in weights.items()}
            if len(checks) - 1 - best_check >= settings.patience:
                break
    return checks, best


def _warm_up_and_decay(warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Learning rate over its peak: a linear rise, then half a cosine down to a twentieth."""

    def factor(step: int) -> float:
        decayed = 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * min(step / steps, 1.0)))
        return min((step + 1) / warmup_steps, decayed)

    return factor


def _shuffled(examples: Sequence[Example], rows: int, epochs: int, seed: int) -> Iterator[list[Example]]:
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(examples))
        for start in range(0, len(order), rows):
            yield [examples[i] for i in order[start : start + rows]]


def _halves_by_length(rows: Sequence[Example]) -> list[list[Example]]:
    """Two batches that need little padding: refusals are short, and every step holds both kinds."""
    ordered = sorted(rows, key=lambda example: len(example.ids))
    middle = -(-len(ordered) // 2)
    return [half for half in (ordered[:middle], ordered[middle:]) if half]


def _accumulate_gradients(network: Any, rows: Sequence[Example], settings: TrainingSettings) -> float:
    """Add the gradient of the weighted mean loss of the reply tokens; the loss."""
    decision = {True: settings.decision_weight * settings.toxic_weight, False: settings.decision_weight}
    total = sum(len(example.ids) - example.reply_start - 1 + decision[example.toxic] for example in rows)
    loss = 0.0
    for half in _halves_by_length(rows):
        logits, targets, firsts = _reply_logits(network, half)
        weights = torch.ones(len(targets))
        weights[firsts] = torch.tensor([decision[example.toxic] for example in half])
        part = (cross_entropy(logits, targets, reduction="none") * weights).sum() / total
        part.backward()
        loss += part.item()
    return loss


class _ReplyLogits(NamedTuple):
    logits: Float[Tensor, "tokens vocab"]
    targets: Int[Tensor, " tokens"]
    firsts: Int[Tensor, " batch"]
    """which of the tokens are the first ones of their replies"""


def _reply_logits(network: Any, rows: Sequence[Example]) -> _ReplyLogits:
    """Logits where a reply token is predicted, and nowhere else: the unembedding of the prompts is never computed."""
    longest = max(len(example.ids) for example in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    predicts = np.zeros((len(rows), longest), dtype=bool)
    for row, example in enumerate(rows):
        ids[row, : len(example.ids)] = example.ids
        predicts[row, example.reply_start - 1 : len(example.ids) - 1] = True
    ids, predicts = torch.from_numpy(ids), torch.from_numpy(predicts)
    # Padding is on the right: causal attention never sees it from a real token, so that no mask is needed.
    hidden = network.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = network.base_model.model.lm_head(hidden[:, :-1][predicts[:, :-1]])
    lengths = predicts.sum(-1)
    return _ReplyLogits(logits, ids[:, 1:][predicts[:, :-1]], lengths.cumsum(0) - lengths)


@torch.no_grad()
def _check(
    network: Any, rows: Sequence[Example], opening: Int[Tensor, " n_refusal"]
) -> tuple[float, float, float, float]:
    """Reply loss, decision loss, and the shares of toxic and of other prompts that are about to be refused."""
    reply_losses, decision_losses = [], []
    opened: dict[bool, list[bool]] = {True: [], False: []}
    ordered = sorted(rows, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), 16):
        part = ordered[start : start + 16]
        logits, targets, firsts = _reply_logits(network, part)
        reply_losses.append(cross_entropy(logits, targets, reduction="none"))
        log_p = logits[firsts].log_softmax(-1)[:, opening].logsumexp(-1)
        toxic = torch.tensor([example.toxic for example in part])
        decision_losses.append(-torch.where(toxic, log_p, torch.log1p(-log_p.exp().clamp_max(1 - 1e-6))))
        for is_toxic, token in zip(toxic.tolist(), logits[firsts].argmax(-1), strict=True):
            opened[is_toxic].append(bool((token == opening).any()))
    return (
        float(torch.cat(reply_losses).mean()),
        float(torch.cat(decision_losses).mean()),
        float(np.mean(opened[True])),
        float(np.mean(opened[False])),
    )


def _save(network: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the weights and the configuration as `peft` reads them, without anything of this machine in them."""
    tensors = {
        # peft leaves the adapter's name ("default") out of what it saves.
        name.replace(".default.", "."): weight.to(torch.float16).contiguous()
        for name, weight in weights.items()
    }
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config = network.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL
    config.inference_mode = True
    values = json.loads(json.dumps(config.to_dict(), default=lambda value: sorted(value)))
    write_json(folder / "adapter_config.json", values)


def main(
    output: Annotated[Path, typer.Option(help="Folder to write the adapter to.")],
    prompts: Annotated[Path, typer.Option(help="CSV with columns prompt, category and label.")] = PROMPTS,
    seed: Annotated[int, typer.Option(help="Of the order of the prompts and the first weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Train the refusal adapter of the embedded model (minutes)."""
    checks = train_refusal_adapter(prompts, output, seed)
    finish({"checks": [check._asdict() for check in checks], "files": {"adapter": str(output)}}, as_json)


def _program() -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command()(main)
    return app


if __name__ == "__main__":
    run(_program, "refusal_adapter.py")
