"""What users give to commands, sound and damaged.

A damage is a function of the sound bytes that gives other bytes, or an act that leaves something else at the path.
"""

import json
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[bytes], bytes]

TOXIC, SAFE, HARD = (
    [f"{verb} the {noun} {number}{end}" for number, noun in enumerate(("lamp", "door", "road", "tree") * 3)]
    for verb, end in (("Burn", " now."), ("Mend", " now."), ("Burn", " toy."))
)
CATEGORIES = ("violence", "privacy")


def prompts_csv(prompts: list[str]) -> str:
    """An OR-Bench file: every prompt in every category, each text once."""
    rows = [f'"{prompt} {category[:4]}",{category}' for category in CATEGORIES for prompt in prompts]
    return "\n".join(["prompt,category", *rows]) + "\n"


PROMPTS = "prompt,category,label\n" + "".join(
    f'"{prompt} again",{CATEGORIES[number % 2]},{label}\n'
    for label, prompts in (("toxic", TOXIC[:6]), ("safe", SAFE[:6]), ("hard", HARD[:4]))
    for number, prompt in enumerate(prompts)
)
PAIRS = "category,toxic,safe\n" + "".join(
    f"{category},{toxic} {category[:4]}.,{safe} {category[:4]}.\n"
    for category in CATEGORIES
    for toxic, safe in zip(TOXIC[:6], SAFE[:6], strict=True)
)
ANSWERS = "".join(
    json.dumps(
        {"clean_prefix": f"The cat {word}", "patch_prefix": f"The cow {word}", "clean_answer": "a", "patch_answer": "b"}
    )
    + "\n"
    for word in ("sat", "ran", "hid", "ate", "won", "saw")
)  # fmt: skip
TOPICS = "category,topic\n" + "".join(f"{category},topic {n}\n" for category in CATEGORIES for n in range(2))
WRAPPERS = 'name,template,prefill\nplease,"Please: {prompt}",\nsure,"{prompt}","Sure,"\n'
TEXTS = "\n\n".join(f"Text number {n}: the lamp, the door, the road and the tree are all here." for n in range(60))
TEXTS_CSV = "text\n" + "".join(f'"{text}"\n' for text in TEXTS.split("\n\n"))
TEXTS_JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS.split("\n\n"))
CHATS_CSV = "prompt,reply\n" + "".join(f'"{text}","It is."\n' for text in TEXTS.split("\n\n"))
LIST_JSON = json.dumps({"nodes": [{"node": f"resid_post.{n}/F1", "effect": 2.0 - n} for n in (0, 1)]})
LIST_CSV = "node,effect\nresid_post.0/F1,2\nresid_post.1/F3,1\n"
TRACER = json.dumps(
    {
        "metadata": {"scan": None},
        "nodes": [
            {"node_id": f"{layer}_{n}_4", "feature_type": "cross layer transcoder", "influence": 0.1 * n}
            for layer in (0, 1) for n in (1, 2)
        ],
        "links": [{"source": "0_1_4", "target": "1_2_4", "weight": 0.3}],
    }
)  # fmt: skip
LABELS = json.dumps({})
PRESET = """\
name: small
description: as the preset tiny, and smaller
model:
  source: tiny
  refusal_tokens: ["I"]
prompts:
  max_tokens: 160
activations:
  layers: [0, 1]
  batch_tokens: 4096
saes:
  k: 4
  expansion: 2
  steps: 8
  batch_size: 64
learned_mask:
  steps: 3
discovery:
  checked_nodes: 4
evaluation:
  min_denominator: 1.0e-4
  sizes: [2, 8, 16]
  random_draws: 2
  replies: 2
  reply_tokens: 4
  null_draws: 0
"""
STUDY = "models:\n  - small.yaml\n  - preset: small.yaml\n    set: [name=other]\n"

_NOISE = random.Random(0).randbytes(400)


