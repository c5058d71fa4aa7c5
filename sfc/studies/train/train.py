"""Training one SAE per site, and measuring all of them.

Of several processes each trains a share of the sites, or of the rows of a site where there are more processes than
sites; they share the collection before it, and the first one measures. SAEs are measured on rows that were kept from
their training, and on what they are for: circuits.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.nodes import Nodes
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.circuits.problem import PromptRuns
from sfc.circuits.proof import pair_figures, pair_scores
from sfc.core.artifacts import fingerprint, json_records, write_csv
from sfc.core.errors import UserError
from sfc.core.machine import check_memory
from sfc.core.progress import Show, progress_bar, progress_beside_table, say
from sfc.core.ranks import Peers, is_leader, own_share, peers, wait_for_all
from sfc.data.render import Role, TokenizedPrompt, answered
from sfc.data.schema import keyed_numbers, keyed_ranks
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.loading import Model, choose_device, free_memory, load_outline
from sfc.models.score import Score
from sfc.run import Run
from sfc.saes.architectures import CONFIG_FILE
from sfc.saes.checkpoint import steps_done
from sfc.saes.dictionary import Dictionary, TopKDictionary
from sfc.saes.end_to_end import finetune
from sfc.saes.format import Dictionaries, load_dictionary, save_dictionary
from sfc.saes.logs import Log, json_lines, loggers
from sfc.saes.nulls import random_rotation
from sfc.saes.quality import ALL, match_features, quality_by_role
from sfc.saes.splice import CleanRuns, run_clean, splicing_quality
from sfc.saes.stream import shuffled_batches
from sfc.saes.train import Progress, train_saes
from sfc.session import Session
from sfc.studies.discover.problem import against_counterfactuals
from sfc.studies.train.probing import probing_quality
from sfc.studies.train.rows import TrainingRows, adopt_dictionaries, check_adopted, held_out_rows, training_rows

CHECKPOINT = "checkpoint-"
"""what the names of checkpoints begin with"""
UNTUNED = "untuned"
"""the folder of dictionaries that are to be fine-tuned"""
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
    source = experiment.saes.source
    if source is None:
        _check_memory(run)
    elif is_leader():
        adopt_dictionaries(run, source, folder)
    wait_for_all()
    rows = training_rows(session)
    if source is None:
        say(
            f"training {len(experiment.activations.sites)} SAEs on {rows.trained.sum():,} rows into {folder}; other"
            " commands use them with the same settings of saes and corpus"
        )
        untuned = folder / UNTUNED if experiment.saes.finetune_steps else folder
        logs = loggers(logger_names, folder, experiment.model_dump(mode="json"))
        _train_missing(run, rows, folder, untuned, logs)
        wait_for_all()
        if untuned != folder and is_leader():
            _finetune(session, rows, untuned, folder)
    elif is_leader():
        say(f"checking {source} on {(~rows.trained).sum():,} held-out rows, into {folder}")
        check_adopted(run, folder, rows)
    wait_for_all()
    return rows


def _check_memory(run: Run) -> None:
    """Refuse SAEs whose training could not fit into memory, before anything is collected for them.

    Counted are weights, gradients and Adam's two moments of the SAEs trained at once, and a batch's pre-activations.

    Raises:
        UserError: they would not fit.
    """
    config, sites, device = run.experiment.saes, run.experiment.activations.sites, choose_device(run.device)
    outline = load_outline(run.experiment.model)
    d_in = max(outline.width(site) for site in sites)
    at_once = min(config.layers_at_once, len(sites))
    wanted = 4 * config.expansion * d_in * (8 * d_in * at_once + config.batch_size)
    what = f"training {at_once} SAEs of {config.expansion * d_in:,} features at once"
    remedy = "lower saes.expansion, saes.layers_at_once or saes.batch_size"
    check_memory(wanted, what, remedy, free_memory(device))


def _train_missing(run: Run, rows: TrainingRows, folder: Path, saved_in: Path, logs: Sequence[Log]) -> None:
    """Train the dictionaries of this process's share that neither folder has, `layers_at_once` at a time."""
    config, all_sites = run.experiment.saes, run.experiment.activations.sites
    share = own_share(all_sites)
    together = peers(len(all_sites), "nccl" if choose_device(run.device).type == "cuda" else "gloo")
    # Groups are those of all sites: their checkpoints keep their names when some of the sites are done.
    groups = [share[i : i + config.layers_at_once] for i in range(0, len(share), config.layers_at_once)]
    done = {site for site in share if _has_all(folder, [site]) or _has_all(saved_in, [site])}
    missing = [[site for site in group if site not in done] for group in groups]
    with progress_beside_table("training", sum(map(len, missing)) * config.steps, "SAE steps") as (advance, show):
        for group, sites in zip(groups, missing, strict=True):
            checkpoint = folder / f"{CHECKPOINT}{fingerprint({'sites': group})}.safetensors"
            if sites:
                first = steps_done(checkpoint)
                advance(first * len(sites))
                own_logs = [json_lines(folder, sites, first), *logs] if together.number == 0 else []
                report = _reporting(advance, show, own_logs, first)
                trained = _train_group(run, rows, sites, checkpoint, report, together)
                for dictionary in trained if together.number == 0 else []:
                    save_dictionary(dictionary, saved_in / dictionary.site, _metadata(run))
            if together.number == 0:
                checkpoint.unlink(missing_ok=True)


