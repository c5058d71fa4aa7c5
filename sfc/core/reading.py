"""Files that a user gives, read as text: ordinary ones in UTF-8 that fit into memory, and nothing that hangs or grows.

A named pipe would wait for ever, a device would never end, and a YAML file of ten lines can describe more objects, by
aliases of aliases, than any machine holds. No torch here.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from sfc.core.contents import BYTES_PER_BYTE, hash_of, opened, read_bytes
from sfc.core.errors import UserError
from sfc.core.machine import check_memory


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; line breaks are as they are in the file.

    Raises:
        UserError: the file is missing, is not an ordinary one, cannot be read, is too large, or is not UTF-8.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 (line {line}: byte 0x{data[error.start]:02x}): save it again with the encoding UTF-8"
        ) from None


def hash_of_given(path: Path, bytes_per_byte: int = BYTES_PER_BYTE) -> str:
    """SHA-256 of the bytes of a file that a user gives, in hexadecimal.

    Args:
        bytes_per_byte: what will be taken in memory for each byte of the file.

    Raises:
        UserError: the file is missing, is not an ordinary one, cannot be read, or is too large.
    """
    with opened(path) as file:
        check_memory(bytes_per_byte * os.fstat(file.fileno()).st_size, f"reading {path}", "give a smaller file")
        return hash_of(file)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: as `read_text`, or the file is not YAML, or has anchors and aliases.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value that a text means in YAML.

    Raises:
        UserError: it is not YAML, names a key twice, or has aliases; the message begins with `where`.
    """
    try:
        return yaml.load(text, _Loader)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    except Exception as error:  # the constructors of single values raise whatever Python's own do
        what = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{where} is not valid YAML: {what[:300]}") from None


class _Loader(yaml.SafeLoader):
    """Plain values only, each key once, and no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise UserError(f" line {line} has an alias (*name), which is not allowed: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), names[0])
            raise UserError(f" line {node.start_mark.line + 1}: the key {twice!r} stands there twice")
        return mapping
