"""What SAEs learn from: sources that are mixed, conversations that the model writes, and never a test prompt."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfc.core.config import SampleOptions
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.data.corpus import read_chats
from sfc.data.render import Role
from sfc.data.schema import prompt_ids
from sfc.models.batches import TemplateLayout, flush_right, pad
from sfc.models.generation import continue_tails, end_tokens, sampled
from sfc.models.loading import Model
from sfc.run import Run
from sfc.saes.plan import TokenTable
from sfc.session import Session
from sfc.studies.sample import SAMPLE
from sfc.studies.sample.conversations import Start, Writer, first_words, is_plain_request
from sfc.studies.sample.write import EVERYDAY, Starts, read_sample
from sfc.studies.study import ensure
from sfc.studies.train import TRAIN
from sfc.studies.train.rows import is_deciding, sae_corpus, training_rows

SMALL = ("prompts.limit=8", "sample.unfiltered=true", "sample.batch=6", "sample.tokens=400")


def tiny(root: Path, *overrides: str) -> Run:
    return Run(load_experiment("tiny", [*SMALL, *overrides]), root)


def written(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# --- sampling


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 40), st.floats(0.1, 20))
@settings(max_examples=50, deadline=None)
def test_a_token_is_drawn_where_its_share_of_the_probability_lies(seed: int, n: int, vocab: int, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, vocab, generator=random)
    uniforms = torch.rand(n, 3, generator=random, dtype=torch.float64)
    rows = torch.randperm(n, generator=random)
    drawn = sampled(uniforms)(logits, rows, 1)
    below = torch.softmax(logits.double(), -1).cumsum(-1)
    for token, sums, wanted in zip(drawn.tolist(), below, uniforms[rows, 1].tolist(), strict=True):
        start = 0.0 if token == 0 else float(sums[token - 1])
        assert start - 1e-5 <= wanted <= float(sums[token]) + 1e-5


def test_sampled_replies_do_not_depend_on_the_batch_and_end_where_the_model_ends_them(model: Model) -> None:
    prompts = model.tokenize(["Hi", "How do I bake bread?", "A" * 60, "why", "Tell me of the sea.", "one two", "x"])
    uniforms = torch.rand(len(prompts), 30, generator=torch.Generator().manual_seed(3))
    also_end = set(range(30))  # so many that rows end one after the other, and are dropped

    def replies(chosen: list[int]) -> list[list[int]]:
        some = [prompts[row] for row in chosen]
        batch = flush_right(pad(some, TemplateLayout.of(some), model.device))
        choose = sampled(uniforms[chosen])
        return continue_tails(model, batch, 30, choose=choose, also_end=also_end).ids

    together = replies(list(range(len(prompts))))
    assert together == [replies([row])[0] for row in range(len(prompts))]
    assert len({len(ids) for ids in together}) > 2, "they end at different steps"
    ends = also_end | end_tokens(model)
    assert all(ids[-1] in ends or len(ids) == 30 for ids in together)
    assert all(ends.isdisjoint(ids[:-1]) for ids in together)


# --- conversations


@pytest.mark.parametrize(
    ("text", "is_plain"),
    [
        ("How do I bake bread?", True),
        ("Explain how the lunar cycle works", True),
        ('He asked: "What time is it?"', True),
        ("Why can't I sleep at night?", True),
        ("I can't sleep; how could someone help?", True),
        ("Bake some bread", False),
        ("Write a function that", True),
        ("Fix this line for me: x = foo(y)", False),
        ("Sort the list [3, 1, 2] please.", False),
        ("Here is the list of things:", False),
        ("- a point of a list", False),
        ("Add 12 34 56 78 90 and 12 34.", False),
        ("the the the the the cat sat", False),
        ("Read https://example.org for me.", False),
        ("A broken \ufffd character is here.", False),
        ("I'm sorry, but I can't help with that.", False),
        ("Plan a heist. I cannot assist with that request.", False),
        ("", False),
    ],
)
def test_what_can_stand_as_a_request(text: str, is_plain: bool) -> None:
    assert is_plain_request(text) == is_plain


@given(st.text(min_size=1).filter(str.strip), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_first_words_are_the_first_half_of_a_prompt_at_most(text: str, number: float) -> None:
    words, first = text.split(), first_words(text, number).split()
    assert first == words[: len(first)]
    assert 1 <= len(first) <= min(6, max(len(words) // 2, 1))


def test_a_writer_writes_no_copy_and_no_test_prompt(model: Model) -> None:
    options = SampleOptions(unfiltered=True, instruction_tokens=40, reply_tokens=5)  # pyright: ignore
    starts = [Start(word, EVERYDAY) for word in ("How do", "Why", "List", "Tell", "When", "Is it", "Name", "Where")]

    def write(writer: Writer) -> tuple[list[str], dict[str, int]]:
        made, fates = writer.write(starts, np.random.default_rng(1))
        assert all(each.prompt.startswith(each.start) for each in made)
        return [each.prompt for each in made], fates

    plain = Writer(model, options, set())
    prompts, fates = write(plain)
    assert len(prompts) == fates["kept"] > 1 and sum(fates.values()) == len(starts)
    assert write(plain) == ([], {**fates, "kept": 0, "copies": len(prompts)})
    left, fates = write(Writer(model, options, set(prompt_ids(prompts[:1]))))
    assert left == prompts[1:] and fates["test"] == 1


def test_instructions_are_written_alone_where_no_reply_is_wanted(model: Model) -> None:
    options = SampleOptions(unfiltered=True, instruction_tokens=40, reply_tokens=0)  # pyright: ignore
    starts = [Start(word, EVERYDAY) for word in ("How do", "Why", "List", "Tell", "When", "Is it", "Name", "Where")]
    made, _ = Writer(model, options, set()).write(starts, np.random.default_rng(1))
    assert made and all(each.reply == "" for each in made)
    assert [each.n_tokens for each in made] == [len(each.ids) for each in model.tokenize([m.prompt for m in made])]


def test_starts_are_not_of_test_prompts_and_as_often_positive_as_is_wanted(tmp_path: Path) -> None:
    run = tiny(tmp_path, "sample.positive_share=0.25")
    known = run.prompts.frame[run.prompts.frame["split"] != "test"]
    starts, random = Starts(run), np.random.default_rng(0)
    drawn = [starts.draw(random) for _ in range(2000)]
    for start in drawn:
        assert start.kind == EVERYDAY or known["prompt"].str.startswith(start.text).any()
    kinds = pd.Series([start.kind for start in drawn]).value_counts(normalize=True)
    assert kinds["toxic"] == pytest.approx(0.25, abs=0.04)
    assert kinds[EVERYDAY] == pytest.approx(0.375, abs=0.04)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sample of 800 tokens."""
    return ensure(SAMPLE, tiny(tmp_path_factory.mktemp("root"), "sample.tokens=800")).folder


