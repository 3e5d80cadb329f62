"""Keys and values made from one latent, which is all that a position leaves in the cache: r numbers, not 2 k c.

    z = x W (b, s, r);   keys = z W_k and values = z W_v (b, s, k, c)

DeepSeek-AI 2024, "DeepSeek-V2", section 2.1 (multi-head latent attention), without its decoupled rotary key: keys are
normalised and rotated after they are made, so they are made anew from the cache at every step, which takes 2 r k c
FLOPs a position. Values need not be: a head sums latents over positions and makes one value of the sum (absorption).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lmx.core import sharding, weights
from lmx.core.nodes import node
from lmx.core.specs import ParamSpec
from lmx.nn import attention as attend
from lmx.nn import dot_product
from lmx.nn.attention import Angles, Attention, Normalise


def share(specs: Attention, rank: int) -> Attention:
    """The specs of a layer as those of one whose keys and values share a latent of `rank`."""
    n = specs.key.leading
    latent = specs.key.replace(
        shape=(*specs.key.shape[: n + 1], rank), axes=(*specs.key.axes[: n + 1], "rank"), inputs=1
    )

    def behind(spec: ParamSpec) -> ParamSpec:
        put = lambda old, new: (*old[:n], new, *old[n + 1 :])  # noqa: E731
        return spec.replace(shape=put(spec.shape, rank), axes=put(spec.axes, "rank"))

    return specs.replace(latent=latent, key=behind(specs.key), value=behind(specs.value))


def unshare(tree: Any) -> Any:
    """The same model (any tree, stacked or not) with keys and values made from x alone, as plain arrays; computes what
    it did, up to rounding."""

    def one(params: Any) -> Any:
        if not is_attention(params) or params.latent is None:
            return params
        latent = weights.dense(params.latent)
        made = lambda w: jnp.einsum("...dr,...rkc->...dkc", latent, weights.dense(w).astype(latent.dtype))  # noqa: E731
        return params.replace(latent=None, key=made(params.key), value=made(params.value))

    is_attention = lambda x: isinstance(x, Attention)  # noqa: E731
    return jax.tree.map(one, tree, is_leaf=is_attention)


@node
class LatentCache:
    """The latents of one layer for every position so far: (b, s, r)."""

    latent: Any

    @property
    def length(self) -> int:
        """How many positions there is room for."""
        return self.latent.shape[1]


def empty_cache(batch: int, length: int, rank: int, dtype: Any) -> LatentCache:
    """A cache with room for `length` positions."""
    axes, shape = ("batch", None, "rank"), (batch, length, rank)
    return LatentCache(jnp.zeros(shape, dtype, out_sharding=sharding.out_sharding(shape, *axes)))


def write(cache: LatentCache, latent: jax.Array, start: jax.Array) -> LatentCache:
    """Put the latents (b, q, r) of q new positions where each row stands: start (b,), or () for all rows."""
    return LatentCache(attend.put(cache.latent[:, None], latent[:, :, None], start)[:, 0])


def attention(
    params: Attention,
    q: jax.Array,
    cache: LatentCache,
    angles: Angles,
    normalise: Normalise,
    *,
    mask: jax.Array,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """What queries (b, q, h, c) find among a cache's positions: (b, q, h, c). angles: of those positions (1, s); the
    others as `dot_product.attention` takes them."""
    seen = dict(mask=mask, bias=bias, scale=scale, softcap=softcap, implementation="reference")
    k = attend.project_key(params, cache.latent, angles, normalise)
    if not _absorbs(q, k, cache.latent):
        return dot_product.attention(q, k, attend.project_value(params, cache.latent), **seen)
    y = dot_product.attention(q, k, cache.latent, **seen)  # (b, q, h, r)
    y = weights.einsum("btkgr,rkc->btkgc", dot_product.group_heads(y, k.shape[2]), params.value)
    if params.value_bias is not None:  # the weights of a softmax sum to 1
        y = y + params.value_bias.astype(y.dtype)[:, None]
    return dot_product.ungroup_heads(y)


def _absorbs(q: jax.Array, k: jax.Array, latent: jax.Array) -> bool:
    """Whether summing latents takes fewer FLOPs than making values: in steps, not where many queries come at once.

    It needs query heads that lie as key-value heads do."""
    if sharding.mesh_kind() is AxisType.Explicit and sharding.entries(q)[2] != sharding.entries(k)[2]:
        return False
    (_, t, h, c), (_, s, r) = q.shape, latent.shape
    return t * h * r * (s + c) < s * r * k.shape[2] * c + t * h * s * c
