"""Presets of models whose weights are elsewhere: they fit the models' shapes, and the whole study runs on small ones.

Each small model has the real configuration class, random weights, and a tokenizer that knows the family's special
tokens and writes its chat template.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import dictionary_repositories as repositories
import pytest
import torch
import transformers
from commands import assert_one_line, sfc
from hub import hub
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sfc.core.experiments import load_experiment, preset_names
from sfc.core.sites import layer_of
from sfc.data.render import Role
from sfc.models.loading import load_model, load_outline
from sfc.models.score import RefusalScore
from sfc.run import Run
from sfc.saes.format import Dictionaries
from sfc.saes.published import fetch_pretrained
from sfc.saes.source import source_of


class Family(NamedTuple):
    """What the models of one kind have in common."""

    architecture: str
    settings: dict[str, Any]
    special: list[str]
    begins_with: str | None = None
    """what the tokenizer puts before every text by itself"""
    chat_template: str | None = None


_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 1024,
}  # fmt: skip
PYTHIA = Family(
    "GPTNeoXForCausalLM",
    {
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "rotary_pct": 0.25,
        "use_parallel_residual": True, "tie_word_embeddings": False, "max_position_embeddings": 1024,
    },
    ["<|endoftext|>"],
)  # fmt: skip
GPT2 = Family("GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_positions": 1024}, ["<|endoftext|>"])
QWEN = Family(
    "Qwen2ForCausalLM",
    {**_GROUPED, "tie_word_embeddings": True},
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    # A part of the real one: the default system prompt that the preset leaves out.
    chat_template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
LLAMA3 = Family(
    "LlamaForCausalLM",
    {**_GROUPED, "tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE},
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    begins_with="<|begin_of_text|>",
)
LLAMA2 = Family(
    "LlamaForCausalLM",
    {**_GROUPED, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ["<s>", "</s>"],
    begins_with="<s>",
    chat_template="{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip()"
    " + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
)
# What the documented template does: the user's text, trimmed, in turns; no system prompt.
_TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA = {**_GROUPED, "head_dim": 8}
_GEMMA_TOKENS = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
GEMMA2 = Family("Gemma2ForCausalLM", _GEMMA, _GEMMA_TOKENS, "<bos>", _TURNS)
GEMMA3 = Family("Gemma3ForCausalLM", {**_GEMMA, "sliding_window": 64}, _GEMMA_TOKENS, "<bos>", _TURNS)
GEMMA3_SEEING = Family(
    "Gemma3ForConditionalGeneration",
    {
        **_GEMMA, "sliding_window": 64,
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 32, "patch_size": 8,
        },
    },
    _GEMMA_TOKENS,
    "<bos>",
    _TURNS,
)  # fmt: skip
FOREIGN = {
    "gemma3-270m-it": (GEMMA3, 18),
    "gemma3-270m-it-all": (GEMMA3, 18),
    "gemma3-270m-it-transcoders": (GEMMA3, 18),
    "gemma3-1b-it-transcoders": (GEMMA3, 26),
    "gemma3-4b-it-transcoders": (GEMMA3_SEEING, 34),
    "gemma3-1b-it": (GEMMA3, 26),
    "gemma3-1b-it-all": (GEMMA3, 26),
    "gemma3-4b-it": (GEMMA3_SEEING, 34),
    "gemma3-4b-it-all": (GEMMA3_SEEING, 34),
    "gemma2-2b-it": (GEMMA2, 26),
    "gemma2-9b-it": (GEMMA2, 42),
    "pythia-70m": (PYTHIA, 6),
    "pythia-160m": (PYTHIA, 12),
    "pythia-410m": (PYTHIA, 24),
    "gpt2": (GPT2, 12),
    "gpt2-medium": (GPT2, 24),
    "qwen2.5-0.5b-instruct": (QWEN, 24),
    "llama3.1-8b-instruct": (LLAMA3, 32),
    "llama2-7b-chat": (LLAMA2, 32),
}
"""the family and the number of layers of each preset's real model"""
PUBLISHED = [name for name in FOREIGN if load_experiment(name).saes.source is not None]
"""presets whose dictionaries others trained"""
RENDERED = {
    **dict.fromkeys(
        ["gemma3-270m-it", "gemma3-1b-it", "gemma3-4b-it", "gemma2-2b-it", "gemma2-9b-it"],
        "<bos><start_of_turn>user\nBake bread?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "pythia-70m": "User: Bake bread?\nAssistant:",
    "gpt2": "User: Bake bread?\nAssistant:",
    "qwen2.5-0.5b-instruct": "<|im_start|>user\nBake bread?<|im_end|>\n<|im_start|>assistant\n",
    "llama3.1-8b-instruct": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nBake bread?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama2-7b-chat": "<s>[INST] Bake bread? [/INST]",
}


def _tokenizer(family: Family) -> Any:
    """Bytes are tokens; the two merges make the refusal tokens of the presets single ones, as they really are."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠI", "As"]
    merges = [("Ġ", "I"), ("A", "s")]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in family.special])
    if family.begins_with:
        from tokenizers.processors import TemplateProcessing

        number = tokenizer.token_to_id(family.begins_with)
        tokenizer.post_processor = TemplateProcessing(
            single=f"{family.begins_with} $A", special_tokens=[(family.begins_with, number)]
        )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.begins_with, eos_token=family.special[-1]
    )
    wrapped.chat_template = family.chat_template
    return wrapped


def small_model(preset: str, folder: Path, n_layers: int) -> Path:
    """Save a small model of the preset's family."""
    family, _ = FOREIGN[preset]
    tokenizer = _tokenizer(family)
    kind = getattr(transformers, family.architecture)
    layers = "n_layer" if family.architecture.startswith("GPT2") else "num_hidden_layers"
    end = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, **family.settings}
    seen = {name: sizes.pop(name) for name in ("vision_config",) if name in sizes}
    sizes[layers] = n_layers
    config = kind.config_class(**({"text_config": sizes, **seen} if seen else sizes))
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("preset", [name for name in FOREIGN if name not in PUBLISHED])
def test_its_sites_are_late_layers_that_the_model_has(preset: str) -> None:
    layers, n_layers = load_experiment(preset).activations.layers, FOREIGN[preset][1]
    assert layers == list(range(layers[0], n_layers)) and n_layers / 2 <= layers[0] <= 0.67 * n_layers


