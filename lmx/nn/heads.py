"""Heads: what turns features into logits over a vocabulary or over classes, or into one vector a sequence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import weights
from lmx.core.nodes import node, static
from lmx.core.specs import ParamSpec
from lmx.nn import mlp
from lmx.nn import norm as norms

POOLS = ("first", "last", "mean", "max")


@node
class Head:
    """An optional hidden layer and its norm, then a linear map."""

    hidden: Any = None  # weight (d, e), or None
    hidden_bias: Any = None  # (e,) or None
    norm: norms.Norm | None = None  # over e, after the activation
    out: Any = None  # weight (e, v), or None where the token table (v, e) serves, or where nothing follows
    out_bias: Any = None  # (v,) or None


def output(width: int, size: int, std: float, dtype: str, axis: str | None = "vocab") -> ParamSpec:
    """The spec of a linear map (d, v)."""
    return ParamSpec((width, size), ("embed", axis), std, inputs=1, dtype=dtype)


@node
class Readout:
    """A head with all it needs: features (..., d) to logits (..., v) float32."""

    head: Head
    table: Any = None  # weight (v, e): the token table, where the head has no matrix of its own
    activation: str | None = static(default=None)  # of the hidden layer
    norm: tuple[str, float, bool] = static(default=("layernorm", 1e-5, False))  # kind, eps, offset
    scale: float = static(default=1.0)  # of the logits
    softcap: float | None = static(default=None)  # c tanh(logits / c)

    def hidden(self, features: jax.Array) -> jax.Array:
        """(b, t, d) -> (b, t, e): the hidden layer, if there is one."""
        if self.head.hidden is None:
            return features
        function, _ = mlp.ACTIVATIONS[self.activation]
        y = function(mlp.linear("btd,de->bte", features, self.head.hidden, self.head.hidden_bias))
        kind, eps, offset = self.norm
        return norms.norm(self.head.norm, y, kind, eps, offset=offset)

    def logits(self, features: jax.Array) -> jax.Array:
        """(b, t, d) -> (b, t, v) float32."""
        x = self.hidden(features)
        if self.head.out is None and self.table is None:
            return x.astype(jnp.float32)
        return self.finished(self.products(x))

    def products(self, x: jax.Array) -> jax.Array:
        """(b, t, e) -> (b, t, v) float32: the products with the head's matrix, or with the token table."""
        if self.head.out is not None:
            return weights.einsum("btd,dv->btv", x, self.head.out, jnp.float32)
        return weights.einsum("btd,vd->btv", x, self.table, jnp.float32)

    def finished(self, y: jax.Array) -> jax.Array:
        """(b, t, v) -> (b, t, v): products scaled, biased and capped, each by itself."""
        if self.scale != 1.0:
            y = y * self.scale
        if self.head.out_bias is not None:
            y = y + self.head.out_bias.astype(jnp.float32)
        return y if self.softcap is None else softcap(y, self.softcap)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """cap tanh(x / cap): numbers that stay within (-cap, cap). Gemma Team 2024, "Gemma 2", section 2."""
    return cap * jnp.tanh(x / cap)


def pool(features: jax.Array, how: str, segment_ids: jax.Array | None = None) -> jax.Array:
    """One vector (b, d) for each row of features (b, t, d): its first, its last, the mean or the maximum.

    segment_ids (b, t): positions of segment 0, padding, do not count; a row of padding alone gives zeros.
    """
    t = features.shape[1]
    real = jnp.ones_like(features[..., 0], bool) if segment_ids is None else segment_ids != 0
    if how == "max":
        low = jnp.where(real[..., None], features, -jnp.inf).max(1)
        return jnp.where(real.any(1)[:, None], low, 0).astype(features.dtype)
    index = jnp.arange(t)
    if how == "mean":
        share = real / jnp.maximum(real.sum(1, keepdims=True), 1)
    elif how == "first":
        share = index == jnp.where(real, index, t).min(1, keepdims=True)
    else:
        share = index == jnp.where(real, index, -1).max(1, keepdims=True)
    # a sum and no product of matrices, which on an Explicit mesh would want both laid out alike
    return (share[..., None].astype(jnp.float32) * features.astype(jnp.float32)).sum(1).astype(features.dtype)
