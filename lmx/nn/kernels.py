"""Attention by fused kernels of accelerators: splash attention on TPUs, cuDNN's on NVIDIA GPUs.

Neither holds the (t, s) matrix of scores (cuDNN's reads packed segments as a mask of that shape). Both are calls that
XLA cannot split, so on a mesh each device runs them on the rows and heads that the rules give it (`shard_map`).
`dot_product.attention` is the entry that chooses.

Shapes: q (b, t, h, c), k and v (b, t, k, c) -> (b, t, h, c), as there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lmx.core import sharding

LANES = 128  # a TPU register's width: what the kernel's blocks are multiples of
BLOCK = 512  # the longest block of queries or keys
HEADS_OF_CUDNN = 128  # the widest head of its kernels on every GPU since Ampere


def splash_takes(q: jax.Array) -> bool:
    """Whether queries (b, t, h, c) can go through `splash`: rows that divide into blocks of 128."""
    return q.shape[1] % LANES == 0


def cudnn_takes(q: jax.Array) -> bool:
    """Whether queries (b, t, h, c) can go through `cudnn`: bfloat16 heads of up to 128, a multiple of 8, rows of even
    length."""
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= HEADS_OF_CUDNN and q.shape[1] % 2 == 0
    return q.dtype == jnp.bfloat16 and fits


def has_cudnn() -> bool:
    """Whether jax finds a cuDNN on this machine, and GPUs (if any) for its kernels, which are those since Ampere."""
    try:
        from jax._src.lib import cuda_versions

        found = cuda_versions is not None and cuda_versions.cudnn_get_version() > 0
    except (ImportError, RuntimeError):
        return False
    devices = jax.local_devices() if jax.default_backend() == "gpu" else ()
    return found and all(float(getattr(device, "compute_capability", 0)) >= 8.0 for device in devices)


def splash(q, k, v, causal: bool, segment_ids: jax.Array | None, scale: float, window: int | None = None) -> jax.Array:
    """Softmax attention by jax's Pallas kernel (Dao et al. 2022, blocks that the mask empties left out); where there
    is no TPU it is interpreted, slowly. The softmax is in float32."""

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        kernel = _splash_kernel(q.shape[1], q.shape[2], causal, window)
        heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        arguments = (heads_first(q * scale).astype(q.dtype), heads_first(k), heads_first(v))
        if ids is None:
            return heads_first(jax.vmap(kernel)(*arguments))
        from jax.experimental.pallas.ops.tpu import splash_attention

        both = splash_attention.SegmentIds(ids, ids)
        return heads_first(jax.vmap(kernel)(*arguments, both))

    return _on_each_device(rows, q, k, v, segment_ids)


def _splash_kernel(length: int, heads: int, causal: bool, window: int | None) -> Callable:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in (BLOCK, BLOCK // 2, LANES) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    one = splash.CausalMask((length, length)) if causal else splash.FullMask((length, length))
    if window is not None:
        one = splash.LocalMask((length, length), (window - 1, 0 if causal else window - 1), 0)
    mask = splash.MultiHeadMask([one] * heads)
    interpret = sharding.platform() != "tpu"
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def cudnn(q, k, v, causal: bool, segment_ids: jax.Array | None, scale: float, window: int | None = None) -> jax.Array:
    """Softmax attention by cuDNN's fused kernel; segments are told to it as a mask (b, 1, t, t)."""

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        mask = None if ids is None else ids[:, None, :, None] == ids[:, None, None, :]
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=causal, scale=scale, implementation="cudnn",
            local_window_size=None if window is None else (window - 1, 0 if causal else window - 1),
        )  # fmt: skip

    return _on_each_device(rows, q, k, v, segment_ids)


def _on_each_device(rows: Callable, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
    """`rows(q, k, v, ids)` on every device's own rows and heads; where a mesh splits query heads finer than key-value
    heads, the latter are repeated."""
    if sharding.mesh_kind() not in (AxisType.Explicit, AxisType.Auto):
        return rows(q, k, v, ids)
    mesh = jax.sharding.get_abstract_mesh()
    spec = functools.partial(sharding.partition_spec, mesh=mesh)
    of_q, of_k = spec(("batch", None, "heads", None), q.shape), spec(("batch", None, "kv_heads", None), k.shape)
    q, k, v = (sharding.reshard(x, s) for x, s in ((q, of_q), (k, of_k), (v, of_k)))
    if of_q[2] != of_k[2]:
        copies = q.shape[2] // k.shape[2]
        whole = jax.P(of_q[0], None, None, None)
        repeat = lambda x: sharding.reshard(jnp.repeat(sharding.reshard(x, whole), copies, axis=2), of_q)  # noqa: E731
        k, v, of_k = repeat(k), repeat(v), of_q
    if ids is None:
        return jax.shard_map(
            lambda q, k, v: rows(q, k, v, None), in_specs=(of_q, of_k, of_k), out_specs=of_q, check_vma=False
        )(q, k, v)
    of_ids = jax.P(of_q[0], None)
    ids = sharding.reshard(ids, of_ids)
    return jax.shard_map(rows, in_specs=(of_q, of_k, of_k, of_ids), out_specs=of_q, check_vma=False)(q, k, v, ids)
