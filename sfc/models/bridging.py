"""Put a model into TransformerLens' bridge, and see that it still computes what it did.

The bridge replaces modules of a Hugging Face model by its own, of which some compute anew what the replaced one did.
So the plain model runs two short prompts before anything of it is replaced; afterwards the bridged one runs them in
every way in which models are run here, and must agree. A bug of any bridge, or a family that cannot be run in one of
these ways, is an error when the model is loaded instead of a wrong number later.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sfc.core.config import ModelConfig
from sfc.core.errors import CannotLoadModel, one_line
from sfc.core.sites import SiteKind, layer_of, site_of
from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import NO_POSITION, Batch, TemplateLayout, cache_suffixes, flush_right, pad
from sfc.models.generation import continue_tails
from sfc.models.interventions import recorder
from sfc.models.linear import use_quick_products
from sfc.models.model import Model, is_finite, n_positions, not_finite
from sfc.models.running import cached_residual_after, last_logits, logits_at

_TEXTS = {
    "The capital of France is a large city on the banks of a river, known for its": 16,
    "Two and two make four": 9,
}
"""and how many tokens of each, from the start again where there are fewer"""
_THOSE_THAT_WORK = "docs/models.md lists the architectures that work"
_SUFFIX = 3
"""tokens that are run on top of cached keys and values"""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""difference from the plain model's logits, as a share of the largest, that rounding may make"""


@torch.no_grad()
def bridged(hf: Any, tokenizer: Any, config: ModelConfig) -> Model:
    """A model with hooks. The Hugging Face model is changed in place, so that its weights are in memory once.

    Raises:
        CannotLoadModel: TransformerLens' bridge does not know the architecture, cannot run it, or computes something
            else than the plain model.
        UserError: logits are not finite.
    """
    architecture, source = type(hf).__name__, config.source
    prompts = _short_prompts(tokenizer, n_positions(hf.config))
    plain = _plain_logits(hf, prompts, source)
    use_quick_products(hf)
    with _refusing(f"TransformerLens' bridge does not fit {architecture}, the architecture of {source!r}"):
        bridge = build_bridge_from_module(hf, architecture, hf_config=hf.config, dtype=hf.dtype)
    # Last, because the bridge adds a bias to an unembedding that has none.
    bridge.original_model.requires_grad_(False).eval()
    model = Model(bridge, tokenizer, config)
    batch = pad(prompts, TemplateLayout.of(prompts), model.device)
    for way, (run, own) in _ways(model, prompts, batch, plain).items():
        with _refusing(f"TransformerLens' bridge cannot run {architecture}, the architecture of {source!r}, {way}"):
            ours = run()
        _check_difference(model, way, _difference(ours, own))
    with _refusing(f"TransformerLens' bridge has no sites that can be used in {architecture}"):
        model.unusable.update(_unusable_sites(model, batch))
    return model


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Make a `CannotLoadModel` of whatever the bridge's many adapters and the modules in them raise."""
    try:
        yield
    except Exception as error:
        raise CannotLoadModel(f"{what} ({one_line(error)}); {_THOSE_THAT_WORK}") from error


def _check_difference(model: Model, way: str, difference: float) -> None:
    """Raise an error if the difference of logits is more than rounding explains."""
    allowed, dtype = _TOLERANCE[model.dtype], model.config.dtype
    if not difference <= allowed:  # also where it is not a number
        raise CannotLoadModel(
            f"TransformerLens' bridge computes something else than {model.architecture} itself"
            f" ({model.config.source!r}): {way}, its logits are off by {difference:.2%} of the largest, where rounding"
            f" in {dtype} explains {allowed:.1%}; {_THOSE_THAT_WORK}"
        )


def _short_prompts(tokenizer: Any, positions: int | None) -> list[TokenizedPrompt]:
    """Two short texts, all content, of different lengths where the model has positions for them."""
    prompts = []
    for text, wanted in _TEXTS.items():
        length = min(wanted, positions or wanted)
        ids = np.resize(np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64), length)
        prompts.append(TokenizedPrompt(ids, np.full(length, Role.CONTENT)))
    return prompts


