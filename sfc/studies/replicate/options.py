"""Whose circuit is discovered a second time, with which SAEs. No torch here."""

from sfc.core.options import Options, option

BOTH, ORIGINAL, REPLICATION = "both", "original", "replication"
"""which of the two circuits a node is in: that of the experiment's own SAEs, and that of the others"""


class ReplicationOptions(Options):
    """Whose circuit is discovered a second time, with which SAEs."""

    section = "replicate"

    category: str | None = option(None, description="OR-Bench category, or all; null: as of discover")
    sae_seed: int = option(1, ge=0, description="seed that the other SAEs are trained from")