def _has_all(folder: Path, sites: Sequence[str]) -> bool:
    return all((folder / site / CONFIG_FILE).is_file() for site in sites)


def _finetune(session: Session, rows: TrainingRows, untuned: Path, folder: Path) -> None:
    """Fine-tune the dictionaries of `untuned`, which is gone afterwards, into `folder`, unless they are there."""
    run, config, sites = session.run, session.run.experiment.saes, session.run.experiment.activations.sites
    checkpoint = folder / f"{CHECKPOINT}finetuning.safetensors"
    if not _has_all(folder, sites):
        loaded = Dictionaries(untuned, sites, session.model.device)
        trained = {site: each for site, each in loaded.items() if isinstance(each, TopKDictionary)}
        chats = _chats(session.model, rows)
        with progress_bar("fine-tuning", config.finetune_steps, "steps") as progress:
            tuned = finetune(
                session.model, chats, trained, config,
                seed=run.experiment.sae_seed, checkpoint=checkpoint, report=progress,
            )  # fmt: skip
        for dictionary in tuned:
            save_dictionary(dictionary, folder / dictionary.site, _metadata(run))
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(untuned, ignore_errors=True)


def _chats(model: Model, rows: TrainingRows) -> list[TokenizedPrompt]:
    """The chats that were trained on, with their replies: no held-out ones, and no texts without a template."""
    table, tokens = rows.table, rows.tokens
    in_template = np.isin(np.arange(len(table)), tokens.prompt[tokens.role == Role.SUFFIX])
    chosen = np.flatnonzero(table["trained"].to_numpy() & in_template)
    is_reply = tokens.role == Role.REPLY
    replies = pd.Series(tokens.token[is_reply]).groupby(tokens.prompt[is_reply]).agg(list)
    prompts = model.tokenize(table["prompt"].iloc[chosen].tolist())
    return [answered(prompt, replies.get(number, [])) for number, prompt in zip(chosen, prompts, strict=True)]