def listed(source: str) -> tuple[str, str, str]:
    """What SAELens' list says of a release and an id: its loader, the repository, and the path in it."""
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
    from sae_lens.loading.pretrained_saes_directory import get_repo_id_and_folder_name

    release, _, sae_id = source.partition("/")
    return get_conversion_loader_name(release), *get_repo_id_and_folder_name(release, sae_id)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_its_dictionaries_are_in_saelens_list_and_of_its_model_between_a_quarter_and_two_thirds(preset: str) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    experiment, n_layers = load_experiment(preset), FOREIGN[preset][1]
    assert experiment.saes.source is not None
    layers, neuronpedia = experiment.activations.layers, set()
    assert layers[0] >= 0.2 * n_layers and layers[-1] <= 0.67 * n_layers
    for site in experiment.activations.sites:
        source = source_of(experiment.saes.source, site)
        loader, _, path = listed(source)
        release, _, sae_id = source.partition("/")
        published = get_pretrained_saes_directory()[release]
        neuronpedia.add(bool(published.neuronpedia_id[sae_id]))
        model = experiment.model.source.rpartition("/")[2].lower().replace("gpt2", "gpt2-small")
        of_base = ("gemma-2-2b-it", "llama-3.1-8b-instruct")  # trained on the base model, as the presets say
        its_model = published.model.rpartition("/")[2].lower()
        assert its_model == (model.removesuffix("-it").removesuffix("-instruct") if model in of_base else model)
        if loader != "sae_lens":
            number = re.findall(r"layer_(\d+)|-L(\d+)R", path)[0]
            assert int("".join(number)) == layer_of(site), path
    assert neuronpedia == {not preset.endswith(("-all", "-transcoders"))}


def published_dictionary(root: Path, source: str, site: str, d_in: int, seed: int) -> None:
    """Write a dictionary of `d_in` dimensions where a hub has the real one, in its layout."""
    loader, repository, path = listed(source)
    folder, tensors = root / repository / path, repositories.weights(d_in, 96, seed)
    if folder.exists():
        return
    if loader == "gemma_2":
        repositories.gemma_scope(folder, tensors)
    elif loader == "gemma_3":
        repositories.gemma_scope_2(folder, tensors)
    elif loader == "llama_scope":
        repositories.llama_scope(folder, tensors, site)
    elif "v5-32k" in source:
        own = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8}, "normalize_activations": "layer_norm"}
        repositories.sae_lens(folder, tensors, "standard", site, **own)
    else:
        repositories.sae_lens(folder, tensors, "standard", site)


