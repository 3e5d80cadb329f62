"""Rotary positions against transformers' Llama, positions of packed segments against a plain loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.errors import ConfigError
from lmx.nn import position


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotary_equals_transformers(theta):
    torch = pytest.importorskip("torch", reason="torch is the oracle of rotary positions; install the extra 'oracle'")
    pytest.importorskip("transformers", reason="transformers is the oracle of rotary positions")
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=512)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    q, k = (jax.random.normal(jax.random.key(i), (2, 5, heads, 8)) for i, heads in enumerate((4, 2)))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 300, 2, 0, 511]])
    tensor = lambda a: torch.tensor(np.asarray(a))  # noqa: E731
    cos, sin = llama.LlamaRotaryEmbedding(config)(tensor(q), tensor(positions))
    wanted = llama.apply_rotary_pos_emb(tensor(q).transpose(1, 2), tensor(k).transpose(1, 2), cos, sin)
    angles = position.rotary_angles(positions, 8, theta)
    for x, want in zip((q, k), wanted, strict=True):
        # An angle near 500 is a float32 product, right to 3e-5; so are its sine and cosine.
        np.testing.assert_allclose(position.rotate(x, angles), want.transpose(1, 2).numpy(), atol=2e-4)
    near = position.rotary_angles(positions[:1], 8, theta)
    np.testing.assert_allclose(position.rotate(q[:1], near), wanted[0][:1].transpose(1, 2).numpy(), atol=2e-6)


def test_products_depend_on_distances_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 1, 8))
    near, far = (position.rotary_angles(jnp.arange(6)[None] + shift, 8, 10_000.0) for shift in (0, 40))
    scores = [jnp.einsum("bthc,bshc->bts", position.rotate(q, a), position.rotate(k, a)) for a in (near, far)]
    np.testing.assert_allclose(*scores, atol=5e-5)  # angles up to 46 in float32


def test_rotate_keeps_the_dtype():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    assert position.rotate(x, position.rotary_angles(jnp.zeros((1, 2), int), 4, 1e4)).dtype == jnp.bfloat16


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=2, max_size=2))
def test_segment_positions_equal_a_loop(ids):
    wanted = np.zeros((2, 9), int)
    for b in range(2):
        for t in range(1, 9):
            wanted[b, t] = wanted[b, t - 1] + 1 if ids[b][t] == ids[b][t - 1] else 0
    np.testing.assert_array_equal(position.segment_positions(jnp.array(ids)), wanted)


def test_segment_positions_of_one_column():
    assert position.segment_positions(jnp.array([[3], [0]])).tolist() == [[0], [0]]


SCALED = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": dict(factor=4.0, original_max_position_embeddings=64),
    "yarn, told": dict(
        factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.4,
        truncate=False,
    ),
    "longrope": dict(
        short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0], original_max_position_embeddings=64,
        factor=8.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("last", [40, 300])
def test_scaled_rotary_equals_transformers(name, last):
    torch = pytest.importorskip("torch", reason="torch is the oracle of rotary positions; install the extra 'oracle'")
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    scaling = {"rope_type": name.partition(",")[0], **SCALED[name]}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    config.rope_parameters = {"rope_theta": 10_000.0, **scaling}
    positions = jnp.array([[0, 3, 17, last]])
    wanted = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(np.asarray(positions)))
    ours = {k: tuple(v) if isinstance(v, list) else v for k, v in scaling.items()}
    ours.setdefault("original_max_position_embeddings", 64)
    position.check_scaling(ours)
    for got, want in zip(position.rotary_angles(positions, 8, 10_000.0, ours), wanted, strict=True):
        np.testing.assert_allclose(got, want[..., :4].numpy(), atol=5e-5)  # angles up to 300, products in float32
        plain = position.rotary_angles(positions, 8, 10_000.0)
    assert jnp.abs(plain[0] - wanted[0][..., :4].numpy()).max() > 1e-2 or (name, last) == ("dynamic", 40)


def test_some_channels_turn_and_the_others_stay():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    angles = position.rotary_angles(jnp.arange(5)[None], 4, 10_000.0)
    turned = position.rotate(x, angles)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], position.rotate(x[..., :4], angles))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_buckets_equal_t5(bidirectional):
    torch = pytest.importorskip("torch", reason="torch is the oracle of buckets; install the extra 'oracle'")
    from transformers.models.t5.modeling_t5 import T5Attention

    queries, keys = jnp.array([[0, 5, 60, 199]]), jnp.arange(200)[None]
    distance = torch.tensor(np.asarray(keys[:, None, :] - queries[:, :, None]))
    wanted = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets=16, max_distance=50)
    got = position.relative_buckets(queries, keys, bidirectional=bidirectional, buckets=16, max_distance=50)
    np.testing.assert_array_equal(got, wanted.numpy())
    used = len(set(np.asarray(got).ravel().tolist()))
    assert used == (15 if bidirectional else 16)  # the later half has no distance 0


@pytest.mark.parametrize("width", [8, 10])
def test_sinusoids_equal_marian(width):
    torch = pytest.importorskip("torch", reason="torch is the oracle of sinusoids; install the extra 'oracle'")
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    theirs = MarianSinusoidalPositionalEmbedding(40, width)
    theirs.weight = torch.nn.Parameter(theirs.create_weight(), requires_grad=False)
    got = position.sinusoids(jnp.array([[0, 1, 7, 39]]), width)
    np.testing.assert_allclose(got[0], theirs.weight[[0, 1, 7, 39]].numpy(), atol=1e-5)


def test_scalings_that_cannot_be():
    with pytest.raises(ConfigError, match="rope_type 'yarm' is none of .*; did you mean 'yarn'"):
        position.check_scaling({"rope_type": "yarm"})
    with pytest.raises(ConfigError, match="rope_scaling of type 'llama3' lacks low_freq_factor, high_freq_factor"):
        position.check_scaling({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 8})