def _in_the_middle(text: bytes, inserted: bytes) -> bytes:
    """Something at the start of the last line of the first half: within a row, not between two."""
    place = text.find(b" ", len(text) // 2)
    return text[:place] + inserted + text[place:]


def _rows_of(data: bytes, cell: bytes) -> bytes:
    """The header, and rows of nothing but this."""
    header = data.partition(b"\n")[0]
    return b"\n".join([header, *[b",".join([cell] * len(header.split(b",")))] * 4, b""])


ANY: dict[str, Damage] = {
    "empty": lambda data: b"",
    "only-blanks": lambda data: b" \n\n\t \n",
    "truncated": lambda data: data[: len(data) // 2],
    "one-byte": lambda data: data[:1],
    "noise": lambda data: _NOISE,
    "png": lambda data: b"\x89PNG\r\n\x1a\n" + _NOISE,
    "zeros": lambda data: bytes(len(data)),
    "zero-inside": lambda data: _in_the_middle(data, b"\0"),
    "bom": lambda data: b"\xef\xbb\xbf" + data,
    "utf-16": lambda data: data.decode().encode("utf-16"),
    "latin-1": lambda data: _in_the_middle(data, b"caf\xe9"),
    "crlf": lambda data: data.replace(b"\n", b"\r\n"),
    "cr": lambda data: data.replace(b"\n", b"\r"),
    "escape-sequence": lambda data: _in_the_middle(data, b"\x1b[2J\x1b]0;title\x07"),
    "c1-control": lambda data: _in_the_middle(data, "\x9b31m\x85".encode()),
    "right-to-left": lambda data: _in_the_middle(data, "\u202eabc\u2066".encode()),
    "line-separator": lambda data: _in_the_middle(data, "a\u2028b\u2029c".encode()),
    "markup": lambda data: _in_the_middle(data, b"[red]<script>alert(1)</script>[/red]"),
    "emoji": lambda data: _in_the_middle(data, "👩‍👩‍👧‍👦 ﷽ Z̵̛".encode()),
    "noncharacter": lambda data: _in_the_middle(data, "\uffff\ufdd0\U0010ffff".encode()),
    "long-field": lambda data: _in_the_middle(data, b"x" * 300_000),
    "upper-half": lambda data: data.upper(),
    "twice": lambda data: data + data,
    "html": lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
}
TABLE: dict[str, Damage] = {
    "header-only": lambda data: data.partition(b"\n")[0] + b"\n",
    "no-header": lambda data: data.partition(b"\n")[2],
    "semicolons": lambda data: data.replace(b",", b";"),
    "tabs": lambda data: data.replace(b",", b"\t"),
    "ragged": lambda data: data + b"one field,and,far,too,many,of,them\n",
    "short-row": lambda data: data + b"alone\n",
    "open-quote": lambda data: data + b'"never closed,violence\n',
    "quote-inside": lambda data: _in_the_middle(data, b'"x"'),
    "blank-cells": lambda data: _rows_of(data, b""),
    "doubled-column": lambda data: data.replace(b"\n", b",again\n").replace(b",again", b"," + data.split(b",")[0], 1),
    "renamed-column": lambda data: b"q" + data,
    "one-row": lambda data: b"\n".join(data.split(b"\n")[:2]) + b"\n",
    "numbers": lambda data: _rows_of(data, b"1"),
    "formulas": lambda data: _in_the_middle(data, b"").replace(b"\n", b'\n=HYPERLINK("x")', 2),
    "many-columns": lambda data: b",".join(b"c%d" % n for n in range(20_000)) + b"\n",
    "nan-cells": lambda data: data.replace(b"violence", b"nan").replace(b"toxic", b"NaN"),
    "other-words": lambda data: data.replace(b"violence", b"cooking").replace(b"toxic", b"odd"),
}  # fmt: skip
LINES: dict[str, Damage] = {
    "null": lambda data: data + b'{"text": null, "prompt": null, "clean_prefix": null}\n',
    "number": lambda data: b"3\n" + data,
    "array": lambda data: data + b"[1, 2]\n",
    "deep": lambda data: b"[" * 100_000 + b"\n" + data,
    "deep-object": lambda data: b'{"text":' * 50_000 + b"\n",
    "nan": lambda data: data + b'{"text": NaN}\n',
    "surrogate": lambda data: data.replace(b"The", b"\\ud800", 1),
    "huge-number": lambda data: data + b'{"text": ' + b"9" * 6000 + b"}\n",
    "one-object": lambda data: json.dumps([json.loads(line) for line in data.splitlines()]).encode(),
    "empty-objects": lambda data: b"{}\n{}\n",
    "doubled-key": lambda data: data + b'{"text": "a", "text": "b"}\n',
    "extra-keys": lambda data: data.replace(b"{", b'{"__proto__": {}, "more": [1], ', 1),
    "comma": lambda data: data.replace(b"}\n", b"},\n"),
}
OBJECT: dict[str, Damage] = {
    "null": lambda data: b"null",
    "number": lambda data: b"3",
    "string": lambda data: b'"nodes"',
    "array": lambda data: b"[]",
    "empty-object": lambda data: b"{}",
    "deep": lambda data: b"[" * 100_000,
    "deep-closed": lambda data: b"[" * 900 + b"]" * 900,
    "nan": lambda data: data.replace(b"2.0", b"NaN").replace(b": 0", b": Infinity"),
    "huge-number": lambda data: data.replace(b"1", b"9" * 6000, 1),
    "surrogate": lambda data: data.replace(b"resid", b"\\ud800", 1),
    "null-nodes": lambda data: b'{"nodes": null, "edges": null, "directed": true}',
    "wrong-nodes": lambda data: b'{"nodes": [1, null, {"node": []}], "edges": [[1]]}',
    "no-such-feature": lambda data: data.replace(b"F1", b"F99999999999999999999").replace(b"0_1_4", b"0_99999999999_4"),
    "no-such-site": lambda data: data.replace(b"resid_post.0", b"resid_post.77").replace(b'"0_', b'"77_'),
    "escape-in-name": lambda data: data.replace(b"resid_post.0", b"\\u001b[2J\\u202e").replace(b'"0_', b'"\\u001b[2J_'),
    "trailing": lambda data: data + b"{}",
    "single-quotes": lambda data: data.replace(b'"', b"'"),
}
YAML: dict[str, Damage] = {
    "alias-bomb": lambda data: b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(12)
    ) + data,
    "alias": lambda data: b"first: &here 3\nsecond: *here\n" + data,
    "recursive-alias": lambda data: b"a: &a [*a]\n" + data,
    "merge-key": lambda data: b"a: &a {x: 1}\nb:\n  <<: *a\n" + data,
    "deep": lambda data: b"[" * 5_000,
    "deep-blocks": lambda data: b"".join(b" " * n + b"a:\n" for n in range(1500)),
    "python-object": lambda data: b"a: !!python/object/apply:os.system ['touch hacked']\n" + data,
    "unknown-tag": lambda data: b"a: !secret b\n" + data,
    "wrong-int": lambda data: b"a: !!int abc\n" + data,
    "wrong-date": lambda data: b"a: 2020-13-45\n" + data,
    "wrong-binary": lambda data: b"a: !!binary '*'\n" + data,
    "doubled-key": lambda data: data + b"\nname: other\nmodels: []\n",
    "list": lambda data: b"- a\n- b\n",
    "scalar": lambda data: b"just a sentence",
    "number-keys": lambda data: b"1: 2\n" + data,
    "null-key": lambda data: b"? \n: 2\n" + data,
    "list-key": lambda data: b"? [a]\n: 2\n" + data,
    "two-documents": lambda data: data + b"---\n" + data,
    "tabs": lambda data: data.replace(b"  ", b"\t"),
    "unknown-section": lambda data: data + b"\nmodell:\n  sourcee: x\n",
    "null-section": lambda data: data.replace(b"model:", b"model: null\nmodel2:"),
    "infinite": lambda data: data.replace(b"1.0e-4", b".inf"),
    "not-a-number": lambda data: data.replace(b"1.0e-4", b".nan"),
    "huge-number": lambda data: data.replace(b"4096", b"9" * 5000),
    "large-number": lambda data: data.replace(b"4096", b"1" + b"0" * 40),
    "negative": lambda data: data.replace(b"4096", b"-4096").replace(b"[0, 1]", b"[-1, 0]"),
    "surrogate": lambda data: data.replace(b'"I"', b'"\\ud800"'),
    "control": lambda data: data.replace(b'"I"', b'"\\x1b[2J"').replace(b"name: small", b'name: "\\x1b[2Jsmall"'),
    "names-a-path": lambda data: data.replace(b"name: small", b"name: ../../small"),
    "long-name": lambda data: data.replace(b"name: small", b"name: " + b"s" * 400),
    "zero-in-text": lambda data: data.replace(b'"I"', b'"I\\0"'),
}  # fmt: skip
WEIGHTS: dict[str, Damage] = {
    "long-header": lambda data: struct.pack("<Q", 2**62) + data[8:],
    "header-noise": lambda data: data[:8] + _NOISE[:50] + data[58:],
    "deep-header": lambda data: struct.pack("<Q", 40_000) + b"[" * 40_000,
    "no-tensors": lambda data: struct.pack("<Q", 2) + b"{}",
    "cut-tensor": lambda data: data[:-100],
    "other-shape": lambda data: data.replace(b'"shape":[64,32]', b'"shape":[32,64]'),
    "other-name": lambda data: data.replace(b"W_dec", b"W_xyz"),
    "nan": lambda data: data[: -4 * 40] + struct.pack("<40f", *[float("nan")] * 40),
    "pickle": lambda data: b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        before = Path.cwd()
        os.chdir(path.parent)  # the address of a socket has at most 108 bytes
        listening.bind(path.name)
        os.chdir(before)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


ACTS: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": _pipe,
    "socket": _socket,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "null-device": lambda path: path.symlink_to("/dev/null"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "terabyte": _sparse,
}
"""what can lie at a path instead of a file"""


def damages(*kinds: dict[str, Damage]) -> list[str]:
    """The names of all damages to a file of some kinds; see `put`."""
    return [name for kind in (ANY, *kinds) for name in kind] + list(ACTS)


def put(path: Path, sound: bytes, damage: str, *kinds: dict[str, Damage]) -> None:
    """Leave a damaged file, or what is in place of one, at a path."""
    path.unlink(missing_ok=True)
    if damage in ACTS:
        ACTS[damage](path)
    else:
        path.write_bytes({name: act for kind in (ANY, *kinds) for name, act in kind.items()}[damage](sound))