def _train_group(
    run: Run,
    rows: TrainingRows,
    sites: list[str],
    checkpoint: Path,
    report: Callable[[Progress], None],
    together: Peers,
) -> list[TopKDictionary]:
    config, seed = run.experiment.saes, run.experiment.sae_seed
    source, wanted = rows.source(sites), rows.weights(config.deciding_share)
    n_sample = min(config.start_rows, int(rows.trained.sum()))
    sample = next(shuffled_batches(source, wanted, n_sample, seed, n_sample))
    return train_saes(
        lambda first: shuffled_batches(source, wanted, config.batch_size, seed, config.buffer_rows, first),
        sample,
        config,
        sites=sites,
        seed=seed,
        device=choose_device(run.device),
        checkpoint=checkpoint,
        report=report,
        peers=together,
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


QUALITY_FILE, DENSITY_FILE = "quality.csv", "density.csv"
IN_SERIES = "in series"
"""the role in the row of `quality.csv` that is of all sites at once"""
SPLICED_PROMPTS = 32
RESTORED_PROMPTS = 64
_RESTORED = {
    f"{ours}{end}": f"{name}{end}"
    for ours, name in (("restored_toxic", "recovered_toxic"), ("restored_safe", "recovered_safe"), ("agreement",) * 2)
    for end in ("", "_low", "_high")
}
"""the columns of `quality.csv`, and what `pair_figures` calls them"""
_MATCHED = ("matched", "matched_chance")


def write_quality(session: Session, rows: TrainingRows, folder: Path) -> list[dict[str, Any]]:
    """Measure the run's dictionaries; write `quality.csv` and `density.csv`.

    `quality.csv` has a row for all held-out rows of each site and one for each role among them, deciding tokens by
    themselves; what splicing the dictionary in costs the model, what its features restore (see `restored`), what they
    tell of prompts (see `probing_quality`) and whether they came back (see `_matched`) are in the row of all. The last
    row, of role `IN_SERIES`, has what the features of all sites together restore. `density.csv` has a row for each
    feature of each site, with the share of rows in which it is active, a column each for all rows and each role.

    Returns:
        The rows of `quality.csv`; what is not measurable is None.
    """
    run, model, score, dictionaries = session.run, session.model, session.metric, session.dictionaries
    unseen = prompts_not_trained_on(run, rows)
    clean = _run_some(run, model, score, unseen["prompt"], list(dictionaries))
    figures, rates, of_features = [], {}, restored(session, dictionaries, unseen)
    told = probing_quality(session, dictionaries)
    with progress_bar("measuring", len(dictionaries), "SAEs") as progress:
        for site, dictionary in dictionaries.items():
            by_role = quality_by_role(dictionary, held_out_rows(rows, dictionary))
            live = by_role[ALL].firing_rate > 0
            of_all = splicing_quality(model, score, dictionary, clean)._asdict() | of_features[site] | told[site]
            of_all |= _matched(run, dictionary, live)
            figures += [
                {"site": site, "role": role, **measured.quality._asdict(), **(of_all if role == ALL else {})}
                for role, measured in by_role.items()
            ]
            rates[site] = pd.DataFrame({role: m.firing_rate.cpu().numpy() for role, m in by_role.items()})
            progress(1)
    figures.append({"site": ALL, "role": IN_SERIES, **of_features[IN_SERIES]})
    quality, density = (
        pd.DataFrame(figures).astype({"rows": "Int64"}),
        pd.concat(rates, names=["site", "feature"]).reset_index(),
    )
    for file, frame in ((QUALITY_FILE, quality), (DENSITY_FILE, density)):
        write_csv(folder / file, frame, digits=6)
    return json_records(quality, digits=6)


def restored(
    session: Session, dictionaries: Mapping[str, Dictionary], prompts: pd.DataFrame
) -> dict[str, dict[str, float | None]]:
    """What all features together restore under counterfactual ablation, with the errors ablated.

    Measured once with the dictionary of one site alone, site by site, and under `IN_SERIES` with those of all sites.

    Args:
        prompts: some discovery prompts among these, of either side, are paired with an equally long one each.

    Returns:
        For each `restored_toxic`, `restored_safe` and `agreement` (see `sfc.circuits.proof`), with the ends of their
        95 % intervals as `…_low` and `…_high`; None where there is nothing to be measured.
    """
    run, model = session.run.having(DiscoveryOptions, pairs_per_prompt=1), session.model
    groups = {site: {site: dictionary} for site, dictionary in dictionaries.items()} | {IN_SERIES: dictionaries}
    explained = prompts[prompts["split"] == "discovery"]
    few = keyed_ranks(explained, ["refusal_label"], f"restored {run.experiment.seed}") < RESTORED_PROMPTS
    others = run.prompts.frame[run.prompts.frame["split"] == "discovery"]
    try:
        pairs = against_counterfactuals(session.for_run(run), explained[few], others, dictionaries)
    except UserError as error:
        say(f"what features restore is not measured: {error}")
        return {group: dict.fromkeys(_RESTORED) for group in groups}
    runs = PromptRuns.of(model, pairs.discovery, next(iter(dictionaries)))
    figures, smallest = {}, EvaluationOptions.of(run.experiment).min_denominator
    with progress_bar("what features restore", 2 * len(groups) * runs.n_prompts, "runs") as progress:
        for group, spaces in groups.items():
            nodes = Nodes.of_spaces(spaces)
            ablation = Ablation(nodes, spaces, pairs.baseline.with_spaces(spaces), "ablate")
            everything = np.ones((1, nodes.n_nodes), dtype=bool)
            [scores] = pair_scores(model, pairs.score, ablation, runs, everything, progress)
            measured = pair_figures(scores, smallest, run.experiment.seed)
            figures[group] = {column: measured[name] for column, name in _RESTORED.items()}
    return figures


def _matched(run: Run, dictionary: Dictionary, live: Bool[Tensor, " d_sae"]) -> dict[str, float | None]:
    """The share of the live features that the dictionary of the other half of the prompts has too.

    With `matched_chance` as well, where that one is turned at random. None where there is none.
    """
    saes = run.experiment.saes
    if saes.half is not None:
        other_half = {"half": "second" if saes.half == "first" else "first"}
        experiment = run.experiment.model_copy(update={"saes": saes.model_copy(update=other_half)})
        folder = replace(run, experiment=experiment).saes.folder / dictionary.site
        if (folder / CONFIG_FILE).is_file() and live.any():
            other = load_dictionary(folder, dictionary.W_dec.device)
            turned = other.W_dec.float() @ random_rotation(other, run.experiment.seed).t()
            shares = [
                float((match_features(dictionary.W_dec, decoder)[0].same >= 0)[live.cpu().numpy()].mean())
                for decoder in (other.W_dec, turned)
            ]
            return dict(zip(_MATCHED, shares, strict=True))
    return dict.fromkeys(_MATCHED)


def _run_some(run: Run, model: Model, score: Score, prompts: pd.Series, sites: list[str]) -> CleanRuns:
    """Run some of the prompts, chosen by hash and so from all categories, as they are."""
    order = np.argsort(keyed_numbers(prompts, f"spliced {run.experiment.seed}"), kind="stable")
    tokenized = model.tokenize(prompts.iloc[order[:SPLICED_PROMPTS]].tolist())
    batches = make_batches(
        tokenized, TemplateLayout.of(tokenized), run.experiment.activations.batch_tokens, model.device
    )
    return run_clean(model, score, batches, sites)


def prompts_not_trained_on(run: Run, rows: TrainingRows) -> pd.DataFrame:
    """The circuits' prompts, test prompts aside, that were not among the texts trained on."""
    frame = run.prompts.frame
    trained = rows.table.loc[rows.table["trained"], "id"]
    return frame[(frame["split"] != "test") & ~frame["id"].isin(trained)]
