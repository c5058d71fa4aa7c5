"""SAEs of one's own: the encoder is the decoder's transpose, so that the file holds one matrix."""

from sfc.saes.architectures import ARCHITECTURES, Architecture, DictionaryConfig


class TiedConfig(DictionaryConfig):
    k: int


def shapes(config):
    """The tensors in the weights file."""
    return {"W_dec": (config.d_sae, config.d_in), "b_enc": (config.d_sae,), "b_dec": (config.d_in,)}


def build(config, weights):
    """A top-k dictionary whose encoder is made from the decoder."""
    from sfc.saes.dictionary import TopKDictionary

    return TopKDictionary({**weights, "W_enc": weights["W_dec"].T}, k=config.k, site=config.site)


ARCHITECTURES.register(Architecture("tied", shapes, build, TiedConfig))
