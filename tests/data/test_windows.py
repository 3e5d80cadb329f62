"""Windows of the stream, against the plain definition and the laws that hold for every length."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.errors import DataError
from lmx.data import Document, build_cache, byte_tokenizer, evaluation_rows, num_rows, rows

EOS = 256
DTYPES = {
    "tokens": "int32",
    "targets": "int32",
    "weights": "float32",
    "segment_ids": "int32",
    "positions": "int32",
}
TEXTS = st.lists(st.text("ab", max_size=9), min_size=1, max_size=8)


def cache_of(texts):
    documents = [Document(text, "", "even" if i % 2 == 0 else "odd") for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:  # the memory map outlives the file's name
        return build_cache(documents, byte_tokenizer(), folder)


def plain_row(cache, start, length):
    """One window by the definition, a position at a time."""
    row = {name: [] for name in DTYPES}
    segment, position = 1, 0
    for place in range(start, start + length):
        if place > start and place in cache.documents:
            segment, position = segment + 1, 0
        inside = place + 1 < cache.num_tokens
        row["tokens"].append(cache.tokens[place] if inside else EOS)
        row["targets"].append(cache.tokens[place + 1] if inside else EOS)
        row["weights"].append(inside)
        row["segment_ids"].append(segment if inside else 0)
        row["positions"].append(position if inside else 0)
        position += 1
    return row


def test_rows_of_a_small_stream(make_cache):
    batch = rows(make_cache("ab", "c"), np.array([0, 1]), 4)  # the stream: eos a b eos c eos
    assert batch["tokens"].tolist() == [[EOS, 97, 98, EOS], [99, EOS, EOS, EOS]]
    assert batch["targets"].tolist() == [[97, 98, EOS, 99], [EOS, EOS, EOS, EOS]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2], [1, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]


@settings(deadline=None)
@given(TEXTS, st.integers(1, 12))
def test_rows_follow_the_definition_and_rebuild_the_stream(texts, length):
    cache = cache_of(texts)
    batch = rows(cache, np.arange(num_rows(cache, length)), length)
    for i in range(num_rows(cache, length)):
        for name, expected in plain_row(cache, i * length, length).items():
            assert batch[name][i].tolist() == expected, name
    assert {name: array.dtype.name for name, array in batch.items()} == DTYPES
    counted = batch["weights"].ravel() == 1
    assert batch["targets"].ravel()[counted].tolist() == cache.tokens[1:].tolist()
    assert batch["tokens"].ravel()[counted].tolist() == cache.tokens[:-1].tolist()


@settings(deadline=None)
@given(TEXTS, st.integers(1, 12), st.integers(0, 11), st.integers(1, 4))
def test_evaluation_counts_every_target_once(texts, length, overlap, batch_size):
    overlap = min(overlap, length - 1)
    cache = cache_of(texts)
    seen = np.zeros(cache.num_tokens, int)
    targets = np.zeros(len(cache.domains), int)
    index = 0
    for batch in evaluation_rows(cache, length, overlap, batch_size=batch_size):
        assert all(array.shape == (batch_size, length) for array in batch.values())
        assert {name: array.dtype.name for name, array in batch.items()} == {**DTYPES, "domains": "int32"}
        np.add.at(targets, batch["domains"], batch["weights"].astype(int))
        for row in range(batch_size):
            counted = np.flatnonzero(batch["weights"][row])
            places = index * (length - overlap) + counted
            seen[places + 1] += 1
            assert batch["targets"][row, counted].tolist() == cache.tokens[places + 1].tolist()
            # all but the first window have `overlap` positions of context, and padding only follows text
            assert (
                counted.tolist() == list(range(overlap if index else 0, counted[-1] + 1))
                if len(counted)
                else True
            )
            index += 1
    assert seen.tolist() == [0] + [1] * (cache.num_tokens - 1)
    lengths = np.array([1 + len(text) for text in texts])  # a document's targets: its tokens and its end
    assert targets.tolist() == [lengths[i::2].sum() for i in range(len(cache.domains))]


def test_an_overlap_as_long_as_the_window(make_cache):
    with pytest.raises(DataError, match="overlap 4 must be at least 0 and less than the length 4"):
        next(evaluation_rows(make_cache("ab"), 4, 4, batch_size=1))


def test_an_eos_written_by_a_document_starts_no_segment(make_cache, tmp_path):
    """Documents are known by where they start, not by the token that stands there."""
    cache = make_cache("abcd")
    changed = np.array(cache.tokens)
    changed[2] = EOS
    import dataclasses

    batch = rows(dataclasses.replace(cache, tokens=changed), np.array([0]), 5)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1]]