def _plain_logits(hf: Any, prompts: Sequence[TokenizedPrompt], source: str) -> list[Float[Tensor, "pos vocab"]]:
    """The model's own logits, prompt by prompt, without padding, mask or cache.

    Raises:
        CannotLoadModel: the model cannot be run.
        UserError: they are not finite.
    """
    ids = [torch.tensor(prompt.ids, device=hf.device)[None] for prompt in prompts]
    with _refusing(f"{type(hf).__name__}, the model of {source!r}, cannot be run"):
        plain = [hf(input_ids=row, use_cache=False).logits[0].float() for row in ids]
    if not all(bool(is_finite(logits)) for logits in plain):
        raise not_finite(f"the logits of {source!r}", hf.dtype)
    return plain


def _ways(
    model: Model, prompts: Sequence[TokenizedPrompt], batch: Batch, plain: Sequence[Float[Tensor, "pos vocab"]]
) -> dict[str, tuple[Callable[[], Float[Tensor, "rows vocab"]], Float[Tensor, "rows vocab"]]]:
    """Every way in which models are run here: what gives its logits, and the plain model's at the same places."""
    everywhere, last = torch.cat(list(plain)), torch.stack([logits[-1] for logits in plain])
    half = model.n_layers // 2
    return {
        "padded on the right": (lambda: logits_at(model, batch, batch.template_positions != NO_POSITION), everywhere),
        "padded on the left": (lambda: last_logits(model, flush_right(batch)), last),
        "with a cached step of generation": (lambda: _after_a_step(model, prompts), last),
        "with a suffix after cached keys and values": (
            lambda: last_logits(model, cache_suffixes(model, prompts, _SUFFIX)),
            last,
        ),
        "from a cached residual stream": (
            lambda: last_logits(model, batch, cached=cached_residual_after(model, batch, half)),
            last,
        ),
    }


def _after_a_step(model: Model, prompts: Sequence[TokenizedPrompt]) -> Float[Tensor, "rows vocab"]:
    """Logits after the prompts' last tokens, which are given as if the model had generated them."""
    begun = [TokenizedPrompt(prompt.ids[:-1], prompt.roles[:-1]) for prompt in prompts]
    said = torch.tensor([prompt.ids[-1] for prompt in prompts], device=model.device)
    seen: list[Tensor] = []

    def choose(logits: Tensor, rows: Tensor, _step: int) -> Tensor:
        seen.append(logits)
        return said[rows]

    continue_tails(model, flush_right(pad(begun, TemplateLayout.of(begun), model.device)), 2, choose=choose)
    return seen[-1]


def _difference(ours: Float[Tensor, "rows vocab"], plain: Float[Tensor, "rows vocab"]) -> float:
    """The largest difference of logits, as a share of the largest of the plain ones, their mean being 0.

    The share is of at least 1 nat: of a model that says nothing about these texts, rounding is all there is.
    """
    largest = (plain - plain.mean(-1, keepdim=True)).abs().max()
    return float((ours - plain).abs().max() / largest.clamp_min(1.0))


def _changed(x: Tensor) -> Tensor:
    """Something else, whatever it was: neither zeros nor a constant that a norm takes away."""
    return x.roll(1, -1) + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)


def _unusable_sites(model: Model, batch: Batch) -> dict[str, str]:
    """The sites whose hook never fires, has another shape than is promised, or changes nothing when it is changed.

    The last is tried at the last layer, for all sites of its kind.
    """
    sites = {
        site_of(kind, layer): kind
        for kind in get_args(SiteKind)
        for layer in range(model.n_layers)
        if site_of(kind, layer) in model.hooks
    }
    seen: dict[str, Tensor] = {}
    plain = last_logits(model, batch, {site: recorder(seen, site) for site in sites})
    start = cached_residual_after(model, batch, model.n_layers - 2)
    unusable, without_effect = {}, set()
    for site, kind in reversed(sites.items()):
        if site not in seen:
            unusable[site] = "nothing passes its hook"
            continue
        found = tuple(seen[site].shape)
        if found[:2] != batch.ids.shape or math.prod(found[2:]) != model.width(site):
            unusable[site] = f"its activations are {list(found)}, not [batch, pos, {model.width(site)}]"
        elif layer_of(site) == model.n_layers - 1 and torch.equal(
            last_logits(model, batch, {site: _changed}, start), plain
        ):
            without_effect.add(kind)
        if kind in without_effect:
            unusable.setdefault(site, "a change of its activations changes nothing")
    return unusable
