"""The trainer on synthetic activations whose sparse directions are known."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfc.core.config import SaeConfig
from sfc.core.errors import UserError
from sfc.core.ranks import Peers
from sfc.saes.checkpoint import steps_done
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.logs import LOG_FILE, json_lines
from sfc.saes.quality import reconstruction_quality
from sfc.saes.start import geometric_median, spherical_kmeans, start
from sfc.saes.train import Progress, SiteStats, dead_features, finish, sae_loss, schedule, train_saes, train_step

D_IN, PLANTED = 32, 48
CONFIG = SaeConfig.model_validate(
    {
        "expansion": 2,
        "k": 4,
        "steps": 400,
        "batch_size": 256,
        "learning_rate": 1e-2,
        "dead_after": 5_000,
        "matryoshka": [],
    }
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and lose much where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted_directions() -> Tensor:
    directions = torch.randn(PLANTED, D_IN, generator=torch.Generator().manual_seed(99))
    return directions / directions.norm(dim=1, keepdim=True)


def rows(count: int, seed: int) -> Tensor:
    """Four planted directions each, with positive strengths, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(count, PLANTED, generator=generator).topk(4).indices
    strengths = 3 + 2 * torch.rand(count, 4, generator=generator)
    return torch.einsum("ne,ned->nd", strengths, planted_directions()[which]) + 5


def batches(config: SaeConfig = CONFIG, factor: float = 1.0, sites: int = 1) -> Iterator[Tensor]:
    for step in range(config.steps):
        yield factor * torch.stack([rows(config.batch_size, 1000 * site + step) for site in range(sites)])


def train(config: SaeConfig = CONFIG, factor: float = 1.0, **options):
    sample = factor * rows(1000, 10**6)[None]
    return train_saes(stream(batches(config, factor)), sample, config, sites=["blocks.0.hook_resid_post"], **options)[0]


def stream(batches: Iterator[Tensor]) -> Callable[[int], Iterator[Tensor]]:
    return lambda first: islice(batches, first, None)


def short(**changes) -> SaeConfig:
    return CONFIG.model_copy(update={"steps": 20, "batch_size": 64, **changes})


