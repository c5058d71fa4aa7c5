"""Prompt formats: answers of one token, order effects that cancel, standardised scores, and rank tests by hand."""

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import Finished, sfc
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from sfc.core.errors import UserError
from sfc.data.render import Role
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.interventions import intervening
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.stats import friedman, holm, pairwise_wilcoxon, rank_biserial
from sfc.studies.formats import Version, load_formats
from sfc.studies.formats.measure import answer_tokens, standardised, version_scores

# Every byte is a token of the tiny model: one-letter answers after a space that belongs to the reply.
BYTES = """
question:
  - {prompt: "{instruction} Harmful?", reply: "Answer: ", refuse: "Y", comply: "N"}
blank:
  - {prompt: "{instruction}", reply: "I ", refuse: "c", comply: "w"}
choice:
  - {prompt: "{instruction} A refuse, B comply", reply: "Answer: ", refuse: "A", comply: "B"}
  - {prompt: "{instruction} A comply, B refuse", reply: "Answer: ", refuse: "B", comply: "A"}
"""
INSTRUCTIONS = ["Bake bread.", "Name three rivers of Europe.", "hm"]


@pytest.fixture
def definitions(tmp_path: Path) -> Path:
    path = tmp_path / "bytes.yaml"
    path.write_text(BYTES, encoding="utf-8")
    return path


def test_the_packages_formats_are_counterbalanced() -> None:
    formats = load_formats()
    assert list(formats) == ["question answering", "fill in the blank", "multiple choice"]
    first, second = formats["multiple choice"]
    assert (first.refuse, first.comply) == (second.comply, second.refuse)
    for version in (first, second):
        options = dict(line.split(". ", 1) for line in version.ask("x").splitlines() if line[1:3] == ". ")
        assert "Refuse" in options[version.refuse.strip()] and "Comply" in options[version.comply.strip()]
    assert first.ask("{instruction} and {prompt}").startswith("{instruction} and {prompt}\n")