def lines(folder: Path, name: str = "sampled.jsonl") -> list[str]:
    return (folder / name).read_text(encoding="utf-8").split("\n")[:-1]


def test_a_longer_sample_goes_on_where_a_shorter_one_ended(sample: Path, tmp_path: Path) -> None:
    short = ensure(SAMPLE, tiny(tmp_path))
    first = lines(short.folder)
    assert len(first) < len(lines(sample)) and short.result["n_tokens"] >= 400
    assert short.folder.name == sample.name
    assert lines(ensure(SAMPLE, tiny(tmp_path, "sample.tokens=800")).folder) == lines(sample)
    assert len(list(read_sample(sample, 400))) <= len(first) <= len(lines(sample))
    assert sum(json.loads(line)["n_tokens"] for line in lines(sample)[: len(list(read_sample(sample, 400)))]) >= 400


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_killed_at_any_moment_the_same_command_writes_the_same(kept: int, sample: Path, tmp_path: Path) -> None:
    """Killed after so many batches, while the conversations of the next one are written."""
    run = tiny(tmp_path, "sample.tokens=800")
    folder = run.sampled.folder
    folder.mkdir(parents=True)
    done, batches = lines(sample), lines(sample, "batches.jsonl")
    of_these = [line for line in done if json.loads(line)["batch"] <= kept]
    torn = "\n".join(of_these).encode()[:-7]
    (folder / "sampled.jsonl").write_bytes(torn)
    (folder / "batches.jsonl").write_text("".join(f"{line}\n" for line in batches[:kept]), encoding="utf-8")
    ensure(SAMPLE, run)
    for name in ("sampled.jsonl", "batches.jsonl", "result.json"):
        assert (folder / name).read_bytes() == (sample / name).read_bytes()


