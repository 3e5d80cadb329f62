"""A weight that shows what goes in and what comes back: how inputs and gradients inside a layer are seen from outside.

A `Tap` stands where a weight does and computes what it computes. Differentiate with respect to its two zeros, and what
comes out for `x` is the input itself and for `y` the gradient at the output: no model code knows of it, and what nobody
asks for is not computed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import sharding, weights
from lmx.core.nodes import node


@node
class Tap(weights.Weight):
    """A weight (inputs..., outputs...) of any kind, multiplied once, with x (b, t, ...), or looked up by ids (b, t)."""

    base: Any
    x: Any  # (b, t, m) zeros, m the product of the input axes, or None
    y: Any  # (b, t, n) zeros, n the product of the output axes, or None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def einsum(self, subscripts: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        x = x if self.x is None else _show_value(x, self.x)
        y = weights.einsum(subscripts, x, self.base, dtype)
        return y if self.y is None else _show_gradient(y, self.y)

    def take(self, ids: jax.Array) -> jax.Array:
        y = weights.take(ids, self.base)
        return y if self.y is None else _show_gradient(y, self.y)

    def dense(self) -> jax.Array:
        return weights.dense(self.base)


def zeros(rows: int, length: int, width: int) -> jax.Array:
    """(b, t, width) for a tap, laid out as a batch is."""
    axes = ("batch", "sequence", None)
    shape = (rows, length, width)
    return sharding.place(jnp.zeros(shape, out_sharding=sharding.out_sharding(shape, *axes)), *axes)


@jax.custom_vjp
def _show_value(x: jax.Array, tap: jax.Array) -> jax.Array:
    """x, whose value is what comes back for the tap."""
    return x


_show_value.defvjp(lambda x, tap: (x, (x, tap)), lambda kept, g: (g, _flat(*kept)))


@jax.custom_vjp
def _show_gradient(y: jax.Array, tap: jax.Array) -> jax.Array:
    """y, whose gradient is what comes back for the tap too."""
    return y


_show_gradient.defvjp(lambda y, tap: (y, tap), lambda tap, g: (g, _flat(g, tap)))


def _flat(x: jax.Array, like: jax.Array) -> jax.Array:
    """x (b, t, ...) with the axes behind as one, laid out and typed as `like` (b, t, n)."""
    if sharding.mesh_kind() is not None:
        x = sharding.place(x, "batch", "sequence", *[None] * (x.ndim - 2))
    return x.reshape(like.shape).astype(like.dtype)
