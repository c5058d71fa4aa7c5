"""The sampler itself: every case has its turn, and a hang is a failure."""

import time

import pytest
from commands import Finished

from hostile import sampling
from hostile.sampling import Hung, assert_held, at_most, sample


def test_consecutive_seeds_try_every_case_and_a_seed_tries_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "ALL", False)
    tried: list[list[int]] = []
    for seed in range(2026 * 53, 2026 * 53 + 7):
        monkeypatch.setattr(sampling, "SEED", seed)
        tried.append(sample(range(20), keep=3))
        assert tried[-1] == sample(range(20), keep=3) == sorted(set(tried[-1]))
    assert all(len(cases) == 3 for cases in tried) and set().union(*tried) == set(range(20))
    monkeypatch.setattr(sampling, "ALL", True)
    assert sample(range(20), keep=3) == list(range(20))


def test_a_block_that_hangs_is_ended() -> None:
    with pytest.raises(Hung), at_most(0.05):
        try:
            time.sleep(5)
        except Exception:
            time.sleep(5)


@pytest.mark.parametrize(
    "finished",
    [
        Finished(1, "", "error: unexpected"),
        Finished(2, "", "error: one thing that is wrong\nerror: another thing"),
        Finished(2, "", "Traceback (most recent call last)\nerror: one thing that is wrong"),
        Finished(2, "", "error: a file named \x1b[2J is missing"),
        Finished(0, "\x9b31m", ""),
        Finished(2, "", ""),
        Finished(0, "", "error: one thing that is wrong"),
    ],
)
def test_what_does_not_hold_is_seen(finished: Finished) -> None:
    with pytest.raises(AssertionError):
        assert_held(finished)