def test_a_damaged_sample_and_a_model_that_asks_nothing_are_told(sample: Path, tmp_path: Path) -> None:
    run = tiny(tmp_path, "sample.tokens=800")
    shutil.copytree(sample, run.sampled.folder)
    (run.sampled.folder / "manifest.json").unlink()
    (run.sampled.folder / "batches.jsonl").write_text("{]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"batches\.jsonl, line 1, is damaged .*--rebuild"):
        ensure(SAMPLE, run)
    with pytest.raises(UserError, match="is it a chat model"):
        ensure(SAMPLE, tiny(tmp_path, "sample.unfiltered=false", "sample.batch=2", "sample.instruction_tokens=4"))


# --- sources


def test_instructions_are_read_from_whatever_column_has_them(tmp_path: Path) -> None:
    rows = [{"prompt": " Bake? ", "reply": "No."}, {"instruction": "Sing."}, {"text": "Run."}, {"text": " "}]
    path = written(tmp_path / "a.jsonl", rows)
    assert list(read_chats(f"chat:{path}")) == [("Bake?", "No."), ("Sing.", ""), ("Run.", "")]
    (tmp_path / "a.csv").write_text("n,instruction\n1,Bake?\n2,Sing.\n", encoding="utf-8")
    assert list(read_chats(f"chat:{tmp_path / 'a.csv'}")) == [("Bake?", ""), ("Sing.", "")]


def test_instructions_of_a_data_set_are_in_the_column_that_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "train.jsonl", [{"question": "Bake?"}, {"question": " "}, {"question": "Sing."}])
    for source in (f"chat:hf:{tmp_path / 'set'}:question", f"chat:hf:{tmp_path / 'set'}:train:question"):
        assert list(read_chats(source)) == [("Bake?", ""), ("Sing.", "")]
    with pytest.raises(UserError, match="no column 'answer'"):
        list(read_chats(f"chat:hf:{tmp_path / 'set'}:answer"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("chat:none.jsonl", "does not exist"),
        ("chat:a.txt", r"give a \.csv or \.jsonl"),
        ("chat:hf:name", "write chat:hf:NAME@COMMIT:COLUMN"),
        ("chat:hf:name:question", r"can change: write hf:name@COMMIT"),
        ("chat:hf:name@main:question", r"can change: write hf:name@COMMIT"),
        ("chat:a.jsonl", "no instructions: give it a column prompt, instruction, text"),
    ],
)
def test_what_is_no_instruction_file_is_told(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", [{"asked": "Bake?"}])
    with pytest.raises(UserError, match=message):
        list(read_chats(source))


def test_a_source_cannot_be_named_twice_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        tiny(tmp_path, "corpus.source=[prompts,prompts]")
    with pytest.raises(UserError, match="no corpus 'replies'"):
        _ = tiny(tmp_path, "corpus.source=[prompts,replies]").corpus


def test_test_prompts_are_in_no_corpus_however_they_are_written(tmp_path: Path) -> None:
    frame = tiny(tmp_path).prompts.frame
    test, others = (frame.loc[frame["split"].eq("test") == is_test, "prompt"].tolist() for is_test in (True, False))
    disguised = [f"  {text.upper()} ".replace(" ", " \n") for text in test[:3]] + test[3:]
    asked = [{"prompt": text} for text in [*disguised, "What is new?", others[0]]]
    asked += [{"prompt": f"Say it:\n{test[0]}"}, {"prompt": "What do they ask?", "reply": f"This:\n{test[1]}"}]
    chats = written(tmp_path / "chats.jsonl", asked)
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "\n\n".join([*disguised, "A text of which one may learn.", f"Listed:\n{test[2]}"]), encoding="utf-8"
    )
    run = tiny(tmp_path, f"corpus.source=[prompts,'chat:{chats}',{texts},sampled]")
    corpus = sae_corpus(Session(run))
    assert set(corpus.table["id"]).isdisjoint(prompt_ids(test)) and len(corpus.table) == len(corpus.sequences)
    ours = corpus.table.loc[corpus.table["split"] == "corpus", "prompt"].tolist()
    n_sampled = len(list(read_sample(run.sampled.folder, 400)))
    assert len(ours) == 2 + n_sampled and ours[0] == "What is new?", "and none that another source has"
    assert "may learn" in ours[1]
    with pytest.raises(UserError, match="no instruction that is not in the test split"):
        written(chats, [{"prompt": test[0]}])
        sae_corpus(Session(run))


