"""What a Transformer reads: token vectors, learned positions and types, their norm and their projection."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import sharding, weights
from lmx.core.nodes import node
from lmx.core.specs import ParamSpec
from lmx.nn import mlp
from lmx.nn import norm as norms


@node
class Embedding:
    """Tables of width e: the model's d, unless a projection follows (Lan et al. 2019, "ALBERT", section 3.1)."""

    tokens: Any  # weight (v, e); None in an encoder or decoder that shares the other's
    positions: Any  # weight (positions, e), or None
    types: Any = None  # weight (types, e), or None
    norm: norms.Norm | None = None  # over e, of the sum
    projection: Any = None  # weight (e, d), or None
    projection_bias: Any = None  # (d,) or None


def table(rows: int, width: int, std: float, dtype: str, axis: str | None = None) -> ParamSpec:
    """The spec of a table of vectors (rows, width)."""
    return ParamSpec((rows, width), (axis, "embed"), std, inputs=1, dtype=dtype)


def projection(width: int, wider: int, std: float, dtype: str) -> tuple[ParamSpec, ParamSpec]:
    """The specs of a projection (e, d) and its bias."""
    weight = ParamSpec((width, wider), (None, "embed"), std, inputs=1, dtype=dtype)
    return weight, ParamSpec((wider,), (None,), dtype=dtype)


def add_positions(params: Embedding, x: jax.Array, positions: jax.Array, offset: int = 0) -> jax.Array:
    """x (b, t, e) plus the learned vectors of positions (b, t), if there are any; `offset`: the first one's row."""
    if params.positions is None:
        return x
    return x + weights.take(positions + offset, params.positions).astype(x.dtype)


def add_types(params: Embedding, x: jax.Array, types: jax.Array | None) -> jax.Array:
    """x (b, t, e) plus the vectors of token types (b, t), if there are any; all of type 0 by default."""
    if params.types is None:
        return x
    types = jnp.zeros((1, 1), jnp.int32) if types is None else types
    return x + weights.take(types, params.types).astype(x.dtype)


def project(params: Embedding, x: jax.Array) -> jax.Array:
    """x (b, t, e) brought to the width of the layers (b, t, d)."""
    if params.projection is not None:
        x = mlp.linear("bte,ed->btd", x, params.projection, params.projection_bias)
    return sharding.place(x, "batch", "sequence", None)
