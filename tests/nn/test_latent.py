"""Attention over a cache of latents against float64, in both orders of its products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from lmx.nn import attention, latent, norm, position
from lmx.nn.attention import Attention

B, S, H, K, C, R = 2, 7, 4, 2, 6, 5


def turn(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x (b, s, heads, c) turned, as complex numbers of the two halves of a head."""
    half = C // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("queries", [1, 7], ids=["absorbed", "expanded"])
def test_attention_equals_float64(queries, monkeypatch):
    rng = np.random.default_rng(0)
    key, value, key_bias, value_bias, scale = (rng.normal(size=s) for s in ((R, K, C), (R, K, C), (K, C), (K, C), (C,)))
    q, z, bias = (rng.normal(size=s) for s in ((B, queries, H, C), (B, S, R), (1, H, queries, S)))
    mask = rng.uniform(size=(B, queries, S)) < 0.7
    mask[:, :, 0] = True
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    params = Attention(
        None, *map(f32, (key, value)), None, None, *map(f32, (key_bias, value_bias)), None,
        key_norm=norm.Norm(f32(scale), None), latent=jnp.ones((3, R)),
    )  # fmt: skip
    angles = position.rotary_angles(jnp.arange(S)[None], C, 10_000.0)
    rms = lambda params, x: norm.norm(params, x, "rmsnorm", 1e-6)  # noqa: E731
    cache = latent.LatentCache(f32(z))
    given = dict(mask=jnp.asarray(mask), bias=f32(bias), scale=0.4, softcap=3.0)
    made, project = [], attention.project_value
    monkeypatch.setattr(attention, "project_value", lambda *given: made.append(given) or project(*given))
    got = latent.attention(params, f32(q), cache, angles, rms, **given)
    assert len(made) == (queries > 1)

    keys = np.einsum("bsr,rkc->bskc", z, key) + key_bias
    keys = keys / np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-6) * scale
    keys, values = turn(keys, np.arange(S)), np.einsum("bsr,rkc->bskc", z, value) + value_bias
    keys, values = (np.repeat(x, H // K, axis=2) for x in (keys, values))
    scores = 3.0 * np.tanh((0.4 * np.einsum("bthc,bshc->bhts", q, keys) + bias) / 3.0)
    weight = special.softmax(np.where(mask[:, None], scores, -np.inf), axis=-1)
    np.testing.assert_allclose(got, np.einsum("bhts,bshc->bthc", weight, values), atol=2e-5)


def test_write_puts_each_row_where_it_stands():
    rng = np.random.default_rng(1)
    new = rng.normal(size=(3, 2, 5)).astype(np.float32)
    cache = jax.tree.map(lambda x: x - 1, latent.empty_cache(3, 6, 5, jnp.float32))
    for start in (jnp.array([4, 0, 2]), jnp.array(3)):
        got = latent.write(cache, jnp.asarray(new), start).latent
        wanted = np.full((3, 6, 5), -1, np.float32)
        for row, at in enumerate(np.broadcast_to(start, 3)):
            wanted[row, at : at + 2] = new[row]
        np.testing.assert_array_equal(got, wanted)
