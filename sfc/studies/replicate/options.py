"""With which other SAEs a circuit is discovered. No torch here."""

from sfc.core.options import Options, option

BOTH, ORIGINAL, REPLICATION = "both", "original", "replication"
"""which of the two circuits a node is in: that of the experiment's own SAEs (or the first half's), and that of the
others"""


class ReplicationOptions(Options):
    """With which other SAEs the circuit is discovered."""

    section = "replicate"

    sae_seed: int = option(1, ge=0, description="seed that the other SAEs are trained from")
    halves: bool = option(
        False, description="instead of two seeds, train on two disjoint halves of the prompts: saes.half"
    )