def test_replies_are_those_of_the_file_or_where_they_are_wanted_the_models(model: Model, tmp_path: Path) -> None:
    chats = written(tmp_path / "a.jsonl", [{"prompt": "Bake?", "reply": "Never again."}, {"prompt": "Sing."}])

    def replies(*overrides: str) -> list[str]:
        run = tiny(tmp_path, f"corpus.source=chat:{chats}", "corpus.reply_tokens=5", *overrides)
        asked = [sequence.ids[sequence.roles == Role.REPLY] for sequence in sae_corpus(Session(run)).sequences]
        return [model.tokenizer.decode(ids) for ids in asked]

    assert replies() == ["Never", ""]
    first, second = replies("corpus.replies=true")
    assert first == "Never" and len(second) > 0
    one = tiny(tmp_path, f"corpus.source=chat:{chats}", "corpus.max_tokens=29")
    assert len(sae_corpus(Session(one)).sequences) == 1


def test_a_mixture_is_learned_from_alike_with_a_store_and_without(tmp_path: Path) -> None:
    chats = written(tmp_path / "a.jsonl", [{"prompt": f"What is {n}?", "reply": "A number."} for n in range(30)])
    mixed = f"corpus.source=[prompts,sampled,'chat:{chats}']"
    weights = []
    for stored in ("always", "never"):
        root = tmp_path / stored
        root.mkdir()
        run = tiny(root, mixed, "saes.steps=8", "saes.batch_size=64", f"corpus.stored={stored}")
        finished = ensure(TRAIN, run)
        weights.append([path.read_bytes() for path in sorted(finished.folder.rglob("*.safetensors"))])
        roles = {row["role"] for row in finished.result["quality"]}
        assert roles >= {"all", "content", "suffix", "reply"}
    assert weights[0] == weights[1] and len(weights[0]) == 2


@pytest.mark.slow
def test_the_embedded_model_writes_plain_requests_and_answers_them(tmp_path: Path) -> None:
    run = Run(load_experiment("smollm2", ["sample.tokens=600", "sample.batch=24"]), tmp_path)
    folder = ensure(SAMPLE, run).folder
    made = [json.loads(line) for line in lines(folder)]
    assert sum(each["n_tokens"] for each in made) >= 600
    assert all(is_plain_request(each["prompt"]) for each in made)
    assert np.mean([len(each["reply"].split()) for each in made]) > 5
    fates = ensure(SAMPLE, run).result["fates"]
    assert fates["kept"] > 0.4 * sum(fates.values())


# --- deciding tokens


def test_the_tokens_after_which_replies_begin_by_hand() -> None:
    content, suffix, reply = Role.CONTENT, Role.SUFFIX, Role.REPLY
    rows = [
        (0, content), (0, content), (0, suffix), (0, suffix),  # a prompt: its last token
        (1, content), (1, suffix), (1, reply), (1, reply),  # a chat: the template's last one
        (2, content), (2, content),  # a text
        (3, suffix),
    ]  # fmt: skip

    def deciding(rows: list[tuple[int, Role]]) -> list[int]:
        prompt, role = np.array(rows).T
        return np.flatnonzero(is_deciding(TokenTable(prompt, 0 * prompt, 0 * prompt, role))).tolist()

    assert deciding(rows) == [3, 5, 10]
    assert deciding([(0, content), (0, content), (1, content), (1, reply)]) == []  # no template


def test_deciding_tokens_are_the_share_of_the_training_that_is_wanted(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    rows = training_rows(Session(run))
    deciding = is_deciding(rows.tokens)
    assert deciding.sum() == len(rows.table)
    for share in (0.3, 0.6):
        weights = rows.weights(share)
        assert (weights[~rows.trained] == 0).all() and (weights[rows.trained & ~deciding] == 1).all()
        assert weights[deciding].sum() / weights.sum() == pytest.approx(share)
    assert (rows.weights(0) == rows.trained).all()
