"""The projections of attention and the cache of decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core import specs
from lmx.core.sharding import place
from lmx.nn import attention, norm, position


@pytest.mark.parametrize("bias", [True, False])
def test_projections_equal_float64(bias):
    tree = attention.abstract(8, 4, 2, 6, bias, bias, 0.3, 0.3, "float32")
    p = specs.init(tree, jax.random.key(0))
    p = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), p)
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))

    def of(x, w, b):
        y = np.einsum("btd,dhc->bthc", np.asarray(x, np.float64), np.asarray(w, np.float64))
        return y if b is None else y + np.asarray(b)

    q, (k, v) = attention.project_query(p, x), attention.project_key_value(p, x)
    for y, w, b in ((q, p.query, p.query_bias), (k, p.key, p.key_bias), (v, p.value, p.value_bias)):
        np.testing.assert_allclose(y, of(x, w, b), rtol=1e-5, atol=1e-6)
    angles = position.rotary_angles(jnp.arange(3)[None], 6, 1e4)
    np.testing.assert_array_equal(attention.project_query(p, x, angles), position.rotate(q, angles))
    turned = attention.project_key_value(p, x, angles)
    np.testing.assert_array_equal(turned[0], position.rotate(k, angles))
    np.testing.assert_array_equal(turned[1], v)  # values are not turned
    z = attention.project_out(p, q)
    wanted = np.einsum("bthc,hcd->btd", *(np.asarray(a, np.float64) for a in (q, p.out)))
    np.testing.assert_allclose(z, wanted + (np.asarray(p.out_bias) if bias else 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_queries_and_keys_are_normalised_before_they_turn(full):
    qk_norm = norm.abstract(6, False, "float32")
    p = specs.init(attention.abstract(8, 4, 2, 6, False, False, 0.3, 0.3, "float32", qk_norm, full), jax.random.key(0))
    shapes = (p.query_norm.scale.shape, p.key_norm.scale.shape)
    assert shapes == (((4, 6), (2, 6)) if full else ((6,), (6,)))
    p = p.replace(query_norm=p.query_norm.replace(scale=p.query_norm.scale * 3))
    plain = p.replace(query_norm=None, key_norm=None)
    x, angles = jax.random.normal(jax.random.key(1), (2, 3, 8)), position.rotary_angles(jnp.arange(3)[None], 6, 1e4)
    of_heads = lambda params, x: norm.norm(params, x, "rmsnorm", 1e-6)  # noqa: E731
    axes = (-2, -1) if full else -1

    def wanted(x, scale):
        x = np.asarray(x, np.float64)
        x = scale * x / np.sqrt(np.square(x).mean(axes, keepdims=True) + 1e-6)
        return position.rotate(jnp.asarray(x, jnp.float32), angles)

    q, (k, v) = attention.project_query(plain, x), attention.project_key_value(plain, x)
    np.testing.assert_allclose(attention.project_query(p, x, angles, of_heads), wanted(q, 3), rtol=1e-5, atol=1e-6)
    got = attention.project_key_value(p, x, angles, of_heads)
    np.testing.assert_allclose(got[0], wanted(k, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], v)


def test_write_puts_each_row_where_it_stands(mesh):
    """With a start for all rows, or one a row; on meshes too, where the rows are chosen by comparison."""
    cache = jax.tree.map(lambda x: x - 1, attention.empty_cache(8, 2, 7, 3, jnp.float32))
    k = place(jax.random.normal(jax.random.key(0), (8, 2, 2, 3)), "batch", None, "kv_heads", "head_dim")  # (b, q, k, c)
    for start in (jnp.array(3), jnp.array([0, 5, 2, 2, 4, 1, 0, 3])):
        made = jax.jit(attention.write)(cache, k, 2 * k, start)
        wanted = -np.ones((8, 2, 7, 3), np.float32)
        for row in range(8):
            at = int(np.broadcast_to(np.asarray(start), (8,))[row])
            wanted[row, :, at : at + 2] = np.swapaxes(np.asarray(k), 1, 2)[row]
        np.testing.assert_array_equal(np.asarray(made.key), wanted)
        np.testing.assert_array_equal(np.asarray(made.value), np.where(wanted == -1, -1, 2 * wanted))
