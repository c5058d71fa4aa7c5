"""Training one SAE per site.

Started by `torchrun`, the sites are dealt out to the processes; the first one collects first.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from sfc.core.artifacts import fingerprint
from sfc.core.progress import Show, progress_beside_table, say
from sfc.core.ranks import is_leader, leader_first, own_share, wait_for_all
from sfc.models.loading import choose_device
from sfc.run import Run
from sfc.saes.architectures import CONFIG_FILE
from sfc.saes.checkpoint import steps_done
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.format import save_dictionary
from sfc.saes.logs import Log, json_lines, loggers
from sfc.saes.stream import shuffled_batches
from sfc.saes.train import Progress, train_saes
from sfc.session import Session
from sfc.studies.train.foreign import adopt_dictionaries
from sfc.studies.train.rows import TrainingRows, training_rows

_TITLES = ("site", "loss", "variance explained", "L0", "dead", "rows/s")


def train_dictionaries(session: Session, folder: Path, logger_names: Sequence[str] = ()) -> TrainingRows:
    """Train what the folder lacks, group by group of sites, or take what `saes.source` names.

    Returns:
        The rows that they were trained on, and those that were kept from training.

    Raises:
        UserError: the store is damaged or too small, training diverges, a dictionary of others does not fit, or a
            logger is not installed.
    """
    run, experiment = session.run, session.run.experiment
    with leader_first():
        rows = training_rows(session)
    source = experiment.saes.source
    if source is None:
        say(
            f"training {len(experiment.activations.sites)} SAEs on {rows.trained.sum():,} rows into {folder}; other"
            " commands use them with the same settings of saes and corpus"
        )
        _train_missing(run, rows, folder, loggers(logger_names, folder, experiment.model_dump(mode="json")))
    elif is_leader():
        say(f"checking {source} on {(~rows.trained).sum():,} held-out rows, into {folder}")
        adopt_dictionaries(run, source, folder, rows.held_out)
    wait_for_all()
    return rows


def _train_missing(run: Run, rows: TrainingRows, folder: Path, logs: Sequence[Log]) -> None:
    """Train and save the dictionaries of this process's share that the folder lacks, `layers_at_once` at a time."""
    config = run.experiment.saes
    share = own_share(run.experiment.activations.sites)
    missing = [site for site in share if not (folder / site / CONFIG_FILE).is_file()]
    groups = [missing[i : i + config.layers_at_once] for i in range(0, len(missing), config.layers_at_once)]
    with progress_beside_table("training", len(missing) * config.steps, "SAE steps") as (advance, show):
        for group in groups:
            checkpoint = folder / f"checkpoint-{fingerprint({'sites': group})}.safetensors"
            first = steps_done(checkpoint)
            advance(first * len(group))
            log_lines = json_lines(folder, group, first)
            report = _reporting(advance, show, [log_lines, *logs], first)
            for dictionary in _train_group(run, rows, group, checkpoint, report):
                save_dictionary(dictionary, folder / dictionary.site, _metadata(run))
            checkpoint.unlink(missing_ok=True)


def _train_group(
    run: Run, rows: TrainingRows, sites: list[str], checkpoint: Path, report: Callable[[Progress], None]
) -> list[TopKDictionary]:
    config, seed, trained = run.experiment.saes, run.experiment.sae_seed, rows.trained
    source = rows.source(sites)
    n_sample = min(config.buffer_rows, int(trained.sum()))
    sample = next(shuffled_batches(source, trained, n_sample, seed, n_sample))
    return train_saes(
        lambda first: shuffled_batches(source, trained, config.batch_size, seed, config.buffer_rows, first),
        sample,
        config,
        sites=sites,
        seed=seed,
        device=choose_device(run.device),
        checkpoint=checkpoint,
        report=report,
    )


def _reporting(
    advance: Callable[[int], None], show: Show, logs: Sequence[Log], first: int
) -> Callable[[Progress], None]:
    """What is done with each report of a training that had done `first` steps when it began."""
    done = first

    def report(progress: Progress) -> None:
        nonlocal done
        advance((progress.step - done) * len(progress.sites))
        done = progress.step
        speed = f"{progress.tokens_per_second:,.0f}"
        cells = [
            (s.site, f"{s.loss:.4f}", f"{1 - s.fvu:.4f}", f"{s.l0:.1f}", str(s.dead), speed) for s in progress.sites
        ]
        show(_TITLES, cells)
        for log in logs:
            log(progress)

    return report


def _metadata(run: Run) -> dict[str, str]:
    return {"preset": run.experiment.name, "model": run.experiment.model.source, "sfc_corpus": run.corpus.fingerprint}
