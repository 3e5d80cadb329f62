"""Axes of arrays made whole, merged, split and permuted, on a mesh of any kind or none.

An Explicit mesh wants the layout of every result that it cannot derive stated; without one these are plain operations.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lmx.core import sharding


def _explicit() -> bool:
    return sharding.mesh_kind() is AxisType.Explicit


def _layout(x: jax.Array) -> list[Any]:
    """What splits each axis of x."""
    return [entry or None for entry in sharding.entries(x)]


def whole(x: jax.Array, *which: int) -> jax.Array:
    """x with these axes whole on every device."""
    if not _explicit():
        return x
    layout = _layout(x)
    for axis in which:
        layout[axis] = None
    return jax.reshard(x, P(*layout))


def merge(x: jax.Array, axis: int) -> jax.Array:
    """x with all axes from `axis` on, which are whole, as one."""
    out = P(*_layout(x)[:axis], None) if _explicit() else None
    return jnp.reshape(x, (*x.shape[:axis], math.prod(x.shape[axis:])), out_sharding=out)


def split(x: jax.Array, axis: int, sizes: tuple[int, ...]) -> jax.Array:
    """x with one axis, which is whole, as several of these sizes."""
    axis, out = axis % x.ndim, None
    if _explicit():
        layout = _layout(x)
        out = P(*layout[:axis], *[None] * len(sizes), *layout[axis + 1 :])
    return jnp.reshape(x, (*x.shape[:axis], *sizes, *x.shape[axis + 1 :]), out_sharding=out)


def permute(x: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    """x with the entries of one axis, which is whole, in another order: (m,), or (copies..., m) where x too begins with
    the copies."""
    axis = axis % x.ndim
    if order.ndim > 1:
        return jax.vmap(lambda x, order: permute(x, order, axis - 1))(x, order)
    at = (*[slice(None)] * axis, order)
    return x.at[at].get(mode="clip", unique_indices=True, out_sharding=P(*_layout(x)) if _explicit() else None)


def rows_apart(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """(b, ...) to (n, b / n, ...): the rows that each of the n devices along these axes of the mesh holds, or would."""
    n = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    shape = (n, x.shape[0] // n, *x.shape[1:])
    if not _explicit():
        return _rows_constrained(x.reshape(shape), axes)
    behind = _layout(x)[1:]
    return jnp.reshape(jax.reshard(x, P(axes, *behind)), shape, out_sharding=P(axes, None, *behind))


def rows_together(x: jax.Array, axes: tuple[str, ...], like: jax.Array) -> jax.Array:
    """The inverse of `rows_apart`, in the shape and layout of `like` (b, ...)."""
    if not _explicit():
        return _rows_constrained(x.reshape(like.shape), axes)
    y = jnp.reshape(x, like.shape, out_sharding=P(axes, *_layout(x)[2:]))
    return jax.reshard(y, jax.typeof(like).sharding.spec)


def _rows_constrained(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, P(axes, *[P.UNCONSTRAINED] * (x.ndim - 1)))