@pytest.mark.parametrize(("begun", "found"), [("kmeans", 0.9), ("random", 1.0)])
def test_it_finds_the_planted_directions(begun: str, found: float) -> None:
    """Centroids of rows that are sums of four directions each lie between these: some features stay there."""
    history: list[Progress] = []
    dictionary = train(CONFIG.model_copy(update={"start": begun}), report=history.append)
    cosines = (planted_directions() @ dictionary.W_dec.T).max(dim=1).values
    assert (cosines > 0.9).double().mean() >= found and cosines.min() > 0.8
    quality = reconstruction_quality(dictionary, rows(2000, 10**7))
    assert quality.fvu < 0.06
    assert quality.cosine > 0.95
    assert quality.l0 <= 4
    assert 0 <= quality.dead_share < 0.5
    first, last = history[0], history[-1]
    assert (first.step, last.step, last.steps) == (10, 400, 400)
    assert last.sites[0].fvu < first.sites[0].fvu / 3
    assert last.sites[0].fvu == pytest.approx(quality.fvu, abs=0.05)
    assert last.tokens_per_second > 0


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    first, again, other = (train(short(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.W_enc, again.W_enc)
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_a_site_does_not_depend_on_the_sites_beside_it() -> None:
    config = short()
    sample = torch.stack([rows(500, 1), rows(500, 2)])
    both = train_saes(stream(batches(config, sites=2)), sample, config, sites=["a", "b"])
    second = train_saes(stream(batch[1:] for batch in batches(config, sites=2)), sample[1:], config, sites=["b"])
    assert [dictionary.site for dictionary in both] == ["a", "b"]
    assert torch.equal(both[1].W_dec, second[0].W_dec)


def test_the_scale_of_the_activations_does_not_matter() -> None:
    config = short()
    plain, scaled = train(config), train(config, factor=8)  # a power of two: no rounding differs, no top-k flips
    x = rows(100, 5)
    torch.testing.assert_close(scaled.decode(scaled.encode(8 * x)) / 8, plain.decode(plain.encode(x)))
    torch.testing.assert_close(scaled.encode(8 * x) / 8, plain.encode(x))
    seven = reconstruction_quality(train(config, factor=7), 7 * x)
    assert seven.fvu == pytest.approx(reconstruction_quality(plain, x).fvu, abs=1e-3)


def test_decoder_rows_have_length_one() -> None:
    torch.testing.assert_close(train(short()).W_dec.norm(dim=1), torch.ones(2 * D_IN))


@pytest.mark.parametrize(("auxiliary_weight", "revived"), [(0.0, False), (1.0, True)])
def test_the_auxiliary_loss_revives_dead_features(auxiliary_weight: float, revived: bool) -> None:
    config = short(steps=200, dead_after=1, auxiliary_weight=auxiliary_weight)
    training = start("a", rows(1000, 10**6), config, 0, "cpu")
    with torch.no_grad():
        training.parameters.encoder[D_IN:] *= 1e-3  # too faint to be among the k largest
    for (batch,) in batches(config):
        train_step(training, batch, config, k=4, learning_rate=3e-3, dead=dead_features(training, config))
    fired = (finish(training, 4).encode(rows(2000, 5)) > 0).any(dim=0)
    assert bool(fired[D_IN:].float().mean() > 0.5) is revived


def test_anchored_directions_stay_near_their_start() -> None:
    parameters = start("blocks.0.hook_resid_post", rows(1000, 10**6), short(), 0, "cpu").parameters
    encoder, directions = parameters.encoder.detach(), parameters.W_dec.detach()
    free, held, fixed = (train(short(anchor_weight=weight)) for weight in (0.0, 30.0, 1000.0))
    turned = [float((1 - (directions * dictionary.W_dec).sum(1)).mean()) for dictionary in (free, held, fixed)]
    assert turned[0] > 10 * turned[1] > 100 * turned[2]
    assert not torch.allclose(held.W_enc.T, encoder, atol=1e-2)


def test_k_as_a_percentage() -> None:
    assert train(short(k="5%")).k == 3  # of 64 features


def test_warm_up_and_decay() -> None:
    config = short(steps=100, warmup_steps=9, decay_share=0.2)
    rates = [schedule(step, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert 0 < rates[-1] < 0.1
    assert schedule(1, short(steps=1, warmup_steps=0, decay_share=0)) == 1


def test_the_geometric_median_ignores_an_outlier() -> None:
    cloud = torch.cat([torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), torch.full((1, 8), 1e4)])
    assert geometric_median(cloud).norm() < 0.5
    assert cloud.mean(0).norm() > 100
    assert geometric_median(torch.ones(5, 8)).equal(torch.ones(8))


def test_batches_that_end_too_early() -> None:
    config = short()
    with pytest.raises(UserError, match="ended after 3 of 20 steps"):
        train_saes(stream(islice(batches(config), 3)), rows(9, 0)[None], config, sites="a")


@pytest.mark.parametrize(
    ("sample", "problem"), [(torch.zeros(1, 9, 32), "zero"), (torch.full((1, 9, 32), math.nan), "not finite")]
)
def test_a_useless_sample(sample: Tensor, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        train_saes(stream(batches()), sample, CONFIG, sites=["a"])


def test_a_batch_that_is_not_finite() -> None:
    with pytest.raises(UserError, match=r"^a: .*diverged"):
        train_saes(stream(iter([torch.full((1, 8, 32), math.inf)] * 10)), rows(9, 0)[None], short(), sites=["a"])


class Killed(Exception):
    pass


@pytest.mark.parametrize("stops", [[12], [20, 21], [39]])
def test_an_interrupted_training_goes_on_to_the_same_weights(stops: list[int], tmp_path: Path) -> None:
    """Killed after these steps, of which the checkpoint may miss the last; dead features and all."""
    config = short(steps=40, dead_after=100, checkpoint_seconds=1e-9)
    unbroken = train(config)
    checkpoint = tmp_path / "checkpoint.safetensors"

    def stopping(stop: int) -> Callable[[int], Iterator[Tensor]]:
        def from_step(first: int) -> Iterator[Tensor]:
            yield from islice(batches(config), first, stop)
            raise Killed

        return from_step

    sample = rows(1000, 10**6)[None]
    for stop in stops:
        with pytest.raises(Killed):
            train_saes(stopping(stop), sample, config, sites=["blocks.0.hook_resid_post"], checkpoint=checkpoint)
        assert 0 < steps_done(checkpoint) <= stop
    resumed = train(config, checkpoint=checkpoint)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(resumed, name), getattr(unbroken, name)), name


def test_a_checkpoint_of_other_sites_or_damaged_is_refused(tmp_path: Path) -> None:
    config, checkpoint = short(checkpoint_seconds=1e-9), tmp_path / "checkpoint.safetensors"
    train(config, checkpoint=checkpoint)
    with pytest.raises(UserError, match="cannot be used"):
        train_saes(stream(batches(config)), rows(9, 0)[None], config, sites=["other"], checkpoint=checkpoint)
    assert steps_done(tmp_path / "none") == 0
    save_file({"a": torch.zeros(1)}, tmp_path / "of_a_model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "scale.safetensors", metadata={"step": "3", "scale a": "nan"})
    (tmp_path / "text.safetensors").write_bytes(b"nothing of the kind")
    for name, problem in {"of_a_model": "step is missing", "scale": "scales.a: ", "text": ""}.items():
        damaged = tmp_path / f"{name}.safetensors"
        for use in (lambda path: train(config, checkpoint=path), steps_done):
            with pytest.raises(
                UserError, match=rf"{name}.safetensors cannot be used \({problem}.*; delete it"
            ) as error:
                use(damaged)
            assert "\n" not in str(error.value)


def test_a_log_that_is_continued_drops_steps_to_be_done_again_and_is_checked(tmp_path: Path) -> None:
    log = tmp_path / "a" / LOG_FILE
    log.parent.mkdir()
    log.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"ste')
    json_lines(tmp_path, ["a"], first_step=20)(Progress(30, 40, 1.0, [SiteStats("a", 0.5, 0.4, 8.0, 3)]))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 20, 30]
    log.write_text('{"step": 10}\n{"step": "many"}\n')
    with pytest.raises(UserError, match=rf"{LOG_FILE} is damaged \(step: .*\); delete it"):
        json_lines(tmp_path, ["a"], first_step=20)


def test_the_first_features_of_a_matryoshka_sae_reconstruct_by_themselves() -> None:
    x = rows(500, 5)

    def missed_by_first(sae: TopKDictionary) -> float:
        values, indices = sae.encode_sparse(x)
        x_hat = sae.decode_sparse(values * (indices < sae.d_sae // 4), indices)
        return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())

    plain, nested = train(short(steps=100, matryoshka=[])), train(short(steps=100, matryoshka=[0.25]))
    assert missed_by_first(nested) < 0.8 * missed_by_first(plain)


@pytest.mark.parametrize(("shares", "prefixes"), [([0.5, 0.1], [4, 16]), ([0.99], []), ([], []), ([0.1, 0.12], [4])])
def test_shares_of_the_features_are_rounded_up_and_those_that_are_alike_count_once(
    shares: list[float], prefixes: list[int]
) -> None:
    assert short(matryoshka=shares).prefixes(32) == prefixes


def test_the_l1_norm_makes_features_smaller() -> None:
    plain, penalised = train(short(steps=100)), train(short(steps=100, l1_weight=1.0))
    x = rows(500, 5)
    assert penalised.encode(x).sum() < 0.9 * plain.encode(x).sum()


def test_the_l1_norm_of_the_loss_by_hand() -> None:
    training = start("a", rows(1000, 1), short(), 0, "cpu")
    x, none = rows(64, 2) * training.scale, torch.tensor([], dtype=torch.long)
    without, with_it = (sae_loss(training.parameters, x, 4, none, 0.0, weight) for weight in (0.0, 0.5))
    mean_norm = without.active.values.sum(1).mean() / math.sqrt(D_IN)
    torch.testing.assert_close(with_it.total, without.total + 0.5 * mean_norm)


def test_the_losses_of_shares_of_the_rows_sum_to_the_loss_and_so_do_their_gradients() -> None:
    x, dead = rows(40, 1), torch.tensor([1, 5, 30])
    parameters = start("a", x, short(), 0, "cpu").parameters

    def losses(*shares: slice) -> tuple[float, float, list[Tensor]]:
        parts = [sae_loss(parameters, x, 4, dead, 0.5, 0.3, share) for share in shares]
        gradients = torch.autograd.grad(sum((part.total for part in parts), torch.zeros(())), parameters)
        return sum(part.total.item() for part in parts), sum(part.fvu.item() for part in parts), list(gradients)

    shares = [Peers(number, 3).share(len(x)) for number in range(3)]
    assert [row for share in shares for row in range(40)[share]] == list(range(40))
    total, fvu, gradients = losses(slice(None))
    of_parts = losses(*shares)
    assert of_parts[:2] == pytest.approx((total, fvu), rel=1e-6)
    for part, whole in zip(of_parts[2], gradients, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)


def test_the_decoder_bias_starts_at_the_median_or_the_mean() -> None:
    sample = torch.cat([rows(200, 1), torch.full((1, D_IN), 1e4)])
    by_median, by_mean = (start("a", sample, short(decoder_bias=name), 0, "cpu") for name in ("median", "mean"))
    torch.testing.assert_close(by_mean.parameters.b_dec, (sample * by_mean.scale).mean(0))
    assert by_median.parameters.b_dec.norm() < 0.5 * by_mean.parameters.b_dec.norm()


def plain_kmeans(rows: Tensor, centroids: Tensor, rounds: int) -> Tensor:
    """Spherical k-means row by row; where a centroid has no rows, those that fit worst are taken, the worst first."""
    rows = torch.stack([row / row.norm() for row in rows])
    for _ in range(rounds):
        members: list[list[Tensor]] = [[] for _ in centroids]
        fits = []
        for row in rows:
            cosines = [float(row @ centroid) for centroid in centroids]
            members[cosines.index(max(cosines))].append(row)
            fits.append(max(cosines))
        worst = iter(sorted(range(len(rows)), key=lambda row: fits[row]))
        moved = [torch.stack(own).sum(0) if own else rows[next(worst)] for own in members]
        centroids = torch.stack([each / each.norm() for each in moved])
    return centroids


@pytest.mark.parametrize("copies", [1, 20])
def test_kmeans_agrees_with_the_plain_one(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many copies of some rows several are drawn, so that centroids without rows have to move."""
    monkeypatch.setattr("sfc.saes.start.KMEANS_BLOCK", 7)
    points = rows(200 // copies, 3).repeat(copies, 1) - 5
    drawn = torch.randperm(200, generator=torch.Generator().manual_seed(4))[:12]
    first = torch.nn.functional.normalize(points[drawn])
    assert (len(first.unique(dim=0)) < 12) is (copies > 1)
    found = spherical_kmeans(points, 12, torch.Generator().manual_seed(4), rounds=3)
    torch.testing.assert_close(found, plain_kmeans(points, first, 3))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))


def test_kmeans_of_too_few_rows_takes_them_all() -> None:
    found = spherical_kmeans(rows(5, 1), 9, torch.Generator().manual_seed(0))
    assert found.shape == (9, D_IN) and bool(((rows(5, 1) @ found.T).amax(1) > 0.999 * rows(5, 1).norm(dim=1)).all())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(9))


def test_features_start_at_centroids_or_at_random() -> None:
    sample, config = rows(1000, 1), short()
    by_kmeans, by_chance = (start("a", sample, short(start=name), 0, "cpu").parameters for name in ("kmeans", "random"))
    torch.testing.assert_close(by_kmeans.b_dec, by_chance.b_dec)
    cosine = torch.nn.functional.normalize(sample - sample.mean(0)) @ torch.stack([by_kmeans.W_dec, by_chance.W_dec]).mT
    assert config.start == "kmeans" and cosine[0].amax(1).mean() > cosine[1].amax(1).mean() + 0.2
