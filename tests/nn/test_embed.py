"""Token types, learned positions and the projection of narrow tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import specs
from lmx.nn import embed


def made(**changes) -> embed.Embedding:
    parts = {"tokens": embed.table(11, 4, 1.0, "float32", "vocab"), "positions": embed.table(9, 4, 1.0, "float32")}
    return specs.init(embed.Embedding(**(parts | changes)), jax.random.key(0))


def test_learned_positions_are_rows_from_an_offset():
    params, x = made(), jnp.ones((1, 3, 4))
    positions = jnp.array([[0, 6, 1]])
    rows = np.asarray(params.positions)
    np.testing.assert_array_equal(embed.add_positions(params, x, positions), 1 + rows[[[0, 6, 1]]])
    np.testing.assert_array_equal(embed.add_positions(params, x, positions, offset=2), 1 + rows[[[2, 8, 3]]])
    assert embed.add_positions(params, x.astype(jnp.bfloat16), positions).dtype == jnp.bfloat16
    np.testing.assert_array_equal(embed.add_positions(params.replace(positions=None), x, positions), x)


def test_types_default_to_the_first():
    params, x = made(types=embed.table(2, 4, 1.0, "float32")), jnp.ones((1, 3, 4))
    rows = np.asarray(params.types)
    np.testing.assert_array_equal(embed.add_types(params, x, jnp.array([[0, 1, 1]])), 1 + rows[[[0, 1, 1]]])
    np.testing.assert_array_equal(embed.add_types(params, x, None), np.broadcast_to(1 + rows[0], (1, 3, 4)))
    np.testing.assert_array_equal(embed.add_types(made(), x, None), x)


def test_a_projection_and_its_bias():
    weight, bias = embed.projection(4, 6, 1.0, "float32")
    assert (weight.shape, weight.axes, weight.inputs) == ((4, 6), (None, "embed"), 1)
    params = made(projection=weight, projection_bias=bias.replace(init=1.0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    wanted = np.asarray(x) @ np.asarray(params.projection) + np.asarray(params.projection_bias)
    np.testing.assert_allclose(embed.project(params, x), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(embed.project(made(), x), x)
