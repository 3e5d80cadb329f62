"""Deduplication and splitting are functions of the text alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.errors import DataError
from lmx.data import Document, deduplicate, split, split_by, summary


def sentences(seed: int, count: int = 40) -> str:
    words = random.Random(seed).choices([f"w{i}" for i in range(500)], k=8 * count)
    return "\n".join(" ".join(words[i : i + 8]) for i in range(0, len(words), 8))


def documents(count: int, domain: str = "d") -> list[Document]:
    return [Document(sentences(i), str(i), domain) for i in range(count)]


def test_exact_and_near_duplicates_are_dropped_and_the_first_is_kept():
    first, second = sentences(1), sentences(2)
    edited = first.replace(first.split()[100], "changed")  # a word of 320
    texts = [first, second, first, edited, "  ".join(first.split(" ")), "short", "short", "short one"]
    kept = deduplicate([Document(text, str(i), "d") for i, text in enumerate(texts)])
    assert [document.origin for document in kept] == ["0", "1", "5", "7"]


def test_a_document_pieced_together_from_others_is_dropped_and_half_new_text_is_kept():
    one, two, new = sentences(1), sentences(2), sentences(3)
    texts = [one, two, one + "\n" + two, one + "\n" + new]
    assert [d.origin for d in deduplicate([Document(t, str(i), "d") for i, t in enumerate(texts)])] == [
        "0",
        "1",
        "3",
    ]


def test_deduplicate_nothing():
    assert deduplicate([]) == []


def test_split_shares_and_order_independence():
    splits = split(documents(600))
    counts = {name: len(members) for name, members in splits.items()}
    assert sum(counts.values()) == 600
    assert 0.85 < counts["train"] / 600 < 0.95 and counts["valid"] > 10 and counts["test"] > 10
    shuffled = documents(600)
    random.Random(0).shuffle(shuffled)
    again = split(shuffled)
    assert all(set(splits[name]) == set(again[name]) for name in splits)


def test_anything_is_split_by_its_text():
    pairs = [(str(number), repeat) for number in range(400) for repeat in range(2)]
    divided = split_by(pairs, lambda pair: pair[0])
    of = {text: {name for name, members in divided.items() for t, _ in members if t == text} for text, _ in pairs}
    assert all(len(names) == 1 for names in of.values())  # equal texts stay together
    assert sorted(pair for members in divided.values() for pair in members) == sorted(pairs)
    assert len(divided["train"]) > 680 and min(len(divided["valid"]), len(divided["test"])) > 15
    documents = split([Document(text, "", "d") for text, _ in pairs])  # the very split of documents
    assert {d.text for d in documents["valid"]} == {text for text, _ in divided["valid"]}
    with pytest.raises(DataError, match="2 examples are too few: none is left for the"):
        split_by(["a", "b"], str)


def test_a_documents_split_does_not_depend_on_the_others():
    fewer, more = split(documents(300)), split(documents(600))
    for name, members in fewer.items():
        assert set(members) <= set(more[name])


@pytest.mark.parametrize("newlines", [True, False])
def test_one_long_document_is_cut_into_parts_that_rebuild_it(newlines):
    text = sentences(7, 2000)
    text = text if newlines else text.replace("\n", " ")
    splits = split([Document(text, "book.txt", "book")])
    assert all(splits.values())
    parts = [part for members in splits.values() for part in members]
    parts.sort(key=lambda part: int(part.origin.split("#")[1]))
    assert "".join(part.text for part in parts) == text
    assert all(part.text.endswith("\n" if newlines else " ") for part in parts[:-1])


def test_only_the_small_domain_is_cut():
    splits = split([*documents(600, "many"), Document(sentences(9999, 2000), "book.txt", "book")])
    for members in splits.values():
        assert {document.domain for document in members} == {"many", "book"}
        assert not any("#" in document.origin for document in members if document.domain == "many")


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from(" \n"), max_size=60), st.integers(1, 200))
def test_cutting_loses_nothing(piece, times):
    text = piece * times
    try:
        splits = split([Document(text, "x", "d")])
    except DataError:
        return
    assert sum(len(document.text) for members in splits.values() for document in members) == len(text)


def test_too_little_text_is_an_error_with_its_size():
    with pytest.raises(DataError, match=r"1 documents of 5 bytes in all are too little text.*100 kB"):
        split([Document("hello", "x", "d")])


def test_summary_counts_utf8_bytes():
    splits = {
        "train": [Document("é", "0", "a"), Document("xy", "1", "b"), Document("z", "2", "a")],
        "valid": [],
    }
    assert summary(splits) == [
        ("a", "train", 2, 3),
        ("a", "valid", 0, 0),
        ("b", "train", 1, 2),
        ("b", "valid", 0, 0),
    ]
