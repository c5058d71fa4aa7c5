"""What work takes, counted before it is done; and the seconds that a machine needs for it.

Every room counts its own: the formulas are in `sfc.models.work`, `sfc.saes.work`, `sfc.circuits.work` and in the
studies. Here is what they count in, and the one place where counts become seconds: each is multiplied by the time that
one of it takes, which is measured on the machine (see `sfc.studies.plan`). Nothing here imports torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Amounts:
    """Counts of what a run is made of; or, field by field, the seconds that one of each takes."""

    calls: float = 0.0
    """blocks that are called: batches times blocks. A call costs something whatever passes: its weights are read"""
    forward: float = 0.0
    """tokens through a block, padding included: tokens times blocks"""
    backward: float = 0.0
    """the same, of gradients with respect to activations"""
    logits: float = 0.0
    """positions that are unembedded"""
    encoded: float = 0.0
    """rows that a dictionary encodes"""
    spliced: float = 0.0
    """rows that a dictionary encodes and that an ablation puts together again"""
    spliced_backward: float = 0.0
    """the same, of gradients"""
    trained: float = 0.0
    """rows that a dictionary learns from"""
    written: float = 0.0
    """bytes that are written and are on the disk before work goes on"""
    seconds: float = 0.0
    """what was measured as such and has no other unit"""

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: float) -> "Amounts":
        return Amounts(*(times * a for a in _values(self)))

    def at(self, speed: "Amounts") -> float:
        """Seconds of this work where one of each takes what `speed` says."""
        return sum(count * each for count, each in zip(_values(self), _values(speed), strict=True))


def _values(amounts: Amounts) -> Iterable[float]:
    return (getattr(amounts, field.name) for field in fields(amounts))


def total(parts: Iterable[Amounts]) -> Amounts:
    """All of them together."""
    return sum(parts, start=Amounts())


@dataclass(frozen=True)
class Work:
    """One step of a stage."""

    step: str
    amounts: Amounts = Amounts()
    device: int = 0
    """bytes that are in use at once where the model is: what stays from before this step included"""
    host: int = 0
    """bytes of main memory beside, wherever the model is; without what any process of this program takes"""
    kept: int = 0
    """bytes that stay on the disk"""
    scratch: int = 0
    """bytes that are on the disk while it runs, beside"""
    note: str = ""
    """what is not known of it, and what stands in for that"""
