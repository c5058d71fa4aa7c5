"""Which sites write directly into which."""

import pytest

from sfc.circuits.edges import downstream
from sfc.core.sites import in_order, short_site, site_from_short


def edges(*names: str, is_parallel: bool = False) -> dict[tuple[str, str], str]:
    """All edges between sites by their short names, with what is stopped on the way."""
    sites = in_order([site_from_short(name) for name in names])
    return {
        (short_site(site), short_site(other)): " ".join(map(short_site, stops))
        for site in sites
        for other, stops in downstream(site, sites, is_parallel)
    }


@pytest.mark.parametrize("kind", ["resid_pre", "resid_post"])
def test_the_residual_stream_is_a_chain(kind: str) -> None:
    assert edges(f"{kind}.0", f"{kind}.1", f"{kind}.7") == {
        (f"{kind}.0", f"{kind}.1"): "",
        (f"{kind}.1", f"{kind}.7"): "",
    }
    assert edges("resid_pre.0", "resid_post.0", "resid_post.1", "resid_pre.2") == {
        ("resid_pre.0", "resid_post.0"): "",
        ("resid_post.0", "resid_post.1"): "",
        ("resid_post.1", "resid_pre.2"): "",
    }


def test_the_edges_of_marks_et_al() -> None:
    assert edges(*(f"{kind}.{layer}" for kind in ("attn_out", "mlp_out", "resid_post") for layer in (3, 4))) == {
        ("attn_out.3", "mlp_out.3"): "",
        ("attn_out.3", "resid_post.3"): "mlp_out.3",
        ("mlp_out.3", "resid_post.3"): "",
        ("resid_post.3", "attn_out.4"): "",
        ("resid_post.3", "mlp_out.4"): "attn_out.4",
        ("resid_post.3", "resid_post.4"): "attn_out.4 mlp_out.4",
        ("attn_out.4", "mlp_out.4"): "",
        ("attn_out.4", "resid_post.4"): "mlp_out.4",
        ("mlp_out.4", "resid_post.4"): "",
    }


def test_the_edges_of_parallel_blocks() -> None:
    kinds = ("attn_out", "mlp_out", "resid_post")
    assert edges(*(f"{kind}.{layer}" for kind in kinds for layer in (3, 4)), is_parallel=True) == {
        ("attn_out.3", "resid_post.3"): "",
        ("mlp_out.3", "resid_post.3"): "",
        ("resid_post.3", "attn_out.4"): "",
        ("resid_post.3", "mlp_out.4"): "",
        ("resid_post.3", "resid_post.4"): "attn_out.4 mlp_out.4",
        ("attn_out.4", "resid_post.4"): "",
        ("mlp_out.4", "resid_post.4"): "",
    }


def test_without_the_stream_outputs_write_into_all_that_come_after() -> None:
    assert edges("mlp_out.0", "mlp_out.1", "mlp_out.2") == {
        ("mlp_out.0", "mlp_out.1"): "",
        ("mlp_out.0", "mlp_out.2"): "mlp_out.1",
        ("mlp_out.1", "mlp_out.2"): "",
    }


def test_heads_write_into_their_sum_alone_and_the_mlp_reads_what_it_reads() -> None:
    assert edges("hook_z.0", "attn_out.0", "resid_mid.0", "mlp_out.0", "resid_post.0") == {
        ("hook_z.0", "attn_out.0"): "",
        ("attn_out.0", "resid_mid.0"): "",
        ("attn_out.0", "resid_post.0"): "resid_mid.0 mlp_out.0",
        ("resid_mid.0", "mlp_out.0"): "",
        ("mlp_out.0", "resid_post.0"): "",
    }
    assert edges("resid_mid.0") == {}
