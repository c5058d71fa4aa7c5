"""The contrast of a model with the one it was trained from: laws that tell the answer, and the command."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import sfc
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sfc.circuits.options import base_model
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.interventions import recorder
from sfc.models.loading import load_model
from sfc.models.running import run_to
from sfc.models.score import RefusalScore, score_prompts
from sfc.models.sources import tiny_model_folder
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover.base import base_changes
from sfc.studies.discover.problem import prepare_problem

COMMAND = ("--preset", "tiny", "--contrast", "model-base", "--json")
SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other attention and MLPs: what training changed."""
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder())
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            weight.data += 0.5 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(folder)
    for file in tiny_model_folder().glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_bytes((tiny_model_folder() / "chat_template.jinja").read_bytes())
    return folder


@pytest.fixture(scope="module")
def discovered(root: Path, base: Path) -> dict:
    return sfc("discover", *COMMAND, "--method", "attribution", "--set", f"discovery.base={base}", root=root).result


def test_with_all_nodes_swapped_one_model_is_the_other(discovered: dict, base: Path) -> None:
    """Both share the unembedding, and the last site is the last layer: its values at the last token decide."""
    swapped = discovered["base"]
    assert discovered["f_empty"] == pytest.approx(swapped["f_base"], abs=1e-3)
    assert swapped["f_base_with_all"] == pytest.approx(discovered["f_model"], abs=1e-3)
    assert abs(swapped["f_base"] - discovered["f_model"]) > 0.01
    prompts = pd.read_csv(Path(discovered["files"]["circuit"]).with_name("prompts.csv"))
    texts = prompts.loc[(prompts["split"] == "test") & prompts["refusal_label"], "prompt"].tolist()
    config = load_experiment("tiny").model
    model = load_model(config.model_copy(update={"source": str(base)}))
    tokenized = model.tokenize(texts)
    scores = score_prompts(
        model, RefusalScore.of(model), make_batches(tokenized, TemplateLayout.of(tokenized), 300, model.device)
    )
    assert swapped["f_base"] == pytest.approx(scores.mean(), abs=1e-4)


def test_the_table_says_where_features_fire_in_both_models(discovered: dict, root: Path, base: Path) -> None:
    table = pd.read_csv(discovered["files"]["base"]).set_index("node")
    assert len(table) == discovered["n_nodes"] == sum(discovered["base"]["changes"].values())
    run = Run(load_experiment("tiny", ["discovery.contrast=model-base", f"discovery.base={base}"]), root)
    problem, _, _ = prepare_problem(Session(run), "violence")
    named = {"fires": problem.model, "fired": load_model(base_model(run.experiment))}
    for column, model in named.items():
        firing = {site: [] for site in SITES}
        for batch in problem.runs.batches:
            for row in range(len(batch.lengths)):
                seen: dict[str, torch.Tensor] = {}
                run_to(model, batch.select(torch.tensor([row])), {s: recorder(seen, s) for s in SITES}, SITES[-1])
                for site in SITES:
                    features = problem.ablation.dictionaries[site].encode(seen[site][0, 1 : batch.lengths[row]])
                    firing[site].append((features > 0).any(0))
        for node in table.index[~table[column].isna()]:
            site, feature = f"blocks.{node[11]}.hook_resid_post", int(node.partition("/F")[2])
            share = np.mean([bool(fires[feature]) for fires in firing[site]])
            assert table.loc[node, column] == pytest.approx(share, abs=1e-4), node
    appears = table["fires"] > 5 * table["fired"]
    assert (table.loc[appears, "change"] == "appears").all() and (
        table.loc[table["fires"].isna(), "change"] == "not a feature"
    ).all()


def test_evaluate_judges_the_circuit_against_the_same_base(discovered: dict, root: Path, base: Path) -> None:
    ran = sfc("evaluate", *COMMAND, "--set", f"discovery.base={base}", discovered["files"]["circuit"], root=root)
    (judged,) = ran.result["circuits"]
    for figure in ("f_model", "f_empty", "f_circuit", "f_complement"):
        assert judged[figure] == pytest.approx(discovered[figure], abs=1e-3)


def test_nothing_changes_between_a_model_and_itself(root: Path, discovered: dict) -> None:
    """Only what lies in the content is pooled and thereby moved."""
    same = [f"discovery.base={tiny_model_folder()}", "discovery.contrast=model-base"]
    run = Run(load_experiment("tiny", same), root)
    session = Session(run)
    problem, test_runs, _ = prepare_problem(session, "violence")
    table, figures = base_changes(session, problem, test_runs, range(problem.ablation.nodes.n_nodes))
    assert set(table["change"]) <= {"stays", "not a feature"}
    np.testing.assert_array_equal(table["fires"], table["fired"])
    np.testing.assert_allclose(table["effect"], -table["effect_in_base"], atol=1e-6)
    assert figures["f_base"] == pytest.approx(discovered["f_model"], abs=1e-3)


def test_a_model_that_is_no_base_is_refused(root: Path, tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    for file in [*tiny_model_folder().glob("*token*"), tiny_model_folder() / "chat_template.jinja"]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ran = sfc("discover", *COMMAND, "--method", "attribution", "--set", f"discovery.base={tmp_path}", root=root)
    assert ran.status == 2 and "layers of width 16" in ran.stderr and "Traceback" not in ran.stderr


def test_the_contrast_needs_a_base_and_a_method_that_runs_both() -> None:
    with pytest.raises(UserError, match=r"give discovery\.base"):
        load_experiment("tiny", ["discovery.contrast=model-base"])
    with pytest.raises(UserError, match="one model alone"):
        load_experiment("tiny", ["discovery.contrast=model-base", "discovery.base=x", "discovery.method=correlation"])
    with pytest.raises(UserError, match="has no base model"):
        load_experiment("tiny", ["discovery.base=x"])
    with_adapter = load_experiment("smollm2", ["discovery.contrast=model-base"])
    assert base_model(with_adapter) == load_experiment("smollm2-base").model
    assert with_adapter.discovery.baseline_choice == "base"


def test_categories_cannot_be_compared_against_the_base(root: Path) -> None:
    ran = sfc("compare", "--categories", "violence,privacy", *COMMAND, "--set", "discovery.base=x", root=root)
    assert ran.status == 2 and "is not the same" in ran.stderr
