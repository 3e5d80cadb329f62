"""The one entry for softmax(q k') v, and its implementations.

`attention(...)` chooses by platform: "reference" is plain float32 over the whole (t, s) matrix; "blockwise" walks
blocks of queries and skips the keys after them, which on CPUs saves half the work and the traffic of a large
intermediate; "splash" and "cudnn" are the fused kernels of TPUs and NVIDIA GPUs (`kernels.py`). All are equal in values
and gradients up to rounding.

Shapes: q (b, t, h, c), k and v (b, s, k, c) -> (b, t, h, c); h = k g, and query head i reads key-value head i // g.
"reference" also takes values that all heads share, (b, s, r) -> (b, t, h, r).
Values may be of another width, or (b, s, r) that all heads share (-> (b, t, h, r)), where "reference" computes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lmx.core import sharding
from lmx.core.errors import ConfigError, nearest
from lmx.nn import kernels

IMPLEMENTATIONS = ("auto", "reference", "blockwise", "splash", "cudnn")
MASKED = -1e30  # finite, so that a row without any key gives numbers and not NaN
BLOCKS = 16  # the most blocks of queries that are unrolled


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attend: (b, t, h, c) in q's dtype, softmax in float32. Vaswani et al. 2017, equation 1.

    causal:      query i sees keys 0..i (t == s).
    segment_ids: (b, t) with t == s: a query sees keys of its own segment only.
    window:      query i sees keys j with |i - j| < window only (t == s).
    mask:        (b, t, s) bool, True where a query may look; with it, none of the three above.
    bias:        (b or 1, h, t, s), added to the scaled products.
    scale:       of the products; 1 / sqrt(c) by default.
    softcap:     bounds the scaled products: softcap tanh(x / softcap).
    Raises ConfigError for an unknown implementation, heads that do not group, or an implementation that cannot take
    these arguments: all but "reference" take no mask, "splash" wants a multiple of 128 positions, "cudnn" bfloat16.
    """
    if implementation not in IMPLEMENTATIONS:
        hint = nearest(implementation, IMPLEMENTATIONS)
        raise ConfigError(f"no attention {implementation!r}, there are {', '.join(IMPLEMENTATIONS)}{hint}")
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"{q.shape[2]} query heads do not group over {k.shape[2]} key-value heads")
    if mask is not None and (segment_ids is not None or window is not None):
        raise ConfigError("give attention a mask or segment_ids and window, not both; a mask says all that is seen")
    if mask is None and (causal or segment_ids is not None or window is not None) and q.shape[1] != k.shape[1]:
        raise ConfigError(
            f"{q.shape[1]} queries of {k.shape[1]} keys need a mask=; causal=, segment_ids= and window= want equal "
            "numbers"
        )
    changed, unlike = bias is not None or softcap is not None, q.shape[1] != k.shape[1]
    if implementation == "auto":
        masked = mask is not None or unlike
        implementation = choose(q, causal, masked=masked, changed=changed, windowed=window is not None)
    elif implementation != "reference":
        _check_fits(implementation, q, mask, changed, window is not None and not causal)
        if unlike:
            numbers = f"not {k.shape[1]} for {q.shape[1]}"
            raise ConfigError(f"{implementation} attention takes as many keys as queries, {numbers}; use 'auto'")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation in ("splash", "cudnn"):
        return getattr(kernels, implementation)(q, k, v, causal, segment_ids, scale, window)
    q, k, v = _group(q, k, v)
    bias = None if bias is None else _group_bias(bias, q)
    seen = Seen(causal, window)
    if implementation == "blockwise":
        y = _blockwise(q, k, v, seen, segment_ids, bias, scale, softcap)
    else:
        visible = mask if mask is not None else seen.of(q.shape[1], k.shape[1], 0, 0, segment_ids, segment_ids)
        y = _block(q, k, v, visible, bias, scale, softcap)
    return ungroup_heads(y)


def choose(
    q: Any,
    causal: bool = True,
    *,
    masked: bool = False,
    changed: bool = False,
    windowed: bool = False,
    platform: str | None = None,
) -> str:
    """The implementation that "auto" stands for, for queries q (b, t, h, c) (or their shape) on a platform: "cpu",
    "gpu" or "tpu", by default that of the mesh in force. masked: a mask is given, or there are more or fewer keys;
    changed: the products are bounded or have a bias; windowed: a window is given."""
    platform = platform or sharding.platform()
    if masked:
        return "reference"
    if platform == "cpu" or changed:
        return "blockwise" if (causal or windowed) and q.shape[1] > 64 else "reference"
    if platform == "tpu":
        return "splash" if kernels.splash_takes(q) else "reference"
    fits = kernels.cudnn_takes(q) and (causal or not windowed)
    return "cudnn" if fits and kernels.has_cudnn() else "reference"


def _check_fits(implementation: str, q: jax.Array, mask: jax.Array | None, changed: bool, both_sides: bool) -> None:
    if both_sides and implementation == "cudnn":
        raise ConfigError("cudnn attention takes window= with causal=True alone; use 'auto'")
    if changed and implementation != "blockwise":
        raise ConfigError(f"{implementation} attention takes neither bias= nor softcap=; use 'auto'")
    if mask is not None:
        raise ConfigError(f"{implementation} attention takes causal= and segment_ids=, not mask=; use 'reference'")
    if implementation == "splash" and not kernels.splash_takes(q):
        raise ConfigError(f"splash attention takes rows of a multiple of 128 positions, not {q.shape[1]}; use 'auto'")
    if implementation == "cudnn" and not kernels.cudnn_takes(q):
        raise ConfigError(
            "cudnn attention takes rows of even length and bfloat16 heads of up to 128, a multiple of 8, not "
            f"{q.shape[1]} positions and {q.dtype} heads of {q.shape[-1]}; set compute_dtype to bfloat16, or use 'auto'"
        )
    if implementation == "cudnn" and not kernels.has_cudnn():
        raise ConfigError("cudnn attention needs cuDNN and a GPU since Ampere, and jax finds none here; use 'auto'")


