"""Steering against slow oracles: one prompt at a time, whole runs, no cache."""

import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TEXTS, random_dictionary
from hypothesis import given
from hypothesis import strategies as st

from sfc.core.errors import UserError
from sfc.data.render import Role, TokenizedPrompt
from sfc.models import engine
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.edits import Steering, SteeringEdit, residual_sites, steering
from sfc.models.engine import NO_EDIT, PreparedPrompts, prepare_suffixes
from sfc.models.generation import end_tokens
from sfc.models.interventions import intervening, recorder
from sfc.models.judge import is_refusal
from sfc.models.loading import Model
from sfc.models.positions import steered_tokens
from sfc.models.score import RefusalScore, score_batch
from sfc.studies.steer import FORCE, SUPPRESS, SteeringOptions
from sfc.studies.steer.directions import (
    Dial,
    Setting,
    circuit_directions,
    difference_of_means,
    feature_direction,
    in_span,
    probe_direction,
    random_directions,
    span_share,
)
from sfc.studies.steer.learning import Recording, last_tokens, make_contrast
from sfc.studies.steer.sweep import RANDOM, SHUFFLED, best_alphas, best_per_layer, by_chance, ranked, rates, sweep

REPLY = 5
POSITIONS = ("last", "last-2", "last-100", "suffix", "prompt")


def _edits(model: Model) -> list[SteeringEdit]:
    sites = [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_mid",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_mid",
    ]
    vectors = random_directions(len(sites) + 1, model.d_model, 0)
    edits = [
        SteeringEdit(kind, (site,), 3 * vector, amount)  # pyright: ignore[reportArgumentType]
        for (site, vector), (kind, amount) in itertools.product(
            zip(sites, vectors, strict=False), (("add", 4.0), ("add", -2.0), ("clamp", 5.0), ("project-out", 1.0))
        )
    ]
    return [*edits, SteeringEdit("project-out", residual_sites(model), vectors[-1], 1.0)]


def _prepared(model: Model, prompts: list[TokenizedPrompt], positions: str, batch_tokens: int) -> PreparedPrompts:
    return prepare_suffixes(model, prompts, partial(steered_tokens, positions), batch_tokens)


def _steered(positions: str, prompt: TokenizedPrompt, during_reply: bool) -> np.ndarray:
    steered = steered_tokens(positions, prompt.roles) | (during_reply & (prompt.roles == Role.REPLY))
    steered[0] = False
    return steered


def _by_hand(
    model: Model, edit: SteeringEdit, prompt: TokenizedPrompt, ids: torch.Tensor, steered: np.ndarray
) -> torch.Tensor:
    """Logits [pos, vocab] of one sequence in one whole run, edited token by token."""
    u = (edit.direction / edit.direction.norm()).float()

    def act(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for position in np.flatnonzero(steered):
            component = x[0, position] @ u
            change = {"add": edit.amount, "clamp": edit.amount - component, "project-out": -edit.amount * component}
            x[0, position] += change[edit.kind] * u
        return x

    with torch.no_grad(), intervening(model, dict.fromkeys(edit.sites, act)):
        return model.hf(input_ids=ids[None]).logits[0]


def _greedy_by_hand(
    model: Model, edit: SteeringEdit, prompt: TokenizedPrompt, positions: str, during_reply: bool
) -> str:
    ids, roles = torch.from_numpy(prompt.ids), prompt.roles
    for _ in range(REPLY):
        steered = _steered(positions, TokenizedPrompt(ids.numpy(), roles), during_reply)
        newest = _by_hand(model, edit, prompt, ids, steered)[-1].argmax()
        ids, roles = torch.cat([ids, newest[None]]), np.append(roles, Role.REPLY)
        if int(newest) in end_tokens(model):
            break
    return model.tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("positions", POSITIONS)
def test_scores_are_those_of_whole_runs_edited_token_by_token(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], positions: str
) -> None:
    edits = _edits(model)
    prepared = _prepared(model, prompts, positions, 100)
    assert len(prepared.batches) > 1 and prepared.n_prompts == len(prompts)
    scores = engine.scores(prepared, score, Steering(edits, positions, False), batch_tokens=100)
    for i, edit in enumerate(edits):
        for j, prompt in enumerate(prompts):
            steered = _steered(positions, prompt, False)
            logits = _by_hand(model, edit, prompt, torch.from_numpy(prompt.ids), steered)
            assert scores[i, j] == pytest.approx(float(score(logits[-1:])), abs=1e-4)
    assert np.ptp(scores, axis=0).min() > 0.01, "the edits do something"


