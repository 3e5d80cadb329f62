"""Bits per byte against counts by hand, and lzma against lzma."""

from __future__ import annotations

import lzma
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import DataError
from lmx.evaluate import bits_per_byte, lzma_bits_per_byte, mean_nll
from lmx.models.unigram import Unigram

P = np.array([0.5, 0.25, 0.125, 0.125])
MODEL = Unigram(jnp.asarray(np.log(P), jnp.float32))  # 1, 2, 3 and 3 bits a token


def batch(tokens, domains, weights):
    tokens, domains = np.asarray(tokens, np.int32), np.asarray(domains, np.int32)
    rest = {"positions": np.zeros_like(tokens), "segment_ids": np.ones_like(tokens)}
    return rest | {"tokens": tokens, "targets": tokens, "domains": domains, "weights": np.asarray(weights, np.float32)}


BATCHES = [
    batch([[0, 0, 1, 3], [2, 3, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]]),
    batch([[1, 1, 2, 2]], [[1, 1, 0, 0]], [[1, 1, 1, 0]]),
]
# Domain "a": 1 + 1 + 2 + 3, then 3, of the rest weight 0: 10 bits. Domain "b": 3 + 3 + 1, then 2 + 2: 11 bits.


def test_by_hand():
    seen = []
    got = bits_per_byte(MODEL, BATCHES, {"a": 5, "b": 4}, advance=lambda: seen.append(1))
    assert list(got) == ["all", "a", "b"] and len(seen) == 2
    # Float32 logarithms of four numbers, at most 8 of them added.
    np.testing.assert_allclose(list(got.values()), [21 / 9, 10 / 5, 11 / 4], rtol=1e-6)


def test_place_is_applied_and_batches_may_be_a_generator():
    halved = lambda b: b | {"weights": b["weights"] / 2}  # noqa: E731
    got = bits_per_byte(MODEL, (b for b in BATCHES), {"a": 5, "b": 4}, place=halved)
    np.testing.assert_allclose(got["all"], 21 / 18, rtol=1e-6)


def test_what_weighs_nothing_may_be_impossible():
    model = Unigram(jnp.asarray([-np.inf, 0.0], jnp.float32))
    one = batch([[0, 1, 1, 1]], [[0, 0, 0, 0]], [[0, 1, 1, 1]])
    assert bits_per_byte(model, [one], {"a": 3})["all"] == 0


def test_mean():
    np.testing.assert_allclose(mean_nll(MODEL, BATCHES), math.log(2) * 21 / 10, rtol=1e-6)
    with pytest.raises(DataError, match="no targets to evaluate on"):
        mean_nll(MODEL, [])


def test_many_positions_keep_their_precision():
    """A hundred batches of 8192 tokens add up in float64: 1 bit each, to the float32 rounding of one batch."""
    one = batch(np.zeros((4, 2048)), np.zeros((4, 2048)), np.ones((4, 2048)))
    got = bits_per_byte(MODEL, [one] * 100, {"a": 100 * 8192})
    np.testing.assert_allclose(got["all"], 1, rtol=1e-5)


@pytest.mark.parametrize("sizes", [{"a": 5, "b": 0}, {}])
def test_domains_without_bytes(sizes):
    with pytest.raises(DataError, match=r"no bytes to evaluate on in domain (b|\(none\)); give it more text"):
        bits_per_byte(MODEL, BATCHES if sizes else [], sizes)


def test_lzma():
    texts = {"a": ["hello hello hello ", "naïve"], "b": ["x" * 1000]}
    got = lzma_bits_per_byte(texts)
    a, b = "hello hello hello naïve".encode(), b"x" * 1000
    size = lambda data: 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))  # noqa: E731
    assert got == {"all": size(a + b) / len(a + b), "a": size(a) / len(a), "b": size(b) / len(b)}
    assert len(a) == 24  # bytes, not characters


def test_lzma_of_nothing():
    for texts in ({}, {"a": []}, {"a": ["text"], "b": [""]}):
        with pytest.raises(DataError, match="no bytes to evaluate on in domain"):
            lzma_bits_per_byte(texts)
