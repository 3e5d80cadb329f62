"""Fused attention kernels without their accelerators: interpreted, lowered, compiled ahead of time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from lmx.core import sharding
from lmx.core.errors import ConfigError
from lmx.nn import dot_product, kernels
from lmx.nn.dot_product import attention


def heads(b: int, t: int, h: int, k: int, c: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(t), 3)
    return [jax.random.normal(key, (b, t, n, c), dtype) for key, n in zip(keys, (h, k, k), strict=True)]


def both(implementation, ids, causal):
    """(result, gradients) of attention by one implementation."""

    def total(q, k, v):
        y = attention(q, k, v, causal=causal, segment_ids=ids, implementation=implementation)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


def segments(b: int, t: int) -> jax.Array:
    ids = 1 + jnp.arange(t) // 50
    return jnp.stack([jnp.where(jnp.arange(t) < t - 7 * i, ids, 0) for i in range(b)])


@pytest.mark.parametrize(("causal", "packed"), [(True, True), (True, False), (False, True)])
def test_splash_interpreted_equals_the_reference(causal, packed):
    arguments = heads(2, 256, 4, 2, 64)
    ids = segments(2, 256) if packed else None
    (_, y), grads = both("splash", ids, causal)(*arguments)
    (_, expected), expected_grads = both("reference", ids, causal)(*arguments)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_splash_on_a_mesh_equals_alone(explicit, kv_heads):
    arguments, ids = heads(4, 128, 4, kv_heads, 32), segments(4, 128)
    (_, expected), expected_grads = both("splash", ids, True)(*arguments)
    with sharding.use_mesh("fsdp=2,tensor=4", explicit=explicit):
        axes = ("batch", None, "heads", None), ("batch", None, "kv_heads", None), ("batch", None, "kv_heads", None)
        place = jax.jit(lambda *xs: tuple(sharding.place(x, *a) for x, a in zip(xs, axes, strict=True)))
        placed = place(*arguments)

        def total(q, k, v):
            y = attention(q, k, v, segment_ids=ids, implementation="splash")
            return (y * y).sum(), y

        (_, y), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*placed)
        assert y.sharding.spec[0] == "fsdp" and y.sharding.spec[2] == "tensor"
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)

    def alone(q, k, v):
        return (attention(q, k, v, segment_ids=ids, implementation="reference") ** 2).sum()

    for a, b in zip(grads, jax.grad(alone, argnums=(0, 1, 2))(*arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_splash_compiles_for_tpus():
    """The kernel's own compiler takes forward and backward, on a mesh of chips that are not there."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'lmx[plan]'")
    import os

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    with sharding.use_mesh(sharding.make_mesh("fsdp=2,tensor=2", devices=devices)) as mesh:
        assert sharding.platform() == "tpu"

        def shape(axes, n):
            where = sharding.named_sharding(axes, (4, 256, n, 64), mesh)
            return jax.ShapeDtypeStruct((4, 256, n, 64), jnp.bfloat16, sharding=where)

        q, k = shape(("batch", None, "heads", None), 4), shape(("batch", None, "kv_heads", None), 2)
        total = lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()  # noqa: E731
        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3  # forward, dq, dkv
    assert "bf16[2,2,256,256]" not in text and "f32[2,2,256,256]" not in text  # no matrix of scores


def test_cudnn_lowers_for_gpus(monkeypatch):
    monkeypatch.setattr(kernels, "has_cudnn", lambda: True)
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)  # no GPU here to ask
    q, k, v = heads(2, 128, 4, 2, 64, jnp.bfloat16)
    ids = segments(2, 128)
    total = lambda q, k, v: attention(  # noqa: E731
        q, k, v, segment_ids=ids, implementation="cudnn"
    ).astype(jnp.float32).sum()  # fmt: skip
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in text and "Backward" in text


def test_the_platform_decides(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    short, odd, wide = (jax.ShapeDtypeStruct((1, t, 2, c), jnp.bfloat16) for t, c in ((32, 64), (200, 64), (256, 192)))
    choose = dot_product.choose
    assert choose(q) == "blockwise" and choose(short) == choose(q, False) == choose(q, masked=True) == "reference"
    assert choose(q, platform="tpu") == "splash" and choose(odd, platform="tpu") == "reference"
    monkeypatch.setattr(kernels, "has_cudnn", lambda: True)
    assert choose(q, platform="gpu") == "cudnn" and choose(wide, platform="gpu") == "reference"
    monkeypatch.setattr(kernels, "has_cudnn", lambda: False)
    assert choose(q, platform="gpu") == "reference"


def test_what_a_kernel_cannot_take():
    q, k, v = heads(1, 100, 2, 2, 64)
    with pytest.raises(ConfigError, match="multiple of 128 positions, not 100"):
        attention(q, k, v, implementation="splash")
    with pytest.raises(ConfigError, match="even length and bfloat16 heads.* not 100 positions and float32"):
        attention(q, k, v, implementation="cudnn")
    if not kernels.has_cudnn():
        with pytest.raises(ConfigError, match="jax finds none here"):
            attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), implementation="cudnn")
    with pytest.raises(ConfigError, match="not mask="):
        attention(q, k, v, mask=jnp.ones((1, 100, 100), bool), implementation="splash")