@pytest.mark.parametrize("during_reply", [False, True])
@pytest.mark.parametrize("positions", ["last", "suffix", "prompt"])
def test_replies_are_those_of_whole_runs_without_a_cache(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], positions: str, during_reply: bool
) -> None:
    edits = _edits(model)[::3]
    prepared, steered = _prepared(model, prompts, positions, 300), Steering(edits, positions, during_reply)
    replies = engine.replies(prepared, score, steered, REPLY, batch_tokens=300)
    expected = [[_greedy_by_hand(model, edit, p, positions, during_reply) for p in prompts] for edit in edits]
    assert replies.texts == expected
    np.testing.assert_allclose(replies.scores, engine.scores(prepared, score, steered), atol=1e-4)
    assert len({tuple(texts) for texts in expected}) > 2, "the edits do something"


def test_without_an_edit_nothing_changes(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt], layout: TemplateLayout
) -> None:
    (batch,) = make_batches(prompts, layout, 10_000, model.device)
    expected = score_batch(model, score, batch).numpy()[np.argsort(batch.prompts.numpy())]
    nothing = [SteeringEdit("add", ("blocks.0.hook_resid_post",), torch.ones(32), 0.0)]
    for positions in POSITIONS:
        prepared, steered = _prepared(model, prompts, positions, 200), Steering(nothing, positions, True)
        np.testing.assert_allclose(engine.scores(prepared, score, NO_EDIT)[0], expected, atol=1e-4)
        np.testing.assert_allclose(engine.scores(prepared, score, steered)[0], expected, atol=1e-4)
        replies, plain = (engine.replies(prepared, score, each, REPLY) for each in (steered, NO_EDIT))
        assert replies.texts == plain.texts


@pytest.mark.parametrize("during_reply", [False, True])
def test_the_cost_on_given_replies_is_that_of_whole_runs(model: Model, during_reply: bool) -> None:
    prompts = [_with_reply(p, n) for p, n in zip(model.tokenize(TEXTS), (4, 1, 6, 2, 3, 5), strict=True)]
    edits = _edits(model)[::4]
    prepared = _prepared(model, prompts, "suffix", 120)
    effect = engine.losses(prepared, Steering(edits, "suffix", during_reply))
    expected: list[list[list[float]]] = [[] for _ in range(1 + len(edits))]
    firsts, order = [], [int(i) for batch in prepared.batches for i in batch.prompts]
    for prompt in (prompts[i] for i in order):
        where = np.flatnonzero(prompt.roles == Role.REPLY)
        ids = torch.from_numpy(prompt.ids)
        with torch.no_grad():
            plain = model.hf(input_ids=ids[None]).logits[0].log_softmax(-1)[where - 1]
        steered = _steered("suffix", prompt, during_reply)
        runs = [plain, *(_by_hand(model, e, prompt, ids, steered).log_softmax(-1)[where - 1] for e in edits)]
        for row, log_p in zip(expected, runs, strict=True):
            divergence = torch.nn.functional.kl_div(log_p, plain, reduction="none", log_target=True).sum(-1)
            row.append(torch.stack([-log_p.gather(1, ids[where][:, None])[:, 0], divergence]).T.tolist())
        firsts += [True] + [False] * (len(where) - 1)
    joined = np.array([np.concatenate(row) for row in expected])
    np.testing.assert_allclose([effect.plain_losses, *effect.losses], joined[:, :, 0], atol=1e-4)
    np.testing.assert_allclose(effect.divergence, joined[1:, :, 1], atol=1e-4)
    assert effect.is_first.tolist() == firsts


def _with_reply(prompt: TokenizedPrompt, length: int) -> TokenizedPrompt:
    reply = np.arange(60, 60 + length)
    return TokenizedPrompt(np.append(prompt.ids, reply), np.append(prompt.roles, np.full(length, Role.REPLY)))


