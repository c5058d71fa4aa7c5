"""Null dictionaries: of the trained ones' shape and scale, and of nothing that these have learned."""

import pytest
import torch
from conftest import SITES, random_dictionary

from sfc.core.errors import UserError
from sfc.saes.dictionary import Dictionary, JumpReLUDictionary, TopKDictionary
from sfc.saes.nulls import NULLS, RotatedDictionary, random_dictionaries, random_rotation, rotated_dictionaries


@pytest.fixture
def trained() -> dict[str, Dictionary]:
    return {site: random_dictionary(site, d_in=32, d_sae=48, seed=number) for number, site in enumerate(SITES)}


ROWS = 3 * torch.randn(40, 32, generator=torch.Generator().manual_seed(9)) + 1


@pytest.mark.parametrize("null", NULLS)
def test_nulls_are_dictionaries_of_the_same_shape_and_follow_from_the_seed(
    trained: dict[str, Dictionary], null: str
) -> None:
    made, again, other = (NULLS[null](trained, seed) for seed in (0, 0, 1))
    for site, dictionary in made.items():
        assert isinstance(dictionary, Dictionary) and dictionary.site == site
        assert (dictionary.d_in, dictionary.d_sae, dictionary.parts) == (32, 48, trained[site].parts)
        values, indices = dictionary.encode_sparse(ROWS)
        dense = dictionary.encode(ROWS)
        torch.testing.assert_close(torch.zeros_like(dense).scatter_add_(1, indices, values), dense)
        torch.testing.assert_close(dictionary.decode_sparse(values, indices), dictionary.decode(dense))
        assert int((dense > 0).sum(1).max()) == 6
        assert torch.equal(dictionary.W_dec, again[site].W_dec)
        assert not torch.allclose(dictionary.W_dec, other[site].W_dec)
        cosines = torch.nn.functional.normalize(dictionary.W_dec) @ torch.nn.functional.normalize(trained[site].W_dec).T
        assert cosines.diagonal().mean().abs() < 0.1
    assert not torch.allclose(*(dictionary.W_dec for dictionary in made.values()))


def test_random_directions_are_units_of_the_trained_scale_about_the_trained_centre(
    trained: dict[str, Dictionary],
) -> None:
    site = SITES[0]
    weights = {name: getattr(trained[site], name).detach().clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    scaled = TopKDictionary({**weights, "W_dec": 5 * weights["W_dec"]}, k=6, site=site)
    null = random_dictionaries({site: scaled}, 0)[site]
    torch.testing.assert_close(null.W_dec.norm(dim=1), torch.full((48,), 5.0))
    assert torch.equal(null.b_dec, scaled.b_dec) and (null.encode(scaled.b_dec[None]) == 0).all()
    units = null.W_dec / 5
    components = (ROWS - null.b_dec) @ units.T
    f = null.encode(ROWS)
    torch.testing.assert_close(f[f > 0] * 5, components[f > 0])


def test_a_rotated_dictionary_does_to_turned_rows_what_the_trained_one_does_to_rows(
    trained: dict[str, Dictionary],
) -> None:
    for site, null in rotated_dictionaries(trained, 3).items():
        rotation = random_rotation(trained[site], 3)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(32), atol=1e-5, rtol=1e-5)
        assert float(torch.linalg.det(rotation.double())) == pytest.approx(1, abs=1e-4)
        b = trained[site].b_dec
        turned_back = (ROWS - b) @ rotation.T + b
        torch.testing.assert_close(null.encode(turned_back), trained[site].encode(ROWS), atol=1e-4, rtol=1e-4)
        reconstructed = trained[site].decode(trained[site].encode(ROWS))
        torch.testing.assert_close(
            null.decode(null.encode(turned_back)), (reconstructed - b) @ rotation.T + b, atol=1e-4, rtol=1e-4
        )
        assert isinstance(null, RotatedDictionary) and null.inner is trained[site]


def test_nulls_let_gradients_through(trained: dict[str, Dictionary]) -> None:
    for null in NULLS.values():
        x = ROWS.clone().requires_grad_()
        dictionary = null(trained, 0)[SITES[0]]
        dictionary.decode_sparse(*dictionary.encode_sparse(x)).square().sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_dictionary_without_a_fixed_number_of_active_features_can_only_be_turned(
    trained: dict[str, Dictionary],
) -> None:
    weights = {name: getattr(trained[SITES[0]], name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    jumping = {SITES[0]: JumpReLUDictionary({**weights, "threshold": torch.full((48,), 0.5)}, site=SITES[0])}
    with pytest.raises(UserError, match="no fixed number"):
        random_dictionaries(jumping, 0)
    assert rotated_dictionaries(jumping, 0)[SITES[0]].encode(ROWS).shape == (40, 48)
