"""Attention: the reference against torch, the blockwise implementation against the reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import ConfigError
from lmx.core.sharding import place
from lmx.nn.dot_product import attention


def heads(t: int, s: int | None = None, h: int = 4, k: int = 2, c: int = 8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(t), 3)
    shapes = [(2, t, h, c), (2, s or t, k, c), (2, s or t, k, c)]
    return [2 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def segments(t: int) -> jax.Array:
    """Rows of unlike segments, a short one first, padding (0) last."""
    ids = jnp.arange(t)
    return jnp.stack([1 + (ids >= 3) + (ids >= t // 2), jnp.where(ids < t - 5, 1 + ids // 50, 0)])


def torch_attention(q, k, v, visible, scale=None):
    torch = pytest.importorskip("torch", reason="torch is the oracle of attention; install the extra 'oracle'")
    q, k, v = (torch.tensor(np.asarray(x, np.float64)).transpose(1, 2) for x in (q, k, v))
    mask = torch.tensor(np.broadcast_to(np.asarray(visible), (q.shape[0], q.shape[2], k.shape[2])).copy())[:, None]
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).numpy()


def visible(t: int, s: int, causal: bool, ids=None) -> np.ndarray:
    seen = np.tril(np.ones((t, s), bool))[None] if causal else np.ones((1, t, s), bool)
    return seen if ids is None else seen & (np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :])


# Scores reach 60, whose last place in float32 is 4e-6: a softmax weight's relative error. Values reach 8.
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reference_equals_torch(kv_heads, causal, packed):
    q, k, v = heads(17, k=kv_heads)
    ids = segments(17) if packed else None
    y = attention(q, k, v, causal=causal, segment_ids=ids, implementation="reference")
    np.testing.assert_allclose(y, torch_attention(q, k, v, visible(17, 17, causal, ids)), **CLOSE)


def test_masks_and_scales_equal_torch():
    q, k, v = heads(5, 9)
    mask = np.random.default_rng(0).random((2, 5, 9)) < 0.5
    mask[:, :, 0] = True
    y = attention(q, k, v, mask=jnp.asarray(mask), scale=0.3)
    np.testing.assert_allclose(y, torch_attention(q, k, v, mask, 0.3), **CLOSE)


def test_scores_far_apart_and_rows_without_any_key_stay_finite():
    q, k, v = heads(6)
    y = attention(q * 1e4, k * 1e4, v)
    assert jnp.isfinite(y).all()
    nothing = lambda q: attention(q, k, v, mask=jnp.zeros((2, 6, 6), bool)).sum()  # noqa: E731
    assert jnp.isfinite(nothing(q)) and jnp.isfinite(jax.grad(nothing)(q)).all()


CASES = [
    (1, True, False),
    (65, True, True),
    (130, True, False),
    (130, True, True),
    (100, False, True),
    (130, False, False),
]


@pytest.mark.parametrize(("t", "causal", "packed"), CASES)
def test_blockwise_equals_reference_in_values_and_gradients(t, causal, packed):
    q, k, v = heads(t)
    ids = segments(t) if packed else None

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(implementation, q, k, v):
        def loss(q, k, v):
            y = attention(q, k, v, causal=causal, segment_ids=ids, implementation=implementation)
            return jnp.sin(y).sum(), y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    (_, y), gradients = values_and_gradients("blockwise", q, k, v)
    (_, wanted), wanted_gradients = values_and_gradients("reference", q, k, v)
    np.testing.assert_allclose(y, wanted, **CLOSE)
    # A key's gradient is a sum over up to 130 queries, added block by block.
    for g, w in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5)


def test_auto_is_one_of_them():
    q, k, v = heads(130)
    np.testing.assert_allclose(attention(q, k, v), attention(q, k, v, implementation="reference"), **CLOSE)


def test_bfloat16_outside_float32_softmax_inside():
    q, k, v = heads(70, dtype=jnp.bfloat16)
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="reference")
    for implementation in ("reference", "blockwise"):
        y = attention(q, k, v, implementation=implementation)
        assert y.dtype == jnp.bfloat16
        # The unnormalised weights are rounded to bfloat16 before the product: 2^-8 of values up to 8, twice.
        np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=8 * 2**-8 * 2)


def test_bad_input():
    q, k, v = heads(4)
    with pytest.raises(ConfigError, match="no attention 'blockwize'.*did you mean 'blockwise'"):
        attention(q, k, v, implementation="blockwize")
    with pytest.raises(ConfigError, match="4 query heads do not group over 3"):
        attention(*heads(4, k=3))
    with pytest.raises(ConfigError, match="takes causal= and segment_ids=, not mask="):
        attention(q, k, v, mask=jnp.ones((2, 4, 4), bool), implementation="blockwise")
    with pytest.raises(ConfigError, match="a mask or segment_ids and window, not both"):
        attention(q, k, v, mask=jnp.ones((2, 4, 4), bool), segment_ids=segments(4))
    with pytest.raises(ConfigError, match="4 queries of 6 keys need a mask="):
        attention(*heads(4, 6))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_every_implementation_on_meshes(mesh, kv_heads):
    """Rows over fsdp=4, query heads over tensor=2; one key-value head does not divide, two do."""
    q, k, v = (x.repeat(2, 0) for x in heads(70, k=kv_heads))
    ids = segments(70).repeat(2, 0)
    wanted = numpy_attention(q, k, v, visible(70, 70, True, ids))
    lay = lambda x, name: place(x, "batch", None, name, None)  # noqa: E731
    q, k, v = lay(q, "heads"), lay(k, "kv_heads"), lay(v, "kv_heads")
    for implementation in ("reference", "blockwise"):

        def loss(q, k, v, implementation=implementation):
            y = attention(q, k, v, segment_ids=place(ids, "batch", None), implementation=implementation)
            return jnp.sin(y).sum(), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        np.testing.assert_allclose(y, wanted, **CLOSE)
        assert all(jnp.isfinite(g).all() for g in gradients)


def numpy_attention(q, k, v, visible) -> np.ndarray:
    """Attention in float64 numpy, from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (x.repeat(q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bthc,bshc->bhts", q, k) / q.shape[-1] ** 0.5
    scores = np.where(visible[:, None], scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshc->bthc", weight / weight.sum(-1, keepdims=True), v)


def float64_attention(q, k, v, seen, bias, scale, cap) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bthc,bshc->bhts", q, k) * scale
    scores = scores + np.asarray(bias) if bias is not None else scores
    scores = cap * np.tanh(scores / cap) if cap is not None else scores
    weight = np.exp(np.where(seen[:, None], scores, -np.inf) - scores.max())
    return np.einsum("bhts,bshc->bthc", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    ("window", "causal", "packed", "cap", "biased"),
    [
        (5, True, False, None, False),
        (70, True, True, None, False),
        (5, False, True, None, False),
        (130, False, False, None, True),
        (None, True, True, 4.0, False),
        (None, True, False, None, True),
        (90, True, False, 3.0, False),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_windows_caps_and_biases_equal_float64(implementation, window, causal, packed, cap, biased):
    q, k, v = heads(140)
    ids = segments(140) if packed else None
    bias = 2 * jax.random.normal(jax.random.key(9), (1, 4, 140, 140)) if biased else None
    y = jax.jit(lambda *qkv: attention(
        *qkv, causal=causal, segment_ids=ids, window=window, bias=bias, scale=0.2, softcap=cap,
        implementation=implementation,
    ))(q, k, v)  # fmt: skip
    seen = visible(140, 140, causal, ids)
    if window is not None:
        seen = seen & (np.abs(np.arange(140)[:, None] - np.arange(140)) < window)
    np.testing.assert_allclose(y, float64_attention(q, k, v, seen, bias, 0.2, cap), **CLOSE)


def test_gradients_with_window_cap_and_bias():
    q, k, v = heads(140)
    bias = jax.random.normal(jax.random.key(9), (1, 4, 140, 140))

    def gradients(implementation):
        loss = lambda q, k, v, bias: jnp.sin(attention(  # noqa: E731
            q, k, v, window=80, bias=bias, softcap=5.0, implementation=implementation)).sum()  # fmt: skip
        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)

    for g, w in zip(gradients("blockwise"), gradients("reference"), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5)


def test_what_fused_kernels_cannot_take():
    q, k, v = heads(128)
    longer = heads(128, 256)
    with pytest.raises(ConfigError, match="splash attention takes as many keys as queries, not 256 for 128"):
        attention(*longer, causal=False, implementation="splash")
    np.testing.assert_allclose(
        attention(*longer, causal=False), torch_attention(*longer, visible(128, 256, False)), **CLOSE
    )
    with pytest.raises(ConfigError, match="splash attention takes neither bias= nor softcap=; use 'auto'"):
        attention(q, k, v, softcap=3.0, implementation="splash")
    with pytest.raises(ConfigError, match="cudnn attention takes window= with causal=True alone"):
        attention(q, k, v, window=3, causal=False, implementation="cudnn")


@pytest.mark.slow
def test_one_query_with_a_mask_equals_that_row_of_many():
    """Decoding's step is written out in another order."""
    q, k, v = heads(24)
    mask = jnp.asarray(visible(24, 24, True) & (np.arange(24) != 5)).repeat(2, axis=0)
    many = attention(q, k, v, mask=mask)
    for i in (0, 9, 23):
        one = attention(q[:, i : i + 1], k, v, mask=mask[:, i : i + 1])
        np.testing.assert_allclose(one, many[:, i : i + 1], **CLOSE)