def test_kl_of_the_next_token(model: Model, prompts: list[TokenizedPrompt]) -> None:
    edits = [*_edits(model)[:3], SteeringEdit("add", ("blocks.0.hook_resid_post",), torch.ones(32), 0.0)]
    prepared = _prepared(model, prompts, "last", 150)
    found = engine.next_token_kl(prepared, Steering(edits, "last", False), batch_tokens=150)
    for i, edit in enumerate(edits):
        for j, prompt in enumerate(prompts):
            ids = torch.from_numpy(prompt.ids)
            steered = _steered("last", prompt, False)
            p = _by_hand(model, edit._replace(amount=0.0, kind="add"), prompt, ids, steered)[-1].softmax(-1)
            q = _by_hand(model, edit, prompt, ids, steered)[-1].softmax(-1)
            assert found[i, j] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-4)
    np.testing.assert_allclose(found[-1], 0, atol=1e-5)


def test_steered_tokens_are_those_named_and_never_the_first(model: Model) -> None:
    (plain,) = model.tokenize(["hm"])
    prompt = _with_reply(plain, 2)  # bos, user, h, m, end, assistant, and two of a reply
    assert prompt.roles.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    expected = {
        "last": [5],
        "last-3": [3, 4, 5],
        "last-99": [1, 2, 3, 4, 5],
        "suffix": [4, 5],
        "prompt": [1, 2, 3, 4, 5],
    }
    for name, positions in expected.items():
        assert np.flatnonzero(_steered(name, prompt, False)).tolist() == positions
        assert np.flatnonzero(_steered(name, prompt, True)).tolist() == [*positions, 6, 7]
    for wrong in ("lst", "last-0", "content", ""):
        with pytest.raises(UserError, match="unknown positions"):
            _steered(wrong, prompt, False)


def test_what_an_edit_does_to_the_component_along_its_direction() -> None:
    random = torch.Generator().manual_seed(0)
    x, direction = torch.randn(4, 3, 8, generator=random), torch.randn(8, generator=random)
    u = direction / direction.norm()
    where = torch.tensor([[True, False, True], [True, True, False]])
    of_both = where.repeat(2, 1)
    components = {
        "add": lambda c: c + 2.5,
        "clamp": lambda c: torch.full_like(c, 2.5),
        "project-out": lambda c: -1.5 * c,
    }
    for kind, expected in components.items():
        edits = [SteeringEdit(kind, ("s",), direction, 2.5), SteeringEdit(kind, ("s",), direction, 0.0)]  # pyright: ignore
        edited = steering(edits, 2, of_both)(x)
        assert edited is not None
        torch.testing.assert_close((edited @ u)[:2][where], expected((x @ u)[:2][where]))
        torch.testing.assert_close(
            (edited - x) - ((edited - x) @ u)[..., None] * u, torch.zeros_like(x), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(edited[:2][~where], x[:2][~where])
        if kind != "clamp":
            torch.testing.assert_close(edited[2:], x[2:])


def test_difference_of_means_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    found = difference_of_means(rows, np.array([True, True, False, False]))
    assert found.dtype == torch.float64 and found.tolist() == [2.0, -2.0]
    with pytest.raises(ValueError, match="both sides"):
        difference_of_means(rows, np.ones(4, dtype=bool))


def test_a_probe_sees_through_noise_that_the_means_share() -> None:
    """Two sides differ along the first axis only, but the second, which tells nothing, has much more spread."""
    random = np.random.default_rng(0)
    positive = np.arange(400) % 2 == 0
    rows = random.normal(size=(400, 2)) * [0.5, 50] + np.where(positive, 1.0, -1.0)[:, None] * [1, 0]
    probe = probe_direction(torch.from_numpy(rows), positive)
    means = difference_of_means(torch.from_numpy(rows), positive)
    assert abs(probe[0]) / probe.norm() > 0.999 > abs(means[0]) / means.norm()
    assert float(probe @ probe) == pytest.approx(float(means @ probe)), "as long as the sides are apart along it"


@given(st.integers(0, 10_000), st.integers(0, 5))
def test_a_direction_is_its_part_in_a_span_and_what_is_orthogonal_to_it(seed: int, n_others: int) -> None:
    vector, *others = random_directions(n_others + 1, 8, seed)
    doubled = [*others, *others]  # saying it twice changes nothing
    inside = in_span(vector, doubled)
    for other in others:
        assert float((vector - inside) @ other) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(in_span(inside, others), inside)
    assert span_share(vector, doubled) == pytest.approx(float(inside @ inside), abs=1e-12)
    if others:
        assert span_share(3 * others[0] - others[-1] * 1.5, others) == pytest.approx(1)


def test_directions_of_dictionaries() -> None:
    import networkx as nx

    site = "blocks.1.hook_resid_post"
    dictionary = random_dictionary(site)
    graph = nx.DiGraph()
    graph.add_node("resid_post.1/F3", kind="feature", site=site, effect=2.0)
    graph.add_node("resid_post.1/F5", kind="feature", site=site, effect=-1.0)
    graph.add_node("resid_post.1/error", kind="error", site=site, effect=9.0)
    W = dictionary.W_dec.double()
    torch.testing.assert_close(circuit_directions(graph, {site: dictionary}), {site: 2 * W[3] - W[5]})
    with pytest.raises(UserError, match="F0 to F47"):
        feature_direction(dictionary, 48)
    graph.remove_nodes_from(["resid_post.1/F3", "resid_post.1/F5"])
    with pytest.raises(UserError, match="no features"):
        circuit_directions(graph, {site: dictionary})


def test_a_recording_is_what_single_runs_show(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt]
) -> None:
    sites = ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_post"]
    found = Recording(pd.DataFrame({"prompt": TEXTS}), prompts, *last_tokens(model, score, prompts, sites, 2))
    assert found.n_tokens == 2
    for i, prompt in enumerate(prompts):
        (batch,) = make_batches([prompt], TemplateLayout.of([prompt]), 1, model.device)
        seen: dict[str, torch.Tensor] = {}
        value = float(score_batch(model, score, batch, {site: recorder(seen, site) for site in sites}))
        assert found.scores[i] == pytest.approx(value, abs=1e-4)
        for site in sites:
            torch.testing.assert_close(found.at(site, -2)[i], seen[site][0, -2].double(), atol=1e-5, rtol=1e-4)
    norms = found.activations[sites[0]].double().norm(dim=-1)
    assert found.norm(sites[0]) == pytest.approx(float(norms.mean()))


