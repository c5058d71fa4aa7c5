"""Transcoders: SAELens' own, on five architectures, from their files to the circuit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import random_model
from commands import sfc
from conftest import random_dictionary, random_transcoder
from test_edges import all_pairs
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.edge_ablation import edge_ablated_scores
from sfc.circuits.edge_kinds import site_pairs
from sfc.circuits.edges import Pair, edge_effects
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.gradients import score_gradients
from sfc.circuits.methods.attribution import attributed_effects
from sfc.circuits.nodes import Nodes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.spaces import NodeSpace, checked
from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.features.session import PromptSession
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.interventions import chained, recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.saes.architectures import read_config
from sfc.saes.dictionary import Transcoder, reconstruction
from sfc.saes.format import load_dictionary
from sfc.saes.nulls import random_dictionaries, rotated_dictionaries

TEXTS = ["Bake bread?", "How do I kill a process?", "hm"]
KINDS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]


def save_transcoder(
    folder: Path, kind: str, reads: str, writes: str, d_out: int = 32, **metadata: str
) -> torch.nn.Module:
    """One with random weights, written by SAELens."""
    from sae_lens.saes import transcoder as theirs

    name = kind.replace("jumprelu", "JumpReLU").title().replace("_", "").replace("Jumprelu", "JumpReLU")
    config = getattr(theirs, f"{name}Config")(d_in=32, d_out=d_out, d_sae=48, apply_b_dec_to_input=False)
    config.metadata.hook_name, config.metadata.hook_name_out = reads, writes
    for key, value in metadata.items():
        setattr(config.metadata, key, value)
    made = getattr(theirs, name)(config)
    random = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    made.save_model(folder)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_out", [32, 20])
def test_features_and_reconstruction_are_those_of_saelens(tmp_path: Path, kind: str, d_out: int) -> None:
    reads, writes = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
    theirs = save_transcoder(tmp_path, kind, reads, writes, d_out)
    ours = load_dictionary(tmp_path)
    assert isinstance(ours, Transcoder) and (ours.reads, ours.writes, ours.site) == (reads, writes, writes)
    x, written = torch.randn(50, 32), torch.randn(50, d_out)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=1e-5, rtol=0)
        ours_out = reconstruction(ours, ours.encode_sparse(x), x, written)
        torch.testing.assert_close(ours_out, theirs(x), atol=1e-5, rtol=0)
    assert ours.parts == ("mlp_out.3/error", "mlp_out.3/skip")[: 2 if "skip" in kind else 1]


@pytest.mark.parametrize(
    ("reads", "hf", "expected"),
    [
        ("blocks.3.mlp.hook_in", "", "blocks.3.mlp.hook_in"),
        ("blocks.3.hook_resid_mid", "", "blocks.3.hook_resid_mid"),
        ("blocks.3.hook_mlp_in", "", "blocks.3.hook_resid_mid"),
        ("blocks.3.hook_mlp_in", "model.layers.3.pre_feedforward_layernorm.output", "blocks.3.mlp.hook_in"),
    ],
)
def test_what_is_read_has_one_name(tmp_path: Path, reads: str, hf: str, expected: str) -> None:
    save_transcoder(tmp_path, "transcoder", reads, "blocks.3.hook_mlp_out", **({"hf_hook_name": hf} if hf else {}))
    assert read_config(tmp_path).reads == expected


@pytest.mark.parametrize(
    ("reads", "writes"),
    [
        ("blocks.2.mlp.hook_in", "blocks.3.hook_mlp_out"),
        ("blocks.3.hook_resid_pre", "blocks.3.hook_mlp_out"),
        ("blocks.3.ln1.hook_normalized", "blocks.3.hook_attn_out"),
    ],
)
def test_other_ends_are_refused(tmp_path: Path, reads: str, writes: str) -> None:
    save_transcoder(tmp_path, "transcoder", reads, writes)
    with pytest.raises(UserError, match="write the output of an MLP"):
        load_dictionary(tmp_path)


def test_without_its_output_or_with_a_normalisation_it_is_refused(tmp_path: Path) -> None:
    save_transcoder(tmp_path, "transcoder", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    path = tmp_path / "cfg.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "normalize_activations": "layer_norm"}))
    with pytest.raises(UserError, match="normalises what it reads"):
        load_dictionary(tmp_path)
    del saved["metadata"]["hook_name_out"]
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="hook_name_out is missing"):
        load_dictionary(tmp_path)


@pytest.fixture(scope="module", params=["Llama", "GPT2", "GPTNeoX", "Qwen2", "Gemma2"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    random_model(request.param, folder, initializer_range=0.2)
    return load_model(ModelConfig(source=str(folder), template="plain", refusal_tokens=["I"]))  # pyright: ignore


def spaces_of(model: Model) -> dict[str, NodeSpace]:
    """SAEs of the stream and transcoders of the MLPs, one that reads before the norm where that has a site."""
    at = {
        name: f"blocks.{name[-1]}.hook_{name[:-2]}"
        for name in ("resid_post.0", "mlp_out.1", "resid_post.1", "mlp_out.2")
    }
    before_norm = "blocks.2.hook_resid_mid"
    reads = before_norm if before_norm in model.hooks else "blocks.2.ln2.hook_normalized"
    spaces = {
        at["resid_post.0"]: random_dictionary(at["resid_post.0"]),
        at["mlp_out.1"]: random_transcoder("blocks.1.ln2.hook_normalized", at["mlp_out.1"], skip=True, seed=1),
        at["resid_post.1"]: random_dictionary(at["resid_post.1"], seed=2),
        at["mlp_out.2"]: random_transcoder(reads, at["mlp_out.2"], skip=False, seed=3),
        "blocks.2.hook_resid_post": random_dictionary("blocks.2.hook_resid_post", seed=4),
    }
    return checked(spaces, model)


def asked(problem: Problem, model: Model) -> Problem:
    """The problem put to a model with transcoders."""
    prompts, spaces = model.tokenize(TEXTS), spaces_of(model)
    layout = TemplateLayout.of(prompts)
    batches = make_batches(prompts, layout, 80, model.device)
    ablation = Ablation(Nodes.of_spaces(spaces), spaces, mean_baseline(model, spaces, batches, layout), "node")
    runs = PromptRuns.of(model, batches, ablation.nodes.sites[0])
    return replace(problem, model=model, score=RefusalScore.of(model), ablation=ablation, runs=runs)


def test_law_ablating_nothing_by_means_changes_nothing_and_tables_add_up(problem: Problem, network: Model) -> None:
    problem = asked(problem, network)
    ablation, everything = problem.ablation, np.ones((1, problem.ablation.nodes.n_nodes), dtype=bool)
    full = full_scores(network, problem.score, problem.runs)
    packed = next(iter(problem.runs))[0]
    acting = ablation.interventions(torch.ones(1, everything.size), torch.zeros_like(packed.lengths), packed)
    plain, kept = (last_logits(network, packed, each) for each in ({}, acting))
    torch.testing.assert_close(kept, plain, atol=1e-4, rtol=0)  # each replaced by what it is
    np.testing.assert_allclose(ablated_scores(network, problem.score, ablation, problem.runs, everything)[0], full)
    nothing = ablated_scores(network, problem.score, ablation, problem.runs, ~everything)[0]
    assert np.abs(nothing - full).max() > 0.01
    # Where all of a site is ablated, its activation is the mean one, however it is divided among nodes.
    whole = {site: random_dictionary(site, seed=9) for site in ablation.dictionaries}
    prompts, layout = network.tokenize(TEXTS), ablation.baseline.layout
    means = mean_baseline(network, whole, make_batches(prompts, layout, 80, network.device), layout)
    for site, space in ablation.dictionaries.items():
        (
            torch.testing.assert_close(
                ablation.ablated_activation(site, packed), means.activations(whole[site], packed), atol=1e-5, rtol=1e-4
            ),
            space,
        )


def test_law_effects_of_a_site_sum_to_those_of_what_is_written(problem: Problem, network: Model) -> None:
    problem = asked(problem, network)
    nodes, ablation = problem.ablation.nodes, problem.ablation
    for batch, cached in problem.runs:
        per_site = nodes.split(attributed_effects(problem, batch, cached).by_prompt)
        for site, (x, g, _) in score_gradients(problem, batch, cached).items():
            moved = torch.zeros_like(x)
            moved[batch.touchable] = x[batch.touchable] - ablation.ablated_activation(site, batch)
            torch.testing.assert_close(per_site[site].sum(1), (g * moved).sum((1, 2)), atol=1e-5, rtol=1e-3)


def test_law_out_edges_sum_to_the_effect_into_and_out_of_transcoders(problem: Problem, network: Model) -> None:
    problem = asked(problem, network)
    nodes, pairs = problem.ablation.nodes, all_pairs(problem)
    for batch, cached in problem.runs:
        effects = edge_effects(problem, batch, cached, pairs, 2000)
        expected = nodes.split(attributed_effects(problem, batch, cached).by_prompt)
        largest = max(effect.abs().max() for effect in expected.values())
        for site in nodes.sites[:-1]:
            out = [between.sum(2) for pair, between in zip(pairs, effects, strict=True) if pair.upstream == site]
            assert (torch.stack(out).sum(0) - expected[site]).abs().max() <= 1e-4 * largest
        # A few nodes at once, of both sides and of every kind, have the same edges.
        for pair, whole in zip(pairs, effects, strict=True):
            few = [torch.tensor([*range(3), *range(48, len(nodes_of))]) for nodes_of in (pair.sources, pair.targets)]
            part = edge_effects(problem, batch, cached, [pair._replace(sources=few[0], targets=few[1])], 100)[0]
            torch.testing.assert_close(part, whole[:, few[0]][:, :, few[1]], atol=1e-5 * float(largest), rtol=1e-3)
            no_error = pair._replace(sources=few[0][[0, -1]], targets=few[1][[1, -1]])
            part = edge_effects(problem, batch, cached, [no_error], 100)[0]
            ends = no_error.sources, no_error.targets
            torch.testing.assert_close(part, whole[:, ends[0]][:, :, ends[1]], atol=1e-5 * float(largest), rtol=1e-3)


@pytest.mark.parametrize("mode", ["node", "ablate"])
def test_law_all_edges_are_the_circuit_of_nodes(problem: Problem, network: Model, mode: str) -> None:
    problem = asked(problem, network)
    problem = replace(problem, ablation=replace(problem.ablation, error_mode=mode))
    nodes = problem.ablation.nodes
    member = np.random.default_rng(0).random(nodes.n_nodes) < 0.3
    writes, site = {(u, d) for u, d, _ in site_pairs(nodes)}, nodes.site_numbers
    members = np.flatnonzero(member).tolist()
    edges = [(u, d) for u in members for d in members if (site[u], site[d]) in writes]
    of_nodes = ablated_scores(network, problem.score, problem.ablation, problem.runs, member[None])[0]
    np.testing.assert_allclose(edge_ablated_scores(problem, problem.runs, members, edges), of_nodes, atol=1e-4)
    fewer = edge_ablated_scores(problem, problem.runs, members, edges[::3])
    assert np.abs(fewer - of_nodes).max() > 1e-3


def moved_score(
    problem: Problem, batch: Batch, pair: Pair, x: Tensor, through: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """The score with x at the upstream site while only `through`, of what is read and written downstream, hears it.

    Everything is run twice from the tokens: once to see what arrives, with the sites between held at their values, and
    once with `through` of that written downstream.
    """
    model, space = problem.model, problem.ablation.dictionaries[pair.downstream]
    clean, seen = {}, {}
    last_logits(model, batch, {site: recorder(clean, site) for site in (*pair.stops, space.reads, pair.downstream)})
    acting = {stop: lambda _, stop=stop: clean[stop] for stop in pair.stops}
    acting[pair.upstream] = lambda activation: torch.cat([activation[:, :1], x[None]], 1)
    for site in (space.reads, pair.downstream):
        acting[site] = chained(acting.get(site), recorder(seen, site))
    last_logits(model, batch, acting)
    written = through(seen[space.reads][0, 1:], seen[pair.downstream][0, 1:])
    put = {pair.downstream: lambda activation: torch.cat([activation[:, :1], written[None]], 1)}
    return float(problem.score(last_logits(model, batch, put), batch))


@torch.no_grad()
def test_edges_are_what_finite_differences_say(problem: Problem, network: Model) -> None:
    """Move x a little towards the baseline of u, let only d hear of it, and score; d a feature, the error, the skip."""
    problem = asked(problem, network)
    for space in problem.ablation.dictionaries.values():
        if isinstance(space, Transcoder):
            space.threshold.zero_()  # so that features do not jump
    ablation, layout = problem.ablation, problem.ablation.baseline.layout
    [batch] = make_batches(network.tokenize(TEXTS[:1]), layout, 1, network.device)
    cached = PromptRuns.of(network, [batch], ablation.nodes.sites[0]).cached_residuals[0]
    pairs = [pair for pair in all_pairs(problem) if "mlp_out" in pair.upstream + pair.downstream]
    assert len(pairs) >= 4
    for pair, edges in zip(pairs, edge_effects(problem, batch, cached, pairs, 2000), strict=True):
        above, below = ablation.dictionaries[pair.upstream], ablation.dictionaries[pair.downstream]
        clean: dict[str, Tensor] = {}
        last_logits(
            network,
            batch,
            {each: recorder(clean, each) for each in (above.reads, pair.upstream, below.reads, pair.downstream)},
        )
        x, read, y, read_next = (
            clean[each][0, 1:] for each in (pair.upstream, above.reads, pair.downstream, below.reads)
        )
        features = torch.arange(above.d_sae)
        moved = above.encode(read) - ablation.baseline.features_at(above, batch, features)

        def error(read: Tensor, written: Tensor, below=below) -> Tensor:
            return written - reconstruction(below, below.encode_sparse(read), read, written)

        def through(
            d: int, read: Tensor, written: Tensor, below=below, y=y, read_next=read_next, error=error
        ) -> Tensor:
            if d < below.d_sae:
                return y + (below.encode(read)[:, d] - below.encode(read_next)[:, d])[:, None] * below.W_dec[d]
            if d == below.d_sae:
                return y + error(read, written) - error(read_next, y)
            return y + (read - read_next) @ below.W_skip.T  # pyright: ignore

        wanted = edges[0, :48].abs()
        strongest = [divmod(place, wanted.shape[1]) for place in wanted.flatten().topk(3).indices.tolist()]
        strongest += [(int(wanted[:, part].argmax()), part) for part in range(48, wanted.shape[1])]
        for u, d in strongest:
            up, down = (
                moved_score(
                    problem, batch, pair, x - step * moved[:, [u]] * above.W_dec[u], lambda r, w, d=d: through(d, r, w)
                )
                for step in (4e-3, -4e-3)
            )
            assert edges[0, u, d].item() == pytest.approx((down - up) / 8e-3, rel=0.05, abs=2e-3)


def test_what_is_read_divided_by_its_norm_is_what_the_mlp_reads_before_the_gain(network: Model) -> None:
    seen: dict[str, Tensor] = {}
    [batch] = make_batches(network.tokenize(TEXTS[:1]), TemplateLayout.of(network.tokenize(TEXTS)), 1, network.device)
    sites = ["blocks.1.ln2.hook_in", "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"]
    last_logits(network, batch, {site: recorder(seen, site) for site in sites[1:]})
    normalized, mlp_in = (seen[site][0] for site in sites[1:])
    gain = mlp_in / normalized  # the same at every token, but for a bias
    bias = network.hooks[sites[1]] is not None and network.architecture in ("GPT2LMHeadModel", "GPTNeoXForCausalLM")
    if not bias:
        torch.testing.assert_close(gain, gain[:1].expand_as(gain), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(normalized.square().mean(-1), torch.ones(len(normalized)), atol=1e-2, rtol=0)


def test_features_of_single_prompts_are_read_and_scaled_where_they_are(network: Model) -> None:
    spaces = spaces_of(network)
    session = PromptSession(network, RefusalScore.of(network), spaces)
    site = "blocks.1.hook_mlp_out"
    space = spaces[site]
    [batch] = make_batches(
        network.tokenize(TEXTS[:1]), TemplateLayout.of(network.tokenize(TEXTS[:1])), 1, network.device
    )
    seen: dict[str, Tensor] = {}
    last_logits(network, batch, {space.reads: recorder(seen, space.reads)})
    values = space.encode(seen[space.reads][0].float())
    feature = int(values[1:].sum(0).argmax())
    fires = session.fires(TEXTS[0], [f"mlp_out.1/F{feature}"])
    np.testing.assert_allclose(fires.values[1:, 0], values[1:, feature].numpy(), atol=1e-5)

    def off(activation: Tensor) -> Tensor:
        without = activation - values[None, :, [feature]] * space.W_dec[feature]
        return torch.cat([activation[:, :1], without[:, 1:]], 1)

    expected = float(RefusalScore.of(network)(last_logits(network, batch, {site: off}))[0])
    assert session.score_of(TEXTS[0], {f"mlp_out.1/F{feature}": 0.0}) == pytest.approx(expected, abs=1e-4)
    assert session.score_of(TEXTS[0], {}) != pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_turned_transcoders_do_turned_what_they_did() -> None:
    site = "blocks.1.hook_mlp_out"
    trained: dict[str, NodeSpace] = {site: random_transcoder("blocks.1.mlp.hook_in", site, skip=True)}
    turned, plain = rotated_dictionaries(trained, seed=1)[site], trained[site]
    rotation = turned.rotation  # pyright: ignore
    read, written = torch.randn(2, 9, 32)
    torch.testing.assert_close(turned.encode(read), plain.encode(read @ rotation), atol=1e-5, rtol=1e-4)
    ours = reconstruction(turned, turned.encode_sparse(read), read, written) - turned.b_dec
    theirs = reconstruction(plain, plain.encode_sparse(read @ rotation), read @ rotation, written) - plain.b_dec
    torch.testing.assert_close(ours, theirs @ rotation.T, atol=1e-4, rtol=1e-3)
    assert turned.parts == plain.parts and turned.reads == plain.reads
    with pytest.raises(UserError, match="no fixed number"):
        random_dictionaries(trained, seed=1)


def test_the_command_finds_circuits_of_transcoders(tmp_path: Path) -> None:
    folder, root = tmp_path / "transcoders", tmp_path / "root"
    root.mkdir()
    for layer, (kind, reads) in enumerate(
        (("jumprelu_skip_transcoder", "mlp.hook_in"), ("transcoder", "ln2.hook_normalized"))
    ):
        writes = f"blocks.{layer}.hook_mlp_out"
        save_transcoder(folder / writes, kind, f"blocks.{layer}.{reads}", writes)
    settings = [
        f"saes.source={folder}",
        "activations.kind=mlp_out",
        "saes.min_variance_explained=-1e9",
        "evaluation.sizes=[64]",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    common = ("--preset", "tiny", "--json", *options)
    found = sfc("discover", "--category", "violence", *common, root=root).result
    circuit = json.loads((root / found["files"]["circuit"]).read_text())
    assert {node["site"] for node in circuit["nodes"]} <= {f"blocks.{layer}.hook_mlp_out" for layer in (0, 1)}
    assert found["n_nodes"] > 0 and found["n_edges"] > 0
    [store] = (root / "activations").glob("tiny-*")
    sites = json.loads((store / "manifest.json").read_text())["sites"]
    assert {"blocks.0.mlp.hook_in", "blocks.1.ln2.hook_normalized"} < set(sites)
    quality = pd.read_csv(next((root / "saes").glob("tiny-*")) / "quality.csv")
    assert quality.loc[quality["role"] == "all", "loss_recovered"].notna().all()
    again = sfc("discover", "--category", "violence", *common, root=root)
    assert again.result["n_nodes"] == found["n_nodes"] and again.loads == 0, "up to date"
    by_correlation = sfc("discover", "--category", "violence", "--method", "correlation", *common, root=root)
    assert by_correlation.status == 0, by_correlation.stderr
