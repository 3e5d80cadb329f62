"""Multi-head attention with grouped key-value heads: projections, and the cache of decoding.

Shapes: q (b, t, h, c), k and v (b, s, k, c), h a multiple of k (Ainslie et al. 2023, "GQA"). The products of queries,
keys and values are in `dot_product.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import sharding, weights
from lmx.core.nodes import node
from lmx.core.specs import ParamSpec
from lmx.nn import mlp, norm, position

Angles = tuple[jax.Array, jax.Array] | None
Normalise = Callable[[norm.Norm, jax.Array], jax.Array] | None  # a norm's parameters and what they normalise


@node
class Attention:
    query: Any  # weight (d, h, c)
    key: Any  # weight (d, k, c), or (r, k, c) behind a latent
    value: Any  # weight (d, k, c), or (r, k, c) behind a latent
    out: Any  # weight (h, c, d)
    query_bias: Any  # (h, c) or None
    key_bias: Any  # (k, c) or None
    value_bias: Any  # (k, c) or None
    out_bias: Any  # (d,) or None
    query_norm: norm.Norm | None = None  # over each head (c,), or over all of them (h, c)
    key_norm: norm.Norm | None = None
    latent: Any = None  # weight (d, r): what keys and values are made from (`lmx.nn.latent`), or None
    joined: Any = None  # weight (d, h + 2k, c): query, key and value, which are None then (`join`), or None


def abstract(
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bias: bool,
    out_bias: bool,
    std: float,
    out_std: float,
    dtype: str,
    qk_norm: norm.Norm | None = None,
    full: bool = False,
) -> Attention:
    """The specs of an attention layer; `bias` is that of query, key and value. qk_norm: the specs of a norm over one
    head, for queries and for keys; full: over all heads together."""
    query = ParamSpec((width, heads, head_dim), ("embed", "heads", "head_dim"), std, inputs=1, dtype=dtype)
    key = ParamSpec((width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), std, inputs=1, dtype=dtype)
    query_bias = ParamSpec((heads, head_dim), ("heads", "head_dim"), dtype=dtype) if bias else None
    key_bias = ParamSpec((kv_heads, head_dim), ("kv_heads", "head_dim"), dtype=dtype) if bias else None
    return Attention(
        query=query,
        key=key,
        value=key,
        out=ParamSpec((heads, head_dim, width), ("heads", "head_dim", "embed"), out_std, inputs=2, dtype=dtype),
        query_bias=query_bias,
        key_bias=key_bias,
        value_bias=key_bias,
        out_bias=ParamSpec((width,), (None,), dtype=dtype) if out_bias else None,
        query_norm=_over_heads(qk_norm, heads, "heads") if full else qk_norm,
        key_norm=_over_heads(qk_norm, kv_heads, "kv_heads") if full else qk_norm,
    )


def _over_heads(specs: norm.Norm | None, heads: int, axis: str) -> norm.Norm | None:
    """The specs of a norm over one head, as those of a norm over all heads together."""
    return jax.tree.map(lambda spec: spec.replace(shape=(heads, *spec.shape), axes=(axis, "head_dim")), specs)


def join(params: Attention) -> Attention:
    """The same layer with query, key and value as one matrix, multiplied once and not three times, where they are
    plain arrays of one dtype that read the same x; else as it is."""
    parts = (params.query, params.key, params.value)
    if params.joined is not None or params.latent is not None:
        return params
    if any(map(weights.is_weight, parts)) or len({w.dtype for w in parts}) > 1:
        return params
    return params.replace(query=None, key=None, value=None, joined=jnp.concatenate(parts, axis=-2))


def project(
    params: Attention, x: jax.Array, angles: Angles = None, normalise: Normalise = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`project_query` and `project_key_value` of the same x (b, t, d): queries (b, t, h, c), keys and values
    (b, t, k, c)."""
    if params.joined is None:
        return project_query(params, x, angles, normalise), *project_key_value(params, x, angles, normalise)
    y = _heads(x, params.joined)
    h = params.out.shape[-3]
    q, k, v = jnp.split(y, (h, (h + y.shape[2]) // 2), axis=2)
    q = _finish(q, params.query_bias, params.query_norm, angles, normalise)
    k = _finish(k, params.key_bias, params.key_norm, angles, normalise)
    return q, k, _finish(v, params.value_bias)


def project_query(params: Attention, x: jax.Array, angles: Angles = None, normalise: Normalise = None) -> jax.Array:
    """Queries (b, t, h, c) of x (b, t, d): normalised where the layer has a norm for them, rotated unless angles is
    None."""
    return _finish(_heads(x, params.query), params.query_bias, params.query_norm, angles, normalise)


def project_key_value(
    params: Attention, x: jax.Array, angles: Angles = None, normalise: Normalise = None
) -> tuple[jax.Array, jax.Array]:
    """Keys and values (b, s, k, c) of x (b, s, d), the keys normalised and rotated as queries are."""
    if params.latent is not None:
        x = project_latent(params, x)
    return project_key(params, x, angles, normalise), project_value(params, x)


def project_latent(params: Attention, x: jax.Array) -> jax.Array:
    """The latents (b, s, r) of x (b, s, d)."""
    return mlp.linear("btd,dr->btr", x, params.latent, None)


def project_key(params: Attention, x: jax.Array, angles: Angles = None, normalise: Normalise = None) -> jax.Array:
    """Keys (b, s, k, c) of what the layer makes them from: x (b, s, d), or latents (b, s, r)."""
    return _finish(_heads(x, params.key), params.key_bias, params.key_norm, angles, normalise)


def project_value(params: Attention, x: jax.Array) -> jax.Array:
    """Values (b, s, k, c) of x (b, s, d), or of latents (b, s, r)."""
    return _finish(_heads(x, params.value), params.value_bias)


def _heads(x: jax.Array, weight: Any) -> jax.Array:
    """x (b, t, d) times a weight (d, h, c): (b, t, h, c)."""
    return weights.einsum("btd,dhc->bthc", x, weight)


def _finish(
    y: jax.Array, bias: Any, by: norm.Norm | None = None, angles: Angles = None, normalise: Normalise = None
) -> jax.Array:
    """A product (b, t, h, c) with its bias, normalised and rotated, where there is that."""
    y = mlp.add_bias(y, bias)
    y = y if by is None else normalise(by, y)
    return y if angles is None else position.rotate(y, angles)


def project_out(params: Attention, y: jax.Array) -> jax.Array:
    """(b, t, d) from the heads' results y (b, t, h, c)."""
    return mlp.linear("bthc,hcd->btd", y, params.out, params.out_bias)


@node
class Cache:
    """Keys and values of one layer for every position so far: each (b, k, s, c)."""

    key: Any
    value: Any

    @property
    def length(self) -> int:
        """How many positions there is room for."""
        return self.key.shape[2]


def empty_cache(batch: int, kv_heads: int, length: int, head_dim: int, dtype: Any) -> Cache:
    """A cache with room for `length` positions."""
    axes, shape = ("batch", "kv_heads", None, "head_dim"), (batch, kv_heads, length, head_dim)
    zeros = jnp.zeros(shape, dtype, out_sharding=sharding.out_sharding(shape, *axes))
    return Cache(zeros, zeros)


def write(cache: Cache, k: jax.Array, v: jax.Array, start: jax.Array) -> Cache:
    """Put keys and values (b, q, k, c) of q new positions where each row stands: start (b,), or () for all rows."""
    return Cache(put(cache.key, k, start), put(cache.value, v, start))


def put(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """A cache (b, k, s, c) with new entries (b, q, k, c) where each row stands, as in `write`."""
    new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)  # (b, k, q, c)
    if start.ndim == 0:
        whole = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=2)  # noqa: E731
        if new.shape[2] > 1 or sharding.platform() != "cpu" or sharding.mesh_kind() is not None:
            return whole(cache, new)
        # XLA's CPU backend would fuse the update into the product that reads it, a second time, and to keep both apart
        # copy the cache four times a token. It does not look into a branch.
        return jax.lax.cond(start >= 0, whole, lambda cache, _: cache, cache, new)
    if sharding.mesh_kind() is None:
        one = lambda row, piece, at: jax.lax.dynamic_update_slice_in_dim(row, piece, at, axis=1)  # noqa: E731
        return jax.vmap(one)(cache, new, start)
    # A scatter of rows has no sharding rule: on a mesh, compare positions instead and choose.
    start = sharding.place(start, "batch")
    offset = jnp.arange(cache.shape[2])[None, :] - start[:, None]  # (b, s)
    hit = offset[:, :, None] == jnp.arange(new.shape[2])  # (b, s, q)
    moved = jnp.einsum("bsq,bkqc->bksc", hit.astype(new.dtype), new)
    return jnp.where(hit.any(-1)[:, None, :, None], moved, cache)