def _frame(n: int = 40) -> pd.DataFrame:
    kind = np.resize(["toxic", "hard", "hard", "safe_80k"], n)
    return pd.DataFrame({"prompt": [f"p{i}" for i in range(n)], "dataset_type": kind, "refusal_label": kind == "toxic"})


def test_contrasts_are_balanced_and_stand_where_they_should() -> None:
    frame, scores = _frame(), np.random.default_rng(0).normal(size=40)
    refused = np.arange(40) < 13
    labels = make_contrast("toxic-safe", frame, scores, None, 0)
    assert labels.positive.sum() == 10 == len(labels.rows) - 10
    assert (frame["refusal_label"].to_numpy()[labels.rows] == labels.positive).all()
    behaviour = make_contrast("refused-complied", frame, scores, refused, 0)
    assert behaviour.positive.sum() == 13 and (refused[behaviour.rows] == behaviour.positive).all()
    by_score = make_contrast("hard-score", frame, scores, None, 0)
    assert set(frame["dataset_type"][by_score.rows]) == {"hard"} and by_score.positive.sum() == 10
    assert scores[by_score.rows[by_score.positive]].min() > scores[by_score.rows[~by_score.positive]].max()
    shuffled = by_score.shuffled(1)
    assert (shuffled.rows == by_score.rows).all() and (shuffled.positive != by_score.positive).any()
    assert shuffled.positive.sum() == 10
    wanted = np.arange(40) % 2 == 0
    assert set(by_score.among(wanted).rows) == set(by_score.rows) & set(np.flatnonzero(wanted))
    with pytest.raises(UserError, match="2 against 38"):
        make_contrast("refused-complied", frame, scores, np.arange(40) < 2, 0)


def test_the_best_candidate_has_the_widest_swing_of_those_that_pass() -> None:
    table = pd.DataFrame(
        {
            "layer": [1, 1, 2, 3],
            "removed": [0.5, -1.0, -3.0, -2.0],
            "induced": [0.5, 1.0, 3.0, 2.0],
            "rejected": ["", "", "changes safe prompts (KL 0.300)", ""],
        }
    )
    kept = ranked(table)
    assert list(kept.index) == [3, 1, 0]
    assert best_per_layer(kept, 5) == [1, 3] and best_per_layer(kept, 1) == [3]
    with pytest.raises(UserError, match="of 1: 1 changes safe prompts;"):
        ranked(table.iloc[[2]])