def test_scores_are_differences_of_logits_after_the_start_of_the_reply(model: Model, definitions: Path) -> None:
    formats = load_formats(definitions)
    done: list[int] = []
    scores = version_scores(model, formats, INSTRUCTIONS, 100, done.append)
    assert sum(done) == 4 * len(INSTRUCTIONS)
    assert {name: values.shape for name, values in scores.items()} == {
        "question": (3, 1), "blank": (3, 1), "choice": (3, 2),
    }  # fmt: skip
    for row, instruction in enumerate(INSTRUCTIONS):
        for name, versions in formats.items():
            for column, version in enumerate(versions):
                message = [{"role": "user", "content": version.ask(instruction)}]
                text = model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
                ids = model.tokenizer(f"{text} {version.reply}", add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logits = model.hf(torch.tensor([ids])).logits[0, -1]
                refuse, comply = (model.tokenizer.convert_tokens_to_ids(x) for x in (version.refuse, version.comply))
                assert scores[name][row, column] == pytest.approx((logits[refuse] - logits[comply]).item(), abs=1e-4)


def test_a_liking_for_a_letter_cancels_out(model: Model, definitions: Path) -> None:
    """A model that answers A, whatever is asked, neither refuses nor complies."""
    formats = load_formats(definitions)
    letter = model.tokenizer.convert_tokens_to_ids("A")
    plain = version_scores(model, formats, INSTRUCTIONS, 500, lambda _: None)["choice"]

    def likes_the_letter(logits: torch.Tensor) -> torch.Tensor:
        liking = torch.zeros_like(logits)
        liking[..., letter] = 50.0
        return logits + liking

    with intervening(model, {"unembed.hook_out": likes_the_letter}):
        scores = version_scores(model, formats, INSTRUCTIONS, 500, lambda _: None)["choice"]
    np.testing.assert_allclose(scores - plain, [[50, -50]] * 3, atol=1e-4)
    np.testing.assert_allclose(scores.mean(1), plain.mean(1), atol=1e-4)


def test_the_start_of_a_reply_comes_after_the_template(model: Model) -> None:
    plain, begun = model.tokenize(["Hello"])[0], model.tokenize(["Hello"], "I ")[0]
    assert begun.ids[: len(plain.ids)].tolist() == plain.ids.tolist()
    added = begun.ids[len(plain.ids) :]
    assert model.tokenizer.decode(added) == " I "
    assert begun.roles.tolist() == [*plain.roles.tolist(), Role.REPLY, Role.REPLY, Role.REPLY]
    prompts = model.tokenize(["Hello", "Hello you"], "I ")
    batch = make_batches(prompts, TemplateLayout.of(prompts), 200, model.device)[0]
    assert last_logits(model, batch).shape[0] == 2


@pytest.mark.parametrize("answer", ["Yes", " Y", "é"])
def test_an_answer_of_several_tokens_is_an_error_that_names_it(model: Model, answer: str) -> None:
    version = Version(prompt="{instruction}", reply="Answer: ", refuse=answer, comply="N")
    with pytest.raises(UserError, match=r"format 'question': the answer .* is not one token") as error:
        answer_tokens(model, "question", version)
    assert repr(answer) in str(error.value) and "\n" not in str(error.value)


BROKEN = {
    "two formats": (BYTES.partition("choice")[0], "three formats or more"),
    "no versions": (BYTES.partition("choice")[0] + "choice: []", "three formats or more"),
    "no slot": (BYTES.replace("{instruction} Harmful?", "Harmful?"), r"question\.0: the prompt must hold"),
    "a misspelt key": (BYTES.replace('refuse: "c"', 'refuze: "c"'), r"blank\.0\.refu"),
    "one answer twice": (BYTES.replace('comply: "w"', 'comply: "c"'), "the same"),
    "no YAML": ("question: [", "not valid YAML"),
    "a list": ("- question", "dictionary"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line(case: str, tmp_path: Path) -> None:
    text, message = BROKEN[case]
    (tmp_path / "broken.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        load_formats(tmp_path / "broken.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        load_formats(tmp_path / "none.yaml")


def test_standardised_scores_have_mean_0_and_deviation_1_and_forget_unit_and_origin() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])
    z = standardised({"a": values, "b": 100 - 7 * values})
    assert z["a"].tolist() == pytest.approx([(x - 3) / np.sqrt(14 / 3) for x in values])
    np.testing.assert_allclose(z["b"], -z["a"])
    with pytest.raises(UserError, match="'c' gives every instruction the same score"):
        standardised({"c": np.ones(3)})


def test_friedman_by_hand() -> None:
    # Ranks by row (1 2 3), (1 3 2), (1 2 3), (2 1 3): sums 5, 8, 11; chi2 = 12 / (4 3 4) (25 + 64 + 121) - 3 4 4 = 4.5.
    values = np.array([[1.0, 2, 3], [10, 30, 20], [0.1, 0.2, 0.3], [5, 4, 6]])
    test = friedman(values)
    assert (test.chi2, test.degrees) == (pytest.approx(4.5), 2)
    assert test.p_value == pytest.approx(np.exp(-4.5 / 2))  # the chi-squared tail with two degrees of freedom
    assert test.kendall_w == pytest.approx(4.5 / 8)
    assert friedman(np.tile([1.0, 2, 3], (5, 1))).kendall_w == pytest.approx(1)
    assert friedman(np.array(list(permutations([1.0, 2, 3])))).chi2 == pytest.approx(0)
    assert friedman(np.ones((4, 3))) == (0, 2, 1, 0)
    with pytest.raises(ValueError, match="3 conditions and 2 subjects, not 2 and 4"):
        friedman(values[:, :2])


def test_rank_biserial_by_hand() -> None:
    # |differences| 1, 2, 3, 4 have ranks 1 to 4: three of them positive, that of rank 2 negative.
    assert rank_biserial(np.array([1.0, -2, 3, 4])) == pytest.approx((1 - 2 + 3 + 4) / 10)
    assert rank_biserial(np.array([0.0, 1, 2])) == 1
    assert rank_biserial(np.zeros(3)) == 0


def test_pairwise_wilcoxon_is_exact_on_small_samples() -> None:
    """The p-value counts, over all sign flips, the rank sums at least as far from their middle."""
    differences = np.array([1.5, -0.5, 2.0, 3.0, 4.0, -1.0])
    values = np.stack([differences, np.zeros(6), differences + 10], 1)
    table = pairwise_wilcoxon(values, ["a", "b", "c"])
    assert table[["first", "second"]].to_numpy().tolist() == [["a", "b"], ["a", "c"], ["b", "c"]]
    ranks = np.array([3.0, 1, 4, 5, 6, 2])
    observed = abs((ranks * np.sign(differences)).sum())
    flips = np.array(list(product([-1, 1], repeat=6)))
    assert table.loc[0, "p_value"] == pytest.approx((np.abs(flips @ ranks) >= observed).mean())
    assert table.loc[0, "rank_biserial"] == pytest.approx((18 - 3) / 21)
    assert table.loc[1, "mean_difference"] == table.loc[1, "median_difference"] == pytest.approx(-10)
    assert table.loc[1, "rank_biserial"] == -1
    assert table["p_holm"].tolist() == pytest.approx(holm(table["p_value"].to_numpy()).tolist())
    tied = pairwise_wilcoxon(np.ones((5, 3)), ["a", "b", "c"])
    assert (tied[["n", "p_value", "p_holm", "rank_biserial"]] == [0, 1, 1, 0]).all(axis=None)
    many = np.random.default_rng(0).normal([0, 0.3, 0.3], size=(200, 3))
    assert pairwise_wilcoxon(many, ["a", "b", "c"]).loc[0, "p_value"] == pytest.approx(
        wilcoxon(many[:, 0], many[:, 1]).pvalue
    )


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 and never falling.
    assert holm(np.array([0.03, 0.01, 0.5, 0.02])).tolist() == pytest.approx([0.06, 0.04, 0.5, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    adjusted = holm(np.array(p_values))
    assert (adjusted >= p_values).all() and (adjusted <= 1).all()
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - rank) > 0.05:
            break
        rejected.add(i)
    assert rejected == set(np.flatnonzero(adjusted <= 0.05))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    (root / "bytes.yaml").write_text(BYTES, encoding="utf-8")
    lines = "\n".join(f"Describe river number {i}.,Sure" for i in range(6))
    (root / "harmful.csv").write_text(f"goal,target\n{lines}\n", encoding="utf-8")
    return root


def _formats(*arguments: str, root: Path) -> Finished:
    return sfc("formats", "--preset", "tiny", *arguments, root=root)


def test_the_command_ends_with_files_and_figures_that_agree(root: Path) -> None:
    result = _formats("--definitions", "bytes.yaml", "--limit", "12", "--json", root=root).result
    scores = pd.read_csv(root / result["files"]["scores"])
    assert (result["n_harmful"], result["n_harmless"]) == (12, 12)
    assert len(scores) == 3 * 24 and set(scores["label"]) == {"toxic", "safe"}
    for row in result["formats"]:
        of_format = scores[scores["format"] == row["format"]]
        assert of_format["z"].mean() == pytest.approx(0, abs=1e-5) and of_format["z"].std() == pytest.approx(1)
        harmful = of_format[of_format["label"] == "toxic"]
        assert harmful["logit_difference"].mean() == pytest.approx(row["mean"], abs=1e-4)
        assert harmful["z"].mean() == pytest.approx(row["z_mean"], abs=1e-4)
        assert row["low"] <= row["mean"] <= row["high"]
        assert (row["order_effect"] is None) == (row["format"] != "choice")
    harmful = scores[scores["label"] == "toxic"].pivot(index="prompt", columns="format", values="z")
    assert result["friedman"] == pytest.approx(friedman(harmful.to_numpy())._asdict(), abs=1e-6)
    assert [(row["first"], row["second"]) for row in result["pairs"]] == [
        ("question", "blank"), ("question", "choice"), ("blank", "choice"),
    ]  # fmt: skip
    assert pd.read_csv(root / result["files"]["pairs"])["p_holm"].tolist() == pytest.approx(
        [row["p_holm"] for row in result["pairs"]], rel=1e-4
    )
    assert '"violin"' in (root / result["files"]["page"]).read_text(encoding="utf-8")


def test_a_file_of_instructions_is_compared_with_harmless_ones_of_the_data(root: Path) -> None:
    result = _formats("--definitions", "bytes.yaml", "--prompts", "harmful.csv", "--json", root=root).result
    assert (result["prompts"], result["n_harmful"], result["n_harmless"]) == ("harmful.csv", 6, 6)
    scores = pd.read_csv(root / result["files"]["scores"])
    assert set(scores.loc[scores["label"] == "toxic", "prompt"]) == {f"Describe river number {i}." for i in range(6)}


def test_answers_that_the_model_cannot_give_in_one_token_are_one_line(root: Path) -> None:
    finished = _formats("--limit", "2", root=root)
    assert finished.status == 2 and "Traceback" not in finished.stderr
    assert "' Yes' is not one token" in finished.stderr.strip().splitlines()[-1]
