"""Fill a store: run prompts up to the last wanted site and keep what passes the sites.

The plan of batches and shards follows from the prompts alone, so that a run that was interrupted goes on with the
first batch that is missing. Shards are dealt out to the processes there are. A thread beside the model's converts and
writes.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from sfc.core.config import ActivationsConfig
from sfc.core.errors import UserError
from sfc.core.ranks import dealt, is_leader, wait_for_all
from sfc.core.sites import in_order
from sfc.data.render import TokenizedPrompt
from sfc.models.loading import Model
from sfc.models.running import activations_at
from sfc.saes.plan import PlannedBatch, plan_batches, plan_shards
from sfc.saes.shard import finished_sites
from sfc.saes.unfinished import discard_unfinished, unfinished_shard

_BATCHES_IN_FLIGHT = 2


def collect(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    sites: Sequence[str],
    config: ActivationsConfig,
    folder: Path,
    progress: Callable[[int], None],
) -> int:
    """Write the activations of all prompts at the sites to shards in `folder`.

    Shards that have the sites are kept; those that lack some are run again for these alone and keep the others.

    Args:
        progress: called with the number of tokens run since the last call, padding not counted; those of shards that
            were given to another process count when they are passed over.

    Returns:
        The number of rows in the store.

    Raises:
        UserError: the model lacks a site, its activations are too large for `config.dtype`, or the disk is full.
    """
    model.check_sites(sites)
    if is_leader():
        for left_over in folder.glob(".shard-*"):  # temporary files of a process that was killed
            left_over.unlink()
    wait_for_all()
    batches = plan_batches(prompts, config, model.device)
    for number, (shard, is_own) in enumerate(dealt(plan_shards(batches, config.shard_tokens))):
        if is_own:
            _collect_shard(model, shard, sites, config, folder / f"shard-{number:05d}.h5", progress)
        else:
            progress(sum(batch.n_tokens for batch in shard))
    wait_for_all()
    return sum(batch.n_rows for batch in batches)


@torch.no_grad()
def activations_of(model: Model, planned: PlannedBatch, sites: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Run one batch; the activations [rows, d] of its planned rows at each site, on the model's device."""
    seen = activations_at(model, planned.batch, in_order(list(sites)))
    row_of = {int(prompt): row for row, prompt in enumerate(planned.batch.prompts)}
    rows = torch.tensor([row_of[int(prompt)] for prompt in planned.tokens.prompt], device=model.device)
    positions = torch.from_numpy(planned.tokens.position).to(model.device)
    return {site: rearrange(seen[site][rows, positions], "rows ... -> rows (...)").to(dtype) for site in sites}


def _collect_shard(
    model: Model,
    batches: Sequence[PlannedBatch],
    sites: Sequence[str],
    config: ActivationsConfig,
    path: Path,
    progress: Callable[[int], None],
) -> None:
    finished = finished_sites(path)
    missing = [site for site in sites if site not in finished]
    if not missing:
        discard_unfinished(path)
        progress(sum(batch.n_tokens for batch in batches))
        return
    widths = {site: model.width(site) for site in in_order([*finished, *missing])}
    dtype = getattr(torch, config.dtype)
    with unfinished_shard(path, batches, widths, dtype) as shard:
        with ThreadPoolExecutor(1) as writer:
            pending: deque[Future[None]] = deque()
            for number, batch in enumerate(batches):
                if number not in shard.done:
                    activations = activations_of(model, batch, missing, dtype)
                    pending.append(writer.submit(_write, shard.write, number, activations, config.dtype))
                if len(pending) == _BATCHES_IN_FLIGHT:
                    pending.popleft().result()
                progress(batch.n_tokens)
            while pending:
                pending.popleft().result()
        shard.finish(config.gzip)


def _write(write: Callable, number: int, activations: dict[str, Tensor], dtype: str) -> None:
    """What the writing thread does with a batch: to the CPU, check, write."""
    on_cpu = {site: values.cpu() for site, values in activations.items()}
    for site, values in on_cpu.items():
        if not values.isfinite().all():
            raise UserError(
                f"activations at {site} are not finite in {dtype}: --set activations.dtype=bfloat16 or float32"
            )
    write(number, on_cpu)
