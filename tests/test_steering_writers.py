"""Who writes a direction: the parts sum to the whole, and ablating one does what replacing its output does."""

import numpy as np
import pytest
import torch
from conftest import LABELS, random_dictionary

from sfc.data.render import TokenizedPrompt
from sfc.models.batches import cache_suffixes
from sfc.models.interventions import recorder
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.studies.steer.directions import cosine, random_directions
from sfc.studies.steer.writers import feature_cosines, parts_before, writers_table

TOXIC = np.array(LABELS)


@pytest.mark.parametrize(
    ("site", "n_parts"),
    [("blocks.1.hook_resid_post", 10), ("blocks.1.hook_resid_mid", 9), ("blocks.1.hook_resid_pre", 5)],
)
def test_the_parts_sum_to_what_stands_at_the_site(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], site: str, n_parts: int
) -> None:
    u = random_directions(1, 32, 0)[0]
    table = writers_table(model, score, prompts, TOXIC, site, -2, 5 * u, 0)
    assert len(table) == n_parts and table["share"].sum() == pytest.approx(1, abs=1e-4)
    seen: dict[str, torch.Tensor] = {}
    last_logits(model, cache_suffixes(model, prompts, 2), {site: recorder(seen, site)})
    component = (seen[site][:, -2].double() @ u).detach().numpy()
    difference = component[TOXIC].mean() - component[~TOXIC].mean()
    assert table["difference"].sum() == pytest.approx(difference, abs=1e-4)


def test_an_ablated_part_writes_what_it_writes_on_safe_prompts(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt]
) -> None:
    site, u = "blocks.1.hook_resid_post", random_directions(1, 32, 1)[0]
    table = writers_table(model, score, prompts, TOXIC, site, -1, u, 10).set_index("component")
    suffixes = cache_suffixes(model, prompts, 1)
    for part in parts_before(model, site):
        seen: dict[str, torch.Tensor] = {}
        before = score(last_logits(model, suffixes, {name: recorder(seen, name) for name in (part.site, site)}))
        mean = seen[part.site][~TOXIC].mean(0)
        wanted = torch.zeros_like(mean, dtype=torch.bool)
        wanted.view(1, -1)[:, slice(None) if part.head is None else slice(8 * part.head, 8 * part.head + 8)] = True
        changed: dict[str, torch.Tensor] = {}
        after = score(
            last_logits(
                model,
                suffixes,
                {
                    part.site: lambda x, mean=mean, wanted=wanted: torch.where(wanted, mean, x),
                    site: recorder(changed, site),
                },
            )
        )
        row = table.loc[part.name].to_dict()
        assert row["score_change"] == pytest.approx(float((after - before)[TOXIC].mean()), abs=1e-4)
        lost = ((seen[site] - changed[site])[TOXIC, -1].double() @ u).mean()
        assert row["lost_share"] * row["difference"] / row["share"] == pytest.approx(float(lost), abs=1e-4)


def test_cosines_with_every_feature() -> None:
    sites = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    dictionaries = {site: random_dictionary(site, seed=i) for i, site in enumerate(sites)}
    direction = -3 * dictionaries[sites[1]].W_dec[7].double()
    table = feature_cosines(direction, dictionaries)
    assert len(table) == 96 and table["cosine"].abs().is_monotonic_decreasing
    assert table["feature"][0] == "resid_post.1/F7" and table["cosine"][0] == pytest.approx(-1)
    row = table[table["feature"] == "resid_post.0/F3"].iloc[0]
    assert row["cosine"] == pytest.approx(cosine(direction, dictionaries[sites[0]].W_dec[3].double()), abs=1e-6)