def _group(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q (b, t, k, g, c); where a mesh splits query heads finer than key-value heads, the latter are repeated."""
    h, kv = q.shape[2], k.shape[2]
    if sharding.mesh_kind() is AxisType.Explicit:
        of_q, of_k = jax.typeof(q).sharding.spec, jax.typeof(k).sharding.spec
        if of_q[2] != of_k[2]:
            batch = of_k[0]
            repeat = lambda x: jnp.repeat(x, h // kv, axis=2, out_sharding=jax.P(batch, None, of_q[2], None))  # noqa: E731
            k, v, kv = repeat(k), v if v.ndim == 3 else repeat(v), h
    return group_heads(q, kv), k, v


def group_heads(q: jax.Array, kv_heads: int) -> jax.Array:
    """q (b, t, h, c) by the key-value head that each of its heads reads: (b, t, k, g, c)."""
    (b, t, h, c), out = q.shape, None
    if sharding.mesh_kind() is AxisType.Explicit:
        spec = jax.typeof(q).sharding.spec
        out = jax.P(spec[0], None, spec[2], None, None)
    return jnp.reshape(q, (b, t, kv_heads, h // kv_heads, c), out_sharding=out)


def ungroup_heads(y: jax.Array) -> jax.Array:
    """y (b, t, k, g, c) as (b, t, h, c)."""
    b, t, k, g, c = y.shape
    out = None
    if sharding.mesh_kind() is AxisType.Explicit:
        spec = jax.typeof(y).sharding.spec
        out = jax.P(spec[0], None, spec[2], None)
    return jnp.reshape(y, (b, t, k * g, c), out_sharding=out)


def _group_bias(bias: jax.Array, q: jax.Array) -> jax.Array:
    """bias (b, h, t, s) as q (b, t, k, g, c) is grouped: (b, k, g, t, s)."""
    b, _, t, s = bias.shape
    shape, out = (b, q.shape[2], q.shape[3], t, s), None
    if sharding.mesh_kind() is AxisType.Explicit:
        of_bias, of_q = jax.typeof(bias).sharding.spec, jax.typeof(q).sharding.spec
        bias = jax.reshard(bias, jax.P(of_bias[0], of_q[2], None, None))
        out = jax.P(of_bias[0], of_q[2], None, None, None)
    return jnp.reshape(bias, shape, out_sharding=out)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Which keys a query sees, by their places."""

    causal: bool
    window: int | None

    def of(self, t, s, first_query, first_key, query_segments, key_segments) -> jax.Array | None:
        """(b or 1, t, s) bool for t queries and s keys from these places on; None where all see all."""
        distance = (first_query + jnp.arange(t))[:, None] - (first_key + jnp.arange(s))[None, :]
        seen = (distance >= 0)[None] if self.causal else None
        if self.window is not None:
            near = (jnp.abs(distance) < self.window)[None]
            seen = near if seen is None else seen & near
        if query_segments is not None:
            same = query_segments[:, :, None] == key_segments[:, None, :]
            seen = same if seen is None else seen & same
        return seen

    def keys(self, start: int, stop: int, s: int) -> tuple[int, int]:
        """The keys, of s, that queries start .. stop - 1 may see."""
        reach = s if self.window is None else self.window - 1
        return max(start - reach, 0), stop if self.causal else min(stop + reach, s)


def _block(q, k, v, visible, bias, scale, softcap) -> jax.Array:
    """The whole softmax of queries (b, t, k, g, c) over keys (b, s, k, c) -> (b, t, k, g, c)."""
    values = "bsc" if v.ndim == 3 else "bskc"
    scores = jnp.einsum("btkgc,bskc->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, MASKED)
    weight = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weight.sum(-1)  # (b, k, g, t)
    weight = weight.astype(v.dtype)
    if q.shape[1] == 1:  # in the other order XLA's CPU backend copies the values of one row, transposed, at every token
        y = jnp.einsum(f"bkgts,{values}->bkgtc", weight, v, preferred_element_type=jnp.float32) / total[..., None]
        return jnp.moveaxis(y, 3, 1).astype(q.dtype)
    y = jnp.einsum(f"bkgts,{values}->btkgc", weight, v, preferred_element_type=jnp.float32)
    return (y / jnp.moveaxis(total, -1, 1)[..., None]).astype(q.dtype)


def _blockwise(q, k, v, seen, segment_ids, bias, scale, softcap) -> jax.Array:
    """`_block` for each block of queries on the keys it may see; a block's scores are recomputed, not kept."""
    t, s = q.shape[1], k.shape[1]
    size = max(64, math.ceil(t / BLOCKS))
    block = jax.checkpoint(_block, static_argnums=(5, 6))
    rows = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        first, last = seen.keys(start, stop, s)
        segments = (None, None) if segment_ids is None else (segment_ids[:, start:stop], segment_ids[:, first:last])
        visible = seen.of(stop - start, last - first, start, first, *segments)
        part = None if bias is None else bias[..., start:stop, first:last]
        rows.append(block(q[:, start:stop], k[:, first:last], v[:, first:last], visible, part, scale, softcap))
    return jnp.concatenate(rows, axis=1)
