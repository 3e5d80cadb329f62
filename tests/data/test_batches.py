"""Batches: a pure function of (seed, step), shared out among processes, every row once an epoch."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.errors import ConfigError, DataError
from lmx.data import Batches, Document, build_cache, byte_tokenizer, num_rows, train_bpe


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    texts = [["abc" * n for n in range(1, 20)], ["xy" * n for n in range(1, 30)]]
    return [build_cache([Document(t, "", "d") for t in part], byte_tokenizer(), folder) for part in texts]


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 500), st.sampled_from([1, 2, 3, 6]), st.booleans())
def test_processes_share_the_batch_and_a_new_object_gives_it_again(caches, seed, step, process_count, both):
    def make():
        return Batches(caches if both else caches[0], 6, 8, seed)

    whole = make().at(step)
    shards = [make().at(step, index, process_count) for index in range(process_count)]
    assert same(whole, {name: np.concatenate([shard[name] for shard in shards]) for name in whole})
    assert all(array.shape == (6, 8) for array in whole.values())


@pytest.mark.parametrize("which", [slice(0, 1), slice(0, 2)], ids=["one cache", "two caches"])
def test_every_row_once_an_epoch_and_another_order_the_next(caches, which):
    batches = Batches(caches[which], 1, 8, seed=3)
    count = sum(num_rows(cache, 8) for cache in caches[which])
    assert batches.rows_per_epoch == count
    epochs = [np.concatenate([batches.at(e * count + i)["targets"] for i in range(count)]) for e in range(2)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) and not np.array_equal(*epochs)
    weights = sum(batches.at(i)["weights"].sum() for i in range(count))
    assert weights == sum(cache.num_tokens - 1 for cache in caches[which])


def test_seeds_and_steps_differ(caches):
    first = Batches(caches, 4, 8, seed=0)
    assert not same(first.at(0), first.at(1))
    assert not same(first.at(0), Batches(caches, 4, 8, seed=1).at(0))


def test_iteration_is_at_and_ends_its_thread(caches):
    batches = Batches(caches, 4, 8, seed=0)
    for prefetch in (0, 2):
        iterator = batches.iterate(5, prefetch=prefetch, process_index=1, process_count=2)
        for step in range(5, 12):
            assert same(next(iterator), batches.at(step, 1, 2))
        iterator.close()
        assert not any(thread.name.startswith("lmx-batches") for thread in threading.enumerate())


def test_an_error_in_the_thread_reaches_the_caller(caches):
    iterator = Batches(caches, 4, 8).iterate(process_count=3)
    with pytest.raises(DataError, match="a batch of 4 rows does not divide among 3 processes"):
        next(iterator)
    assert not any(thread.name.startswith("lmx-batches") for thread in threading.enumerate())


def test_a_resumed_run_is_checked(caches):
    batches = Batches(caches, 4, 8, seed=0)
    state = json.loads(json.dumps(batches.state(7)))
    assert state["step"] == 7
    batches.check(state)
    for other, message in [
        (Batches(caches, 4, 8, seed=1), r"seed \(was 0, is 1\)"),
        (Batches(caches, 2, 8, seed=0), r"batch_size \(was 4, is 2\)"),
        (Batches(caches, 4, 16, seed=0), r"length \(was 8, is 16\)"),
        (Batches(caches[0], 4, 8, seed=0), r"fingerprint \(was"),
    ]:
        with pytest.raises(DataError, match=message):
            other.check(state)
    with pytest.raises(DataError, match=r"order \(was '0000'"):
        batches.check({**state, "order": "0000"})


@pytest.mark.parametrize("numbers", [(0, 8, 0), (4, 0, 0), (4, 8, -1), (4, 8, 2**32)])
def test_numbers_out_of_range(caches, numbers):
    with pytest.raises(ConfigError, match=r"must be at least 1, seed .* in \[0, 2\*\*32\)"):
        Batches(caches, *numbers)


def test_one_row(make_cache):
    batches = Batches(make_cache("abcdefg"), 1, 8)
    assert batches.rows_per_epoch == 1 and same(batches.at(0), batches.at(9))


def test_too_little_text_and_unlike_tokenizers(make_cache, tmp_path):
    cache = make_cache("ab")
    with pytest.raises(
        DataError, match="has 3 tokens, one batch needs 4 x 8 = 32.*smaller batch size or length"
    ):
        Batches(cache, 4, 8)
    other = build_cache([Document("ab", "", "d")], train_bpe(["ab"], 300), tmp_path)
    with pytest.raises(DataError, match="must be made with one tokenizer"):
        Batches([cache, other], 1, 1)