def test_the_best_alpha_is_within_the_limit_where_one_is() -> None:
    changes = pd.DataFrame(
        {
            "intent": [FORCE, FORCE, FORCE, SUPPRESS, SUPPRESS, ""],
            "alpha": [0.1, 0.2, 0.3, -0.1, -0.2, 0.0],
            "changed_rate": [0.2, 0.8, 1.0, 0.5, 0.9, None],
            "loss_rise": [0.01, 0.1, 0.4, 0.6, 0.7, 0.0],
        }
    )
    assert best_alphas(changes, 0.15) == {FORCE: 0.2, SUPPRESS: -0.1}


def test_only_changes_in_the_intended_direction_count(
    model: Model, score: RefusalScore, prompts: list[TokenizedPrompt]
) -> None:
    dial = Dial(model, SteeringOptions(positions="last", reply_tokens=3), score, is_refusal)
    vector, site = random_directions(1, 32, 0)[0], "blocks.0.hook_resid_post"
    settings = [
        Setting("d", site, -1, alpha, SteeringEdit("add", (site,), vector, alpha)) for alpha in (-1.0, 0.0, 1.0)
    ]
    prepared = _prepared(model, prompts, "last", 1000)
    rows = sweep(dial, prepared, pd.DataFrame({"prompt": TEXTS}), settings, lambda _: None)
    assert len(rows) == 3 * len(TEXTS) and not rows["refused"].any(), "this model says nothing sensible"
    assert rows.groupby("intent")["eligible"].sum().to_dict() == {"": 0, FORCE: len(TEXTS), SUPPRESS: 0}
    rows["unsteered_refused"] = [True, True, False, False, False, False] * 3
    rows["refused"] = [True, False, True, False, False, True] * 3
    rows["eligible"] = [True, True, False, False, False, False] + [False] * 6 + [False, False, True, True, True, True]
    rows["changed"] = rows["eligible"] & (rows["refused"] != rows["unsteered_refused"])
    table = rates(rows, ["alpha", "intent"]).set_index("intent")
    assert table["rate"].tolist() == [0.5] * 3
    assert (table["changed"][SUPPRESS], table["eligible"][SUPPRESS]) == (1, 2)
    assert (table["changed"][FORCE], table["eligible"][FORCE]) == (2, 4)
    assert pd.isna(table["changed_rate"][""])


def test_intents_of_edits() -> None:
    def intent(kind: str, alpha: float) -> str:
        return Setting("d", "s", None, alpha, SteeringEdit(kind, ("s",), torch.ones(2), alpha)).intent  # pyright: ignore

    assert [intent("add", alpha) for alpha in (-1, 0, 1)] == [SUPPRESS, "", FORCE]
    assert [intent("clamp", alpha) for alpha in (-1, 0, 1)] == [SUPPRESS, SUPPRESS, FORCE]
    assert [intent("project-out", alpha) for alpha in (0, 1)] == ["", SUPPRESS]


def test_what_chance_does_is_of_the_control_s_directions_alone() -> None:
    names = ["random 0", "random 1", "shuffled labels 0", "shuffled labels 1"]
    table = pd.DataFrame({"direction": names, "changed_rate": [0.0, 0.5, 1.0, 0.2]})
    assert by_chance(table, RANDOM, "changed_rate") == (0.25, 0.5)
    assert by_chance(table, SHUFFLED, "changed_rate") == (0.6, 1.0)
    assert np.isnan(by_chance(table[:2], SHUFFLED, "changed_rate")).all()


def test_the_dial_that_an_edit_suggests() -> None:
    def dial(**values: object) -> list[float]:
        return SteeringOptions(**values).dial  # pyright: ignore

    assert dial() == [-0.32, -0.24, -0.16, -0.08, 0.0, 0.08, 0.16, 0.24, 0.32]
    assert dial(units="raw") == list(range(-4, 5)) and dial(edit="project-out") == [0, 0.5, 1]
    assert dial(alphas=[3.0], edit="clamp") == [3.0]
