"""Nodes of one's own: principal components of the stored activations, each direction and its opposite a feature."""

from sfc.circuits.nodes import NODES, NodeKind

COMPONENTS = 8


def principal_components(sources):
    """A space of `2 * COMPONENTS` features at every site, whose values are never negative."""
    import torch

    from sfc.saes.dictionary import LinearDecoder
    from sfc.saes.kernels import Sparse

    class Components(LinearDecoder):
        def encode(self, x):
            return ((x - self.b_dec) @ self.W_dec.T).relu()

        def encode_sparse(self, x):
            return Sparse(*self.encode(x).topk(COMPONENTS, dim=1))

    spaces = {}
    for site in sources.sites:
        rows = torch.cat([sources.store.read(site, start, stop) for start, stop in sources.store.blocks(4096)])
        mean = rows.mean(0)
        _, _, directions = torch.linalg.svd(rows - mean, full_matrices=False)
        both = torch.cat([directions[:COMPONENTS], -directions[:COMPONENTS]])
        weights = {"W_dec": both.to(sources.model.device), "b_dec": mean.to(sources.model.device)}
        spaces[site] = Components(weights, site)
    return spaces


NODES.register(NodeKind("principal-components", principal_components))
