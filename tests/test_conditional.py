"""Conditional steering against a run in which the hook itself reads the feature and decides."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SITES

from sfc.core.errors import UserError
from sfc.data.render import Role, TokenizedPrompt
from sfc.models import engine
from sfc.models.edits import Steering, SteeringEdit
from sfc.models.engine import NO_EDIT, prepare_suffixes
from sfc.models.interventions import intervening
from sfc.models.loading import Model
from sfc.models.positions import steered_tokens
from sfc.models.score import RefusalScore
from sfc.saes.dictionary import Dictionary
from sfc.studies.steer.conditional import Condition, best_condition, conditional_table, largest_values, matched
from sfc.studies.steer.directions import random_directions


def _gated_by_hand(
    model: Model, dictionary: Dictionary, condition: Condition, prompt: TokenizedPrompt, vector: torch.Tensor
) -> torch.Tensor:
    """Logits of one whole run; the hook reads the feature, and adds at the suffix if it fires."""
    content = torch.from_numpy(prompt.roles == Role.CONTENT)
    content[0] = False
    suffix = torch.from_numpy(prompt.roles == Role.SUFFIX)

    def act(x: torch.Tensor) -> torch.Tensor:
        fires = dictionary.encode(x[0, content])[:, condition.feature].max() > condition.threshold
        return torch.where(suffix[:, None] & fires, x + vector.float(), x)

    with torch.no_grad(), intervening(model, {condition.site: act}):
        return model.hf(input_ids=torch.from_numpy(prompt.ids)[None]).logits[0, -1:]


@pytest.mark.parametrize("threshold", [0.0, None])
def test_the_conditional_dial_is_what_a_hook_that_reads_the_feature_does(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], dictionaries: dict[str, Dictionary],
    threshold: float | None,
) -> None:  # fmt: skip
    site = SITES[0]
    values = largest_values(model, dictionaries, prompts)[site]
    # A feature, or a threshold, that splits the prompts.
    share = (values > 0).mean(0) if threshold == 0.0 else np.where((values > 0).all(0), 0.5, 0)
    feature = int(np.abs(share - 0.5).argmin())
    above = threshold if threshold is not None else float(np.median(values[:, feature]))
    condition = Condition(site, feature, above)
    holds = values[:, feature] > above
    assert 0 < holds.sum() < len(prompts)
    vector = 3 * random_directions(1, model.d_model, 0)[0]
    prepared = prepare_suffixes(model, prompts, partial(steered_tokens, "suffix"), 100)
    edits = Steering([SteeringEdit("add", (site,), vector, 3.0)], "suffix", False)
    [steered], [plain] = (engine.scores(prepared, score, each) for each in (edits, NO_EDIT))
    for i, prompt in enumerate(prompts):
        logits = _gated_by_hand(model, dictionaries[site], condition, prompt, vector)
        assert np.where(holds, steered, plain)[i] == pytest.approx(float(score(logits)), abs=1e-4)
    assert np.abs(steered - plain).min() > 1e-3


def test_the_best_condition_has_the_largest_difference_of_shares_of_all_features_and_thresholds() -> None:
    random = np.random.default_rng(0)
    values = {site: np.maximum(random.normal(size=(20, 7)).round(1), 0) for site in SITES}
    toxic = random.random(20) < 0.4
    best = best_condition(values, toxic)

    def difference(site: str, feature: int, threshold: float) -> float:
        fires = values[site][:, feature] > threshold
        return fires[toxic].mean() - fires[~toxic].mean()

    every = [
        difference(site, feature, threshold)
        for site in SITES
        for feature in range(7)
        for threshold in np.arange(0, 4, 0.05)
    ]
    assert difference(*best) == pytest.approx(max(every))
    assert best.name.startswith("resid_post.")
    with pytest.raises(UserError, match="no feature fires"):
        best_condition({SITES[0]: np.zeros((4, 3))}, np.array([True, True, False, False]))


def _rows(refused: dict[tuple[str, float], list[bool]]) -> pd.DataFrame:
    """Rows of a sweep; at alpha 0 is what prompts do as they are."""
    return pd.DataFrame(
        {"group": group, "alpha": alpha, "prompt": f"{group} {i}", "refused": value, "unsteered_refused": before}
        for (group, alpha), values in refused.items()
        for i, (value, before) in enumerate(zip(values, refused[group, 0.0], strict=True))
    )


def test_both_dials_are_counted_and_matched_by_hand() -> None:
    yes, no = True, False
    rows = _rows(
        {
            ("toxic", 0.0): [yes, yes, no, no], ("toxic", 1.0): [yes, yes, yes, no], ("toxic", 2.0): [yes] * 4,
            ("safe", 0.0): [no, no, no, no], ("safe", 1.0): [yes, no, no, no], ("safe", 2.0): [yes, yes, yes, no],
        }
    )  # fmt: skip
    fires = rows["prompt"].isin(["toxic 0", "toxic 2", "safe 2"]).to_numpy()
    table = conditional_table(rows, fires)
    counts = table.pivot(index=["dial", "alpha"], columns="group", values="refusals")
    assert counts.loc["unconditional", "toxic"].tolist() == [2, 3, 4]
    assert counts.loc["conditional", "toxic"].tolist() == [2, 3, 3], "toxic 3 stays as it is"
    assert counts.loc["conditional", "safe"].tolist() == [0, 0, 1]
    steered = table[table["dial"] == "conditional"].set_index(["alpha", "group"])["steered"]
    assert steered[2.0, "toxic"] == 2 and steered[2.0, "safe"] == 1
    at = matched(table).set_index("toxic")
    assert at.index.tolist() == [0.5, 0.75, 1.0]
    assert at["safe_unconditional"].tolist() == [0.0, 0.25, 0.75]
    assert at["safe_conditional"].tolist() == [0.0, 0.0, None]


def test_shares_between_alphas_are_interpolated_and_the_lowest_of_several_counts() -> None:
    table = pd.DataFrame(
        [
            {"dial": dial, "alpha": alpha, "group": group, "rate": rate}
            for dial, toxic, safe in (
                ("unconditional", [0.2, 0.6, 0.4], [0.1, 0.5, 0.9]), ("conditional", [0.2, 0.4, 0.5], [0.1, 0.1, 0.3]),
            )
            for group, rates in (("toxic", toxic), ("safe", safe))
            for alpha, rate in enumerate(rates)
        ]
    )  # fmt: skip
    at = matched(table).set_index("toxic")
    assert at.loc[0.4, "safe_unconditional"] == pytest.approx(0.3), "half-way up; coming down again it is 0.9"
    assert at.loc[0.5, "safe_conditional"] == pytest.approx(0.3)
    assert at.loc[0.6, "safe_conditional"] is None
