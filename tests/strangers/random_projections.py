"""A kind of nodes of a stranger's: random orthogonal directions as features, both signs of each, no training needed."""

from sfc.circuits.nodes import NODES, NodeKind, Sources

DIRECTIONS = 8


def spaces(sources: Sources) -> dict:
    """Random directions at every site; what they do not span is the error."""
    import torch

    from sfc.saes.dictionary import LinearDecoder
    from sfc.saes.kernels import Sparse

    class Projections(LinearDecoder):
        def encode(self, x):
            return (x @ self.W_dec.T).relu()

        def encode_sparse(self, x):
            return Sparse(self.encode(x), torch.arange(self.d_sae, device=x.device).expand(len(x), -1))

    def at(site: str, seed: int) -> Projections:
        d_in, random = sources.model.width(site), torch.Generator().manual_seed(seed)
        directions = torch.linalg.qr(torch.randn(d_in, DIRECTIONS, generator=random)).Q.T
        weights = {"W_dec": torch.cat([directions, -directions]), "b_dec": torch.zeros(d_in)}
        return Projections({name: weight.to(sources.model.device) for name, weight in weights.items()}, site)

    return {site: at(site, seed) for seed, site in enumerate(sources.sites)}


NODES.register(NodeKind("random-projections", spaces))
