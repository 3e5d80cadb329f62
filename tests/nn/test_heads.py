"""Heads: their hidden layer, what they read out, and how rows are pooled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.nn import heads, norm
from lmx.nn.heads import Head, Readout

X = jax.random.normal(jax.random.key(0), (2, 3, 4))
W, V = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 5), (5, 7)], 1))


def test_a_tied_head_scales_bounds_and_shifts():
    table, bias = jax.random.normal(jax.random.key(3), (7, 4)), jnp.arange(7.0)
    got = Readout(Head(out_bias=bias), table, scale=0.5, softcap=2.0).logits(X)
    wanted = np.einsum("btd,vd->btv", np.asarray(X, np.float64), table) * 0.5 + np.arange(7)
    np.testing.assert_allclose(got, 2 * np.tanh(wanted / 2), rtol=1e-5, atol=1e-6)
    assert got.dtype == jnp.float32


def test_a_hidden_layer_is_activated_then_normalised():
    head = Head(W, jnp.ones(5), norm.Norm(jnp.full(5, 2.0), None), V)
    got = Readout(head, activation="relu", norm=("rmsnorm", 1e-5, False)).logits(X)
    h = np.maximum(np.asarray(X, np.float64) @ W + 1, 0)
    h = 2 * h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, h @ np.asarray(V, np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", heads.POOLS)
def test_pooling_leaves_padding_out(how):
    ids = jnp.array([[0, 1, 1], [1, 1, 0]])
    rows = [np.asarray(X)[0, 1:], np.asarray(X)[1, :2]]
    wanted = {"first": [r[0] for r in rows], "last": [r[-1] for r in rows], "mean": [r.mean(0) for r in rows],
              "max": [r.max(0) for r in rows]}[how]  # fmt: skip
    np.testing.assert_allclose(heads.pool(X, how, ids), wanted, rtol=1e-6, atol=1e-6)
    whole = {"first": X[:, 0], "last": X[:, -1], "mean": X.mean(1), "max": X.max(1)}[how]
    np.testing.assert_allclose(heads.pool(X, how), whole, rtol=1e-6, atol=1e-6)
    assert (heads.pool(X, how, jnp.zeros((2, 3), jnp.int32)) == 0).all()
