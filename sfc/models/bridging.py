"""Put a model into TransformerLens' bridge, and see that it still computes what it did.

The bridge replaces modules of a Hugging Face model by its own, of which some compute anew what the replaced one did.
So the plain model runs two short prompts before anything of it is replaced; afterwards the bridged one runs them in
every way in which models are run here, and must agree. A bug of any bridge, or a family that cannot be run in one of
these ways, is an error when the model is loaded instead of a wrong number later.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sfc.core.config import ModelConfig
from sfc.core.errors import CannotLoadModel, one_line
from sfc.core.sites import StoredKind, layer_of, site_of
from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import NO_POSITION, Batch, TemplateLayout, cache_suffixes, flush_right, pad
from sfc.models.generation import continue_tails
from sfc.models.interventions import recorder
from sfc.models.linear import use_quick_products
from sfc.models.model import Model, not_finite
from sfc.models.running import cached_residual_after, last_logits, layer_before, logits_at

_TEXTS = {"The capital of France is a large city on the banks of a river, known for its": 16, "Two and two make four": 9}
"""and how many tokens of each, from the start again where there are fewer"""
_SUFFIX = 3
"""tokens that are run on top of cached keys and values"""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""difference from the plain model's logits, as a share of the largest, that rounding may make"""


def bridged(hf: Any, tokenizer: Any, config: ModelConfig) -> Model:
    """A model with hooks. The Hugging Face model is changed in place, so that its weights are in memory once.

    Raises:
        CannotLoadModel: TransformerLens' bridge does not know the architecture, cannot run it, or computes something
            else than the plain model.
        UserError: logits are not finite.
    """
    architecture, source = type(hf).__name__, config.source
    prompts = _short_prompts(tokenizer)
    plain = _plain_logits(hf, prompts, source)
    use_quick_products(hf)
    try:
        bridge = build_bridge_from_module(hf, architecture, hf_config=hf.config, dtype=hf.dtype)
        # Last, because the bridge adds a bias to an unembedding that has none.
        bridge.original_model.requires_grad_(False).eval()
        model = Model(bridge, tokenizer, config)
        batch = pad(prompts, TemplateLayout.of(prompts), model.device)
        differences = {way: _difference(ours, own) for way, ours, own in _bridged_logits(model, prompts, batch, plain)}
        model.unusable.update(_unusable_sites(model, batch))
    except Exception as error:  # whatever the bridge's many adapters and the wrapped modules raise
        raise CannotLoadModel(
            f"TransformerLens' bridge cannot run {architecture}, the architecture of {source!r} ({one_line(error)});"
            " docs/models.md lists those that work"
        ) from error
    allowed = _TOLERANCE[hf.dtype]
    for way, difference in differences.items():
        if not difference <= allowed:  # also where it is not a number
            raise CannotLoadModel(
                f"TransformerLens' bridge computes something else than {architecture} itself ({source!r}): logits {way}"
                f" are off by {difference:.2%} of the largest, where rounding in {config.dtype} explains {allowed:.1%};"
                " docs/models.md lists the architectures that work"
            )
    return model


def _short_prompts(tokenizer: Any) -> list[TokenizedPrompt]:
    """Two short texts of different lengths, all content."""
    prompts = []
    for text, length in _TEXTS.items():
        ids = np.resize(np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64), length)
        prompts.append(TokenizedPrompt(ids, np.full(length, Role.CONTENT)))
    return prompts


@torch.no_grad()
def _plain_logits(hf: Any, prompts: Sequence[TokenizedPrompt], source: str) -> list[Float[Tensor, "pos vocab"]]:
    """The model's own logits, prompt by prompt, without padding, mask or cache.

    Raises:
        CannotLoadModel: the model cannot be run.
        UserError: they are not finite.
    """
    ids = [torch.tensor(prompt.ids, device=hf.device)[None] for prompt in prompts]
    try:
        plain = [hf(input_ids=row, use_cache=False).logits[0].float() for row in ids]
    except Exception as error:  # of foreign code and files
        raise CannotLoadModel(
            f"{type(hf).__name__}, the model of {source!r}, cannot be run ({one_line(error)})"
        ) from error
    if not all(bool(logits.isfinite().all()) for logits in plain):
        raise not_finite(f"the logits of {source!r}", hf.dtype)
    return plain


@torch.no_grad()
def _bridged_logits(
    model: Model, prompts: Sequence[TokenizedPrompt], batch: Batch, plain: Sequence[Float[Tensor, "pos vocab"]]
) -> Iterator[tuple[str, Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"]]]:
    """Ways of running the model: what each is called, its logits, and the plain model's at the same places."""
    all_of_it, last = torch.cat(list(plain)), torch.stack([logits[-1] for logits in plain])
    everywhere = batch.template_positions != NO_POSITION
    yield "of a batch padded on the right", logits_at(model, batch, everywhere), all_of_it

    # The last token is given as if the model had said it, so that it comes by a step of generation.
    begun = [TokenizedPrompt(prompt.ids[:-1], prompt.roles[:-1]) for prompt in prompts]
    said = torch.tensor([prompt.ids[-1] for prompt in prompts], device=model.device)
    seen: list[Tensor] = []

    def choose(logits: Tensor, rows: Tensor, _step: int) -> Tensor:
        seen.append(logits)
        return said[rows]

    continue_tails(model, flush_right(pad(begun, TemplateLayout.of(begun), model.device)), 2, choose=choose)
    yield "of a batch padded on the left", seen[0], torch.stack([logits[-2] for logits in plain])
    yield "of a cached step of generation", seen[1], last

    yield "of a suffix after cached keys and values", last_logits(model, cache_suffixes(model, prompts, _SUFFIX)), last
    for layer in sorted({0, model.n_layers // 2}):
        cached = cached_residual_after(model, batch, layer)
        yield "of a run from a cached residual stream", last_logits(model, batch, cached=cached), last


def _difference(ours: Float[Tensor, "rows vocab"], plain: Float[Tensor, "rows vocab"]) -> float:
    """The largest difference of logits, as a share of the largest of the plain ones, their mean being 0."""
    largest = (plain - plain.mean(-1, keepdim=True)).abs().max()
    return float((ours - plain).abs().max() / largest.clamp_min(torch.finfo(torch.float32).tiny))


@torch.no_grad()
def _unusable_sites(model: Model, batch: Batch) -> dict[str, str]:
    """The sites whose hook never fires, has another shape than is promised, or changes nothing when it is changed.

    The last is tried at the last layer, for all sites of its kind.
    """
    sites = {
        site_of(kind, layer): kind
        for kind in get_args(StoredKind)
        for layer in range(model.n_layers)
        if site_of(kind, layer) in model.hooks
    }
    seen: dict[str, Tensor] = {}
    plain = last_logits(model, batch, {site: recorder(seen, site) for site in sites})
    unusable, without_effect = {}, set()
    for site, kind in reversed(sites.items()):
        if site not in seen:
            unusable[site] = "nothing passes its hook"
            continue
        found = tuple(seen[site].shape)
        if found[:2] != batch.ids.shape or math.prod(found[2:]) != model.width(site):
            unusable[site] = f"its activations are {list(found)}, not [batch, pos, {model.width(site)}]"
        elif layer_of(site) == model.n_layers - 1:
            start = cached_residual_after(model, batch, layer_before(site))
            if torch.equal(last_logits(model, batch, {site: lambda x: x.roll(1, -1)}, start), plain):
                without_effect.add(kind)
        if kind in without_effect:
            unusable.setdefault(site, "a change of its activations changes nothing")
    return unusable
