"""Sums over all positions of a batch, a chunk at a time, their gradient computed in the forward pass.

The (b, t, v) logits are never held whole. While a chunk's logits are there its gradient is taken too, so the backward
pass only scales what the forward pass left: the head is multiplied three times and not four, and no logits are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lmx.core import sharding
from lmx.core.axes import rows_apart, rows_together
from lmx.models.protocol import split_chunks

# terms(logits (b, chunk, v), fixed, piece of given) -> (sums, gradient of the first with respect to the logits)
Terms = Callable[[jax.Array, Any, Any], tuple[tuple[jax.Array, ...], jax.Array]]
# Logits of a chunk on one device, about: 16 MB of float32 on a CPU, to stay in its cache; 256 MB on accelerators, so
# that the head's gradient, which every chunk adds to, is read and written a few times only.
CHUNK_LOGITS, ON_CPU = 1 << 26, 1 << 22


def default(b: int, t: int, v: int) -> int:
    """Positions of every row taken at a time: about 4 million logits a device, 64 million on accelerators."""
    devices = jax.sharding.get_abstract_mesh().size if sharding.mesh_kind() else 1
    logits = ON_CPU if sharding.platform() == "cpu" else CHUNK_LOGITS
    return min(t, max(16, logits * devices // (b * v)))


def gathered(readout: Any, features: Any) -> Any:
    """The readout, whole along the mesh axes that split positions of the features, so that no chunk gathers it anew."""
    if sharding.mesh_kind() is not AxisType.Explicit:
        return readout
    busy = {axis for entry in sharding.entries(_first(features))[:2] for axis in entry}

    def gather(leaf: jax.Array) -> jax.Array:
        kept = [tuple(axis for axis in entry if axis not in busy) or None for entry in sharding.entries(leaf)]
        return jax.reshard(leaf, jax.P(*kept))

    return jax.tree.map(gather, readout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(terms: Terms, chunk: int, readout: Any, features: Any, fixed: Any, given: Any) -> tuple[jax.Array, ...]:
    """The sums that `terms` gives of every chunk, added up.

    The first can be differentiated, with respect to the readout (`gathered`) and the features (leaves (b, t, ...));
    `fixed`, which every chunk reads whole, and `given`, leaves (b, t, ...) cut as the features are, have no gradient.
    Behind the last position the pieces hold zeros.
    """

    def step(_, piece):
        f, rest = piece
        return None, terms(readout.logits(f), fixed, rest)[0]

    def of_rows(features, given):
        return _added(jax.lax.scan(step, None, _pieces(chunk, features, given))[1]), None

    return _by_shard(of_rows, features, given)[0]


def _forward(terms, chunk, readout, features, fixed, given):
    def step(d_readout, piece):
        f, rest = piece
        logits, pull = jax.vjp(lambda r, f: r.logits(f), readout, f)
        sums, d_logits = terms(logits, fixed, rest)
        d_r, d_f = _inexact(pull(d_logits))
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_readout, d_r), (sums, d_f)

    def of_rows(features, given):
        start = jax.tree.map(lambda x: sharding.zeros_like(x, jnp.float32), _inexact(readout))
        d_readout, (sums, d_features) = jax.lax.scan(step, start, _pieces(chunk, features, given))
        return (d_readout, _added(sums)), jax.tree.map(_join, d_features, _inexact(features))

    (d_readout, sums), d_features = _by_shard(of_rows, features, given)
    return sums, (readout, d_readout, d_features)


def _by_shard(of_rows: Callable, features: Any, given: Any) -> tuple[Any, Any]:
    """`of_rows(features, given)` of leaves (b, ...): (a tree of sums over rows, a tree like the features or None).

    Where a mesh splits the features' rows, each shard has sums of its own, and these are added up at the end. Of one
    sum for all rows, the devices' shares would be added up in every round of a loop, where the compiler does not move
    that out by itself (TPU's does).
    """
    axes = sharding.row_axes(_first(features))
    if not axes:
        return of_rows(features, given)
    parts = jax.tree.map(lambda x: rows_apart(x, axes), (features, given))
    with sharding.rows_whole():
        auto = sharding.mesh_kind() is AxisType.Auto
        sums, rows = jax.vmap(of_rows, spmd_axis_name=axes if auto else None)(*parts)
    if rows is not None:
        rows = jax.tree.map(lambda x, like: rows_together(x, axes, like), rows, _inexact(features))
    return jax.tree.map(lambda x: x.sum(0), sums), rows


def _first(features: Any) -> jax.Array:
    return jax.tree.leaves(features)[0]


def _backward(terms, chunk, saved, cotangent):
    readout, d_readout, d_features = saved
    g = cotangent[0]
    scale = lambda d, like: (g * d).astype(like.dtype)  # noqa: E731
    d_features = jax.tree.map(lambda d: (g * d).astype(d.dtype), d_features)
    return jax.tree.map(scale, d_readout, _inexact(readout)), d_features, None, None


summed.defvjp(_forward, _backward)


def _pieces(chunk: int, features: Any, given: Any) -> Any:
    return jax.tree.map(lambda leaf: split_chunks(leaf, chunk), (features, given))


def _added(sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return jax.tree.map(lambda x: x.sum(0), sums)


def _inexact(tree: Any) -> Any:
    """None in place of leaves that have no gradient, such as the tokens that an n-gram model's features are."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _join(pieces: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `split_chunks`: (chunks, b, chunk, ...) to (b, t, ...)."""
    n, b, chunk, *rest = pieces.shape
    return jnp.moveaxis(pieces, 0, 1).reshape(b, n * chunk, *rest)[:, : like.shape[1]]
