"""Which token stands for which: by hand, and the laws that hold for every pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfc.core.errors import UserError
from sfc.data.render import Role, TokenizedPrompt
from sfc.studies.patch.alignment import Unalignable, align, check_positions, expand


def prompt(prefix: str, content: str, suffix: str, reply: str = "") -> TokenizedPrompt:
    """A prompt in which every letter is a token."""
    parts = zip(Role, (prefix, content, suffix, reply), strict=True)
    roles = [role for role, part in parts for _ in part]
    return TokenizedPrompt(np.array([ord(letter) for letter in prefix + content + suffix + reply]), np.array(roles))


EQUAL = prompt("<u>", "abc", "<a>"), prompt("<u>", "xyz", "<a>")
LONGER = prompt("<u>", "abc", "<a>"), prompt("<u>", "vwxyz", "<a>")
PREFILLED = prompt("<u>", "abc", "<a>"), prompt("<u>", "abc", "<a>", "Sure")
BOTH_PREFILLED = prompt("<u>", "abc", "<a>", "Yes"), prompt("<u>", "xyz", "<a>", "Yes")
BARE = prompt("", "abc", "<a>"), prompt("", "xyz", "<a>")
OTHER_TEMPLATE = prompt("<u>", "abc", "<a>"), prompt("<s>", "abc", "<b>")

ALIGNED = {
    "the last token": ("last", LONGER, [8], [10]),
    "the last token of a prefilled reply": ("last", PREFILLED, [8], [12]),
    "the last token of other templates": ("last", OTHER_TEMPLATE, [8], [8]),
    "one last token": ("last-1", PREFILLED, [8], [12]),
    "the last two": ("last-2", LONGER, [7, 8], [9, 10]),
    "the last five, two of them content": ("last-5", LONGER, [4, 5, 6, 7, 8], [6, 7, 8, 9, 10]),
    "the last eight, where all correspond": ("last-8", EQUAL, [*range(1, 9)], [*range(1, 9)]),
    "the suffix": ("suffix", LONGER, [6, 7, 8], [8, 9, 10]),
    "the suffix and what both replies begin with": ("suffix", BOTH_PREFILLED, [*range(6, 12)], [*range(6, 12)]),
    "the prefix but the sink": ("prefix", LONGER, [1, 2], [1, 2]),
    "the content": ("content", EQUAL, [3, 4, 5], [3, 4, 5]),
    "everything but the sink": ("all", EQUAL, [*range(1, 9)], [*range(1, 9)]),
    "everything without a prefix": ("all", BARE, [*range(1, 6)], [*range(1, 6)]),
    "a content token from the start": ("content[0]", LONGER, [3], [3]),
    "a content token from the end": ("content[-1]", LONGER, [5], [7]),
    "a suffix token from the end": ("suffix[-3]", LONGER, [6], [8]),
    "a prefix token": ("prefix[1]", LONGER, [1], [1]),
}
UNALIGNABLE = {
    "contents of other lengths": ("content", LONGER, "content: 3 tokens against 5"),
    "all of other lengths": ("all", LONGER, "content: 3 tokens against 5"),
    "last tokens that reach past the shorter content": ("last-7", LONGER, "content: 3 tokens against 5"),
    "suffix of a prefilled reply": ("suffix", PREFILLED, "suffix: the template or the begun reply is not"),
    "last tokens of a prefilled reply": ("last-2", PREFILLED, "suffix: the template or the begun reply is not"),
    "one suffix token of a prefilled reply": (
        "suffix[-1]",
        PREFILLED,
        "suffix: the template or the begun reply is not",
    ),
    "prefixes of other templates": ("prefix", OTHER_TEMPLATE, "prefix: the template is not the same"),
    "suffixes of other templates": ("suffix", OTHER_TEMPLATE, "suffix: the template or the begun reply is not"),
    "a content token that one lacks": ("content[3]", LONGER, "only 3 content tokens"),
    "a content token that one lacks, from the end": ("content[-4]", LONGER, "only 3 content tokens"),
    "the sink": ("prefix[0]", EQUAL, "no token but the first"),
    "the sink as content": ("content[0]", BARE, "no token but the first"),
    "no prefix": ("prefix", BARE, "no token but the first"),
    "more tokens than there are": ("last-9", EQUAL, "only 8 tokens after the first"),
}


@pytest.mark.parametrize("case", ALIGNED)
def test_aligned(case: str) -> None:
    positions, pair, clean, corrupted = ALIGNED[case]
    ours, theirs = align(positions, *pair)
    assert (ours.tolist(), theirs.tolist()) == (clean, corrupted)


@pytest.mark.parametrize("case", UNALIGNABLE)
def test_not_alignable(case: str) -> None:
    positions, pair, reason = UNALIGNABLE[case]
    with pytest.raises(Unalignable, match=reason):
        align(positions, *pair)


texts = st.text("ab", max_size=6)
names = st.one_of(
    st.sampled_from(["last", "suffix", "content", "prefix", "all"]),
    st.builds(lambda k: f"last-{k}", st.integers(1, 15)),
    st.builds(lambda role, i: f"{role}[{i}]", st.sampled_from(["prefix", "content", "suffix"]), st.integers(-6, 6)),
)


@given(names, st.tuples(texts, texts), st.tuples(texts, texts), st.tuples(texts, texts))
def test_laws(name: str, prefixes: tuple[str, str], contents: tuple[str, str], suffixes: tuple[str, str]) -> None:
    clean, corrupted = (prompt(*parts) for parts in zip(prefixes, contents, suffixes, strict=True))
    try:
        ours, theirs = align(name, clean, corrupted)
    except Unalignable:
        with pytest.raises(Unalignable):
            align(name, corrupted, clean)
        return
    assert len(ours) == len(theirs) > 0
    assert (ours > 0).all() and (theirs > 0).all(), "the sink is in no set"
    assert (np.diff(ours) > 0).all() and (np.diff(theirs) > 0).all()
    swapped = align(name, corrupted, clean)
    assert np.array_equal(swapped[0], theirs) and np.array_equal(swapped[1], ours)
    if len(ours) > 1 or "[" in name:
        roles = clean.roles[ours]
        assert np.array_equal(roles, corrupted.roles[theirs]), "a token corresponds to one of its own role"
        template = roles != Role.CONTENT
        assert np.array_equal(clean.ids[ours][template], corrupted.ids[theirs][template])
    if name in ("content", "all"):
        assert len(contents[0]) == len(contents[1])


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=6), st.text("ab", min_size=1, max_size=6)), min_size=1))
def test_each_spells_out_tokens_that_every_pair_has(contents: list[tuple[str, str]]) -> None:
    pairs = [(prompt("<u>", clean, "<a>"), prompt("<u>", corrupted, "<a>")) for clean, corrupted in contents]
    spelt = expand(["last", "each", "last"], pairs)
    shortest = min(len(text) for pair in contents for text in pair)
    assert len(spelt) == len(set(spelt)) == 1 + shortest + 3
    for clean, corrupted in pairs:
        positions = [align(name, clean, corrupted) for name in spelt[1:]]
        assert all(len(ours) == 1 for ours, _ in positions)
        assert len({int(ours[0]) for ours, _ in positions}) == shortest + 3, "no token comes twice"


def test_each_by_hand() -> None:
    assert expand(["each"], [EQUAL]) == [
        "content[0]", "content[1]", "content[-1]", "suffix[-3]", "suffix[-2]", "suffix[-1]",
    ]  # fmt: skip
    assert expand(["each"], []) == []


@pytest.mark.parametrize("name", ["last", "last-12", "suffix", "content", "prefix", "all", "each", "suffix[-1]"])
def test_names_of_position_sets(name: str) -> None:
    assert check_positions(name) == name


@pytest.mark.parametrize("name", ["", "lastt", "last-0", "last--1", "suffix[]", "suffix[x]", "last 3", "body[0]"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="unknown positions"):
        check_positions(name)
