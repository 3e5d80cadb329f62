"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmx.core.errors import ConfigError, nearest
from lmx.core.nodes import node
from lmx.core.specs import ParamSpec

KINDS = ("rmsnorm", "layernorm")


@node
class Norm:
    scale: Any  # (d,), or (h, c) for a norm over all heads together
    bias: Any  # the same, or None


def abstract(width: int, bias: bool, dtype: str, *, offset: bool = False) -> Norm:
    """The specs of a norm over `width` numbers, its scales stored as they are or (offset) less 1."""
    spec = ParamSpec((width,), (None,), "zeros" if offset else "ones", dtype=dtype)
    return Norm(spec, spec.replace(init="zeros") if bias else None)


def norm(params: Norm | None, x: jax.Array, kind: str, eps: float, *, offset: bool = False) -> jax.Array:
    """Normalise the last axes of x (..., d), as many as the scale has; float32 inside, x's dtype outside.

    "rmsnorm": Zhang and Sennrich 2019, equation 4; "layernorm": Ba et al. 2016, equation 4. offset: the scale is
    1 + the parameter (Gemma). Without parameters (None) x is returned. Raises ConfigError for another kind.
    """
    if params is None:
        return x
    if kind not in KINDS:
        raise ConfigError(f"no norm {kind!r}, there are {', '.join(KINDS)}{nearest(kind, KINDS)}")
    y, axes = x.astype(jnp.float32), tuple(range(-params.scale.ndim, 0))
    if kind == "layernorm":
        y = y - y.mean(axes, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + eps)
    y = y * (params.scale.astype(jnp.float32) + (1.0 if offset else 0.0))
    if params.bias is not None:
        y = y + params.bias.astype(jnp.float32)
    return y.astype(x.dtype)
