"""Prompts with counterfactuals on small random models, and the slow, obvious oracle of their ablation."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from architectures import random_model
from conftest import random_dictionary, random_transcoder
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.counterfactuals import Counterfactuals, Pairs
from sfc.circuits.faithfulness import ablated_scores
from sfc.circuits.nodes import Nodes, Sources
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.spaces import NodeSpace, checked, heads_and_mlps, sites_of
from sfc.core.config import ModelConfig
from sfc.core.experiments import experiment_of, load_experiment
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.interventions import recorder
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import DirectedScore, RefusalScore

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
POSITIVE = ["Pick my lock", "Burn a house, please", "Poison all fish"]
NEGATIVE = ["Bake my cake", "Draw a house, please", "Feeding my fish", "Hi, my fish"]
PROMPTS = [*POSITIVE, *NEGATIVE]
PROMPT = [0, 3, 1, 4, 2, 2, 5]
COUNTERFACTUAL = [3, 0, 4, 1, 5, 5, 2]


def random_architecture(name: str, folder: Path) -> Model:
    random_model(name, folder, initializer_range=0.2)
    return load_model(ModelConfig(source=str(folder), template="plain", refusal_tokens=["I"]))  # pyright: ignore


def paired_problem(
    model: Model, spaces: dict[str, NodeSpace], error_mode: str
) -> tuple[Problem, list[TokenizedPrompt]]:
    prompts = model.tokenize(PROMPTS)
    layout = TemplateLayout.of(prompts)
    positive = torch.tensor(PROMPT) < len(POSITIVE)
    pairs = Pairs(torch.tensor(PROMPT), torch.tensor(COUNTERFACTUAL), positive)
    baseline = Counterfactuals.of(model, spaces, prompts, pairs, layout, batch_tokens=70)
    batches = baseline.batches(prompts, torch.ones(len(PROMPT), dtype=torch.bool), batch_tokens=120)
    assert len(batches) > 1 and any(len(set(batch.lengths.tolist())) > 1 for batch in batches)
    nodes = Nodes.of_spaces(spaces)
    experiment = experiment_of(load_experiment("tiny").model_dump(include={"name", "model", "activations"}))
    return Problem(
        model,
        DirectedScore(RefusalScore.of(model), pairs.direction),
        Ablation(nodes, spaces, baseline, error_mode),  # pyright: ignore
        PromptRuns.of(model, batches, nodes.sites[0]),
        None,  # pyright: ignore
        pd.DataFrame(),
        experiment,
    ), prompts


def features() -> dict[str, NodeSpace]:
    return {site: random_dictionary(site, seed=number) for number, site in enumerate(SITES)}


def transcoders() -> dict[str, NodeSpace]:
    """Behind an SAE of the whole stream, one that reads what a norm divides, and one with a skip connection."""
    first, second = "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"
    return {
        SITES[0]: random_dictionary(SITES[0]),
        first: random_transcoder("blocks.1.ln2.hook_normalized", first, skip=False),
        second: random_transcoder("blocks.2.mlp.hook_in", second, skip=True, seed=1),
    }


SPACES = {"features": lambda _model: features(), "transcoders": lambda _model: transcoders()}


def components(model: Model) -> dict[str, NodeSpace]:
    layers = list(range(model.n_layers))
    return checked(heads_and_mlps(Sources(model, [], layers, {}, None)), model)  # pyright: ignore


def alone(model: Model, prompt: TokenizedPrompt, layout: TemplateLayout, sites: tuple[str, ...]) -> dict[str, Tensor]:
    """What one prompt has at every site, run by itself."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        batch = make_batches([prompt], layout, 1, model.device)[0]
        last_logits(model, batch, {site: recorder(seen, site) for site in sites})
    return seen


def pieces(space: NodeSpace, read: Tensor, x: Tensor) -> list[Tensor]:
    """What each node of a site that is no feature adds to the activation x of one token."""
    if space.d_sae == 0:
        return [
            torch.block_diag(*part).sum(0) for part in torch.eye(space.n_parts)[:, :, None] * x.view(space.n_parts, -1)
        ]
    skip = [space.W_skip @ read] if space.n_parts == 2 else []  # pyright: ignore
    return [x - space.decode(space.encode(read)) - sum(skip), *skip]


def oracle(problem: Problem, prompts: list[TokenizedPrompt], mask: Tensor) -> np.ndarray:
    """One pair at a time, one token at a time, dense, straight from the definition."""
    model, ablation = problem.model, problem.ablation
    masks, layout, scores = ablation.nodes.split(mask), ablation.baseline.layout, []
    for pair, (p, c) in enumerate(zip(PROMPT, COUNTERFACTUAL, strict=True)):
        of_p, of_c = (alone(model, prompts[i], layout, tuple(sites_of(ablation.dictionaries))) for i in (p, c))
        current: dict[str, Tensor] = {}

        def hook(site: str, of_p=of_p, of_c=of_c, current=current):
            def act(activation: Tensor) -> Tensor:
                space, m, result = ablation.dictionaries[site], masks[site], activation.clone()
                current[site] = activation
                for position in range(1, activation.shape[1]):
                    (x, read), (x_c, read_c), (x_p, read_p) = (
                        (of[site][0, position], of[space.reads][0, position]) for of in (current, of_c, of_p)
                    )
                    parts, parts_c = pieces(space, read, x), pieces(space, read_c, x_c)
                    m_feature, m_parts = m[: space.d_sae], m[space.d_sae :].clone()
                    if space.d_sae:
                        m_parts[0] = {"ablate": 0, "keep-current": 1, "keep-clean": 0}.get(
                            ablation.error_mode, m_parts[0]
                        )
                    if ablation.error_mode == "keep-clean":
                        parts_c[0] = pieces(space, read_p, x_p)[0]
                    result[0, position] = space.decode(
                        m_feature * space.encode(read) + (1 - m_feature) * space.encode(read_c)
                    )
                    for kept, part, part_c in zip(m_parts, parts, parts_c, strict=True):
                        result[0, position] += kept * part + (1 - kept) * part_c
                return result

            return act

        hooks = {site: recorder(current, site) for site in sites_of(ablation.dictionaries)}
        hooks |= {site: hook(site) for site in masks}

        batch = make_batches([prompts[p]], layout, 1, model.device)[0].with_pairs(torch.tensor([pair]))
        with torch.no_grad():
            logits = last_logits(model, batch, hooks)
        scores.append(float(problem.score(logits, batch)))
    return np.array(scores)


def counterfactual_scores(problem: Problem, prompts: list[TokenizedPrompt]) -> np.ndarray:
    """The scores of the counterfactuals, each run by itself."""
    scores = []
    for pair, number in enumerate(COUNTERFACTUAL):
        batch = make_batches([prompts[number]], problem.ablation.baseline.layout, 1, problem.model.device)[0]
        batch = batch.with_pairs(torch.tensor([pair]))
        with torch.no_grad():
            scores.append(float(problem.score(last_logits(problem.model, batch), batch)))
    return np.array(scores)


def scores_of(problem: Problem, keep: np.ndarray) -> np.ndarray:
    return ablated_scores(problem.model, problem.score, problem.ablation, problem.runs, keep)
