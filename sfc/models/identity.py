"""What fingerprints say of a model: its configuration, and what its source and adapter hold. No torch here."""

from pathlib import Path
from typing import Any

from sfc.core.artifacts import hash_of_file
from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.models import embedded, tiny

ADAPTERS = Path(__file__).parent / "adapters"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """A JSON value that changes when the model that `config` names changes; the tokens of its score are no part of it.

    Of a model in a folder, the small files count by content and the weights by name, size and time.
    """
    identity: dict[str, Any] = {"config": config.model_dump(exclude={"refusal_tokens", "against_tokens"})}
    if config.source == "embedded":
        identity["source"] = embedded.identity()
    elif config.source == "tiny":
        identity["source"] = tiny.VERSION
    elif (folder := Path(config.source)).is_dir():
        identity["files"] = {name: hash_of_file(folder / name) for name in _SMALL_FILES if (folder / name).is_file()}
        identity["weights"] = [
            [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))
        ]
    if config.adapter:
        folder = adapter_folder(config.adapter)
        identity["adapter"] = [hash_of_file(folder / name) for name in (WEIGHTS, ADAPTER_CONFIG)]
    return identity


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