KINDS = (
    "gemma3-270m-it", "gemma3-270m-it-transcoders", "gemma3-4b-it-all", "gemma2-2b-it", "llama3.1-8b-instruct", "gpt2",
    "pythia-70m",
)  # fmt: skip
"""presets of which each has a class of models, a layout of dictionaries or sites that no other of them has"""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_dictionaries_are_fetched_and_a_circuit_of_them_is_found(preset: str, tmp_path: Path) -> None:
    """On a small model of the real class, a layer deeper than the sites, by way of a hub with the real repositories'
    layout; circuits, of two layers, for one preset of each kind.
    """
    layers = load_experiment(preset).activations.layers[: 2 if preset in KINDS else 1]
    source = small_model(preset, tmp_path / "model", layers[-1] + 2)
    values = {
        "model.source": source, "model.dtype": "float32", "prompts.limit": 6, "activations.layers": layers,
        "activations.dtype": "float32", "saes.min_variance_explained": -1e9, "learned_mask.steps": 2,
        "evaluation.sizes": [4, 16], "evaluation.min_denominator": 1e-6, "evaluation.replies": 0,
        "evaluation.random_draws": 2, "evaluation.null_draws": 0, "discovery.checked_nodes": 2,
    }  # fmt: skip
    experiment = load_experiment(preset, [f"{key}={value}" for key, value in values.items()])
    assert experiment.saes.source is not None
    outline = load_outline(experiment.model)
    sources = {site: source_of(experiment.saes.source, site) for site in experiment.activations.sites}
    for number, (site, told) in enumerate(sources.items()):
        published_dictionary(tmp_path / "hub", told, site, outline.width(site), number)
    overrides = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    folder = Run(experiment, tmp_path).saes.folder
    with hub(tmp_path / "hub"):
        if preset in KINDS:
            asked = ("discover", "--category", "violence")
            result = sfc(*asked, "--preset", preset, "--json", *overrides, root=tmp_path).result
            assert result["preset"] == preset and result["n_nodes"] > 0
        else:
            assert sfc("collect", "--preset", preset, *overrides, root=tmp_path).status == 0
            for site, told in sources.items():
                fetch_pretrained(told, folder / site)
    for site, dictionary in Dictionaries(folder, experiment.activations.sites).items():
        assert (dictionary.site, dictionary.d_in) == (site, outline.width(site))


def test_every_preset_is_known_here_or_needs_no_network() -> None:
    assert set(preset_names()) == {*FOREIGN, "tiny", "smollm2", "smollm2-base"}


def test_weights_that_are_not_here_and_cannot_be_fetched_are_one_line(tmp_path: Path) -> None:
    with hub(tmp_path / "empty"):
        finished = sfc("behaviour", "--preset", "gpt2", root=tmp_path)
    assert_one_line(finished, "cannot load model 'openai-community/gpt2'")


@pytest.mark.parametrize("preset", RENDERED)
def test_prompts_are_rendered_as_the_model_wants_them_and_refusal_tokens_are_single(
    preset: str, tmp_path: Path
) -> None:
    overrides = [f"model.source={small_model(preset, tmp_path, 1)}", "model.dtype=float32"]
    model = load_model(load_experiment(preset, overrides).model)
    prompt = model.tokenize(["Bake bread?"])[0]
    assert model.tokenizer.decode(prompt.ids) == RENDERED[preset], "and nothing twice, such as a first token"
    assert model.tokenizer.decode(prompt.ids[prompt.roles == Role.CONTENT]).strip() == "Bake bread?"
    assert (prompt.roles == Role.SUFFIX).any()
    assert len(RefusalScore.of(model).tokens) == len(model.config.refusal_tokens)


@pytest.mark.parametrize("preset", ["pythia-70m", "gpt2", "qwen2.5-0.5b-instruct", "llama3.1-8b-instruct"])
def test_the_whole_study_runs_on_the_architecture(preset: str, tmp_path: Path) -> None:
    n_layers = 4
    source = small_model(preset, tmp_path / "model", n_layers)
    values = {
        "model.source": source, "model.dtype": "float32", "prompts.limit": 6, "patching.limit": 12,
        "patching.require": "score", "patching.components": "[head, mlp]", "patching.layers": [n_layers - 1],
        "activations.layers": [n_layers - 2, n_layers - 1], "activations.dtype": "float32",
        "saes.source": "null", "saes.dtype": "float32", "saes.steps": 20,
        "saes.k": 4, "saes.expansion": 2, "saes.batch_size": 128, "learned_mask.steps": 3,
        "evaluation.sizes": [4, 16], "evaluation.min_denominator": 1e-6, "evaluation.random_draws": 2,
        "evaluation.replies": 2, "evaluation.reply_tokens": 4, "discovery.checked_nodes": 4,
    }  # fmt: skip
    overrides = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    stages = "behaviour,probe,attribute-logits,patch,discover"
    options = ("--models", preset, "--stages", stages, "--limit", 2, "--json", *overrides)
    result = sfc("batch", *options, root=tmp_path).result
    assert result["failures"] == []
    (row,) = result["models"]
    assert row["n_layers"] == n_layers and row["n_heads"] == 4 * n_layers and row["n_components"] == 2 * 5
    assert row["n_pairs"] > 0 and row["n_nodes"] > 0
    circuit = next((tmp_path / "circuits" / preset).glob("circuit-violence-*/result.json"))
    assert json.loads(circuit.read_text())["preset"] == preset
