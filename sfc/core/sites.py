"""Names of sites: TransformerLens hook points, such as `blocks.21.hook_resid_post`."""

import re
from collections.abc import Iterable
from typing import Literal, cast, get_args

from sfc.core.errors import UserError, is_count

SiteKind = Literal["resid_pre", "hook_z", "attn_out", "resid_mid", "mlp_out", "resid_post"]
"""Where dictionaries read and write, in the order in which a block passes them; `hook_z` is the heads' outputs, before
W_O, side by side."""
InputKind = Literal["ln2_normalized", "mlp_in"]
"""What an MLP reads on its way from `resid_mid`, where transcoders read and nothing is written: divided by its norm,
before the norm's gain and bias, and as it enters the MLP."""
MLP_INPUTS = ("resid_mid", *get_args(InputKind))
"""kinds through which everything passes that an MLP hears"""

WHOLE_STREAM = ("resid_pre", "resid_post")
"""kinds through which everything passes that reaches later ones; other sites can be bypassed"""

_PATHS = {"hook_z": "attn.hook_z", "ln2_normalized": "ln2.hook_normalized", "mlp_in": "mlp.hook_in"}
"""hook points of a block whose names are not `hook_` and the kind"""
_KINDS = {path: kind for kind, path in _PATHS.items()}
_SITE = re.compile(r"blocks\.(\d{1,9})\.(?:hook_(\w+)|(" + "|".join(map(re.escape, _KINDS)) + "))")
_ORDER = ("resid_pre", "hook_z", "attn_out", "resid_mid", *get_args(InputKind), "mlp_out", "resid_post")


def site_of(kind: SiteKind | InputKind, layer: int) -> str:
    """The hook point of a kind at a layer."""
    return f"blocks.{layer}.{_PATHS.get(kind, f'hook_{kind}')}"


def kind_of(site: str) -> str:
    """The kind of a site, such as `resid_post`."""
    return _parse(site)[1]


def layer_of(site: str) -> int:
    """The layer of a site."""
    return _parse(site)[0]


def short_site(site: str) -> str:
    """`blocks.21.hook_resid_post` as it stands in node names: `resid_post.21`."""
    layer, kind = _parse(site)
    return f"{kind}.{layer}"


def site_from_short(name: str) -> str:
    """The site that `short_site` gives this name.

    Raises:
        UserError: there is no such site.
    """
    kind, _, layer = name.rpartition(".")
    if kind not in _ORDER or not is_count(layer):
        raise UserError(f"{name!r} is not a site: write for example 'resid_post.21' ({', '.join(_ORDER)})")
    return site_of(cast(SiteKind | InputKind, kind), int(layer))


_IN_LAYER = {
    "": "resid_post",
    "mlp": "mlp_out",
    "post_feedforward_layernorm": "mlp_out",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attn.o_proj.input": "hook_z",
}
"""the site of what a module of a transformers layer puts out, by its name there"""
_MODULE = re.compile(r"(?:[\w.]+\.)?(?:layers|h)\.(\d{1,9})\.?([\w.]*)")


def site_named(name: str) -> str:
    """The site that a name from elsewhere means, such as `model.layers.12` or `layers.12.mlp`; itself where none is."""
    if short := re.fullmatch(r"blocks\.(\d{1,9})\.hook_z", name):
        return site_of("hook_z", int(short[1]))
    match = _MODULE.fullmatch(name)
    kind = match and _IN_LAYER.get(match[2].removesuffix("output").removesuffix("."))
    return site_of(cast(SiteKind, kind), int(match[1])) if match and kind else name


def in_order(sites: Iterable[str]) -> list[str]:
    """The sites in the order in which a model passes them, each once."""
    return sorted(set(sites), key=lambda site: (layer_of(site), _ORDER.index(kind_of(site))))


def _parse(site: str) -> tuple[int, str]:
    match = _SITE.fullmatch(site)
    kind = match and (match[2] or _KINDS[match[3]])
    # `hook_hook_z` and the like are none.
    if match is None or kind not in _ORDER or (match[2] and kind in _PATHS):
        raise UserError(f"{site!r} is not a site: expected for example 'blocks.21.hook_resid_post'")
    return int(match[1]), str(kind)
