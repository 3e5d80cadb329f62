"""Shared key-value latents: exact at full rank, one function however they are cached, smaller by what they say."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import lmx
from lmx import hf
from lmx.core import sharding, specs, tree
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank
from lmx.models import cost, transformer
from lmx.models.config import Config
from lmx.models.transformer import Model
from lmx.nn import latent
from lmx.reparam.forms import pivot, quantize_model
from lmx.reparam.latents import share_latent

SHAPE = dict(vocab_size=29, num_layers=1, hidden_size=16, num_heads=4, intermediate_size=24, remat="none")
BIASED = dict(norm="layernorm", norm_bias=True, attention_bias=True, attention_out_bias=True, mlp_bias=True)
CONFIGS = {
    "grouped": dict(num_kv_heads=2, tie_embeddings=False),
    "learned positions": dict(activation="gelu", position="learned", max_length=16, **BIASED),
    # norms of queries and keys, windows, layers that do not turn, a soft cap, each layer twice, heads of another width
    "all else": dict(
        num_kv_heads=2, head_dim=6, qk_norm="head", layer_pattern=("local", "unrotated"), window=4, num_layers=2,
        attention_softcap=5.0, attention_bias=True, layer_repeats=2,
    ),
    "relative": dict(num_kv_heads=1, position="relative", relative_buckets=8, relative_max_distance=16),
}  # fmt: skip
NUMBERS = {"grouped": 16, "learned positions": 32, "all else": 24, "relative": 8}  # 2 k c
TOKENS = np.random.default_rng(9).integers(1, 29, (8, 10)).astype(np.int32)
SEGMENTS = np.repeat([[1] * 5 + [2] * 3 + [0] * 2, [1] * 10], 4, axis=0).astype(np.int32)
LENGTHS = np.array([6, 2, 4, 1, 6, 3, 5, 2], np.int32)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compile for compile time: these programs run a few times on tiny arrays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def model_of(name: str, **changes) -> Model:
    config, rng = Config(**(SHAPE | CONFIGS[name] | changes)), np.random.default_rng(0)
    draw = lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape) + (s.init == "ones"), s.dtype)  # noqa: E731
    return Model(config, jax.tree.map(draw, transformer.abstract(config)))


@jax.jit
def everything(model, tokens=TOKENS, segment_ids=SEGMENTS, lengths=LENGTHS):
    """Logits of packed rows, log-probabilities of whole ones, of a prefill and its first step, and, after rewinding to
    unlike lengths, of two tokens at once; the state of the prefill."""
    whole = model.log_probs(model.features(tokens[:, :7]))
    prefill, state = model.step(model.start(8, 9), tokens[:, :6])
    next_one, _ = model.step(state, tokens[:, 6:7])
    ragged, _ = model.step(model.rewind(state, lengths), tokens[:, 6:8])
    return (model.logits(tokens, segment_ids=segment_ids), whole, prefill, next_one, ragged), state


def caches(state) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state.caches))


DYNAMIC = (("rope_type", "dynamic"), ("factor", 4.0), ("original_max_position_embeddings", 4))


def test_turns_that_follow_the_length_are_those_of_the_text():
    """Keys that are made anew turn as in a pass over the whole text, where those of an ordinary cache stay behind."""
    model = model_of("grouped")
    model = share_latent(model.replace(config=model.config.replace(rope_scaling=DYNAMIC)), 5)
    (_, whole, _, next_one, *_), _ = everything(model)
    np.testing.assert_allclose(next_one[:, 0], whole[:, 6], atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cached_latent_computes_what_keys_and_values_do(name):
    """At any rank, in every way of decoding; and the rows that are decoded are those of the whole pass."""
    model = share_latent(model_of(name), 5)
    (packed, whole, prefill, next_one, ragged), state = everything(model)
    wanted, state_of_wanted = everything(latent.unshare(model))
    for got, want in zip((packed, whole, prefill, next_one, ragged), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5)
    np.testing.assert_allclose(prefill, whole[:, :6], atol=5e-5)
    np.testing.assert_allclose(next_one[:, 0], whole[:, 6], atol=5e-5)
    assert caches(state_of_wanted) * 5 == caches(state) * NUMBERS[name]
    of = lambda m: cost.cost(m, 9)  # noqa: E731
    assert of(model).cache_bytes * 8 == caches(state)  # eight rows
    assert of(model_of(name)).cache_bytes * 5 == of(model).cache_bytes * NUMBERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "learned positions", "all else"])
def test_full_rank_is_exact(name):
    model = model_of(name)
    shared = share_latent(model, share=1.0)
    assert shared.params.decoder.layers.stacks[0][0].attention.latent.shape[-1] == min(16, NUMBERS[name])
    logits = jax.jit(lambda m: m.logits(TOKENS, segment_ids=SEGMENTS))
    np.testing.assert_allclose(logits(shared), logits(model), atol=1e-5 * float(jnp.abs(logits(model)).max()))
    if name == "grouped":
        write = lambda m: np.asarray(lmx.generate(m, TOKENS[:3, :4], max_new_tokens=6).tokens)  # noqa: E731
        np.testing.assert_array_equal(write(shared), write(model))
        beams = lambda m: lmx.beam_search(m, TOKENS[:2, :4], num_beams=3, max_new_tokens=4)  # noqa: E731
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), beams(shared), beams(model))


def test_the_error_is_the_least_there_is():
    """|A^(1/2) (W - D U)|^2 is what scipy's root and numpy's singular values say no rank-r matrix can be below."""
    model, rng = model_of("grouped", num_layers=3), np.random.default_rng(4)
    draws = rng.normal(size=(3, 40, 16)) * rng.uniform(0.1, 3, 16)
    grams = {f"decoder/layers[{i}]/attention/key": x.T @ x / 40 for i, x in enumerate(draws)}
    joint = lambda a: np.concatenate([np.asarray(w).astype(np.float64).reshape(3, 16, -1) for w in (a.key, a.value)], 2)  # noqa: E731
    before = joint(model.params.decoder.layers.stacks[0][0].attention)
    for given in (None, grams):
        shared = share_latent(model, 6, grams=given)
        after = joint(latent.unshare(shared.params.decoder.layers.stacks[0][0].attention))
        for i, name in enumerate(grams):
            root = scipy.linalg.sqrtm(grams[name]) if given else np.eye(16)
            least = (np.linalg.svd(root @ before[i], compute_uv=False)[6:] ** 2).sum()
            np.testing.assert_allclose(((root @ (before[i] - after[i])) ** 2).sum(), least, rtol=1e-4)


@pytest.mark.slow
def test_it_is_said_saved_exported_and_trained(tmp_path, caplog):
    model = share_latent(model_of("grouped", num_layers=3), 5, pattern="layers[1:]/attention/key$")
    assert model.params.decoder.layers.sizes == (1, 2)
    assert model.specs().params.decoder.layers.stacks[1][0].attention.latent.axes == ("layers", "embed", "rank")
    # latents of low rank, adapted; keys in int8; values without the freedom of their factors
    wrap = lambda w: LoRA(LowRank(w[..., :4], jnp.ones((2, 4, 5))), w[..., :2], jnp.ones((2, 2, 5)))  # noqa: E731
    low = lambda w: pivot(LowRank(w[..., 0, :3], w[:, :3]))  # noqa: E731
    other = tree.map(wrap, quantize_model(model, "layers[1:]/attention/key", 2), "attention/latent")
    other = tree.map(low, other, "layers[1:]/attention/value$")
    for one in (model, other):
        said = jax.tree.map(lambda s: (s.shape, s.dtype), one.specs())
        assert said == jax.tree.map(lambda x: (x.shape, x.dtype.name), one)
        lmx.save(one, tmp_path / "own", overwrite=True)
        jax.tree.map(np.testing.assert_array_equal, lmx.load(tmp_path / "own"), one)
    got, _ = everything(other)
    wanted, _ = everything(latent.unshare(other))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=3e-4), got, wanted)

    with caplog.at_level(logging.WARNING, "lmx"):
        hf.save(model, tmp_path / "hf", format="hf")
    assert "shared latents of 2 layers are written as plain matrices" in caplog.text
    logits = jax.jit(lambda m: m.logits(TOKENS))
    np.testing.assert_allclose(logits(hf.load(tmp_path / "hf")), logits(model), atol=5e-5)
    slopes = jax.jit(jax.grad(lambda m: jnp.square(m.logits(TOKENS)).mean()))(model)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(slopes))
    again = share_latent(model, 3)  # a latent is cut further
    assert [s[0].attention.latent.shape for s in again.params.decoder.layers.stacks] == [(1, 16, 3), (2, 16, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "auto"])
@pytest.mark.parametrize("name", ["grouped", "relative"])  # key-value heads that tensor=2 splits, and one
def test_sharded_equals_one_device(name, explicit):
    model = share_latent(model_of(name), 5)
    wanted, _ = jax.device_get(everything(model))
    with sharding.use_mesh("fsdp=4,tensor=2", explicit=explicit) as mesh:
        placed = jax.device_put(model, specs.shardings(model.specs()))
        put = lambda x: jax.device_put(x, sharding.named_sharding(("batch", None)[: x.ndim], x.shape, mesh))  # noqa: E731
        got, state = everything(placed, put(TOKENS), put(SEGMENTS), put(LENGTHS))
        assert state.caches[0].latent.shape == (8, 9, 5)
        again = share_latent(jax.device_put(model_of(name), specs.shardings(model_of(name).specs())), 5)
        of = lambda m: m.params.decoder.layers.stacks[0][0].attention.latent  # noqa: E731
        assert of(again).sharding == of(placed).sharding
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4), jax.device_get(got), wanted)
    np.testing.assert_allclose(of(again), of(model), atol=1e-6)


def test_bad_input():
    model = model_of("grouped", num_layers=3)
    key = "decoder/layers[0]/attention/key"
    for wrong in (0, 17, 2.0, True):
        with pytest.raises(ConfigError, match="rank 1 to 16 .it has 16 inputs and caches 16 numbers"):
            share_latent(model, wrong)
    for wrong in (0, -0.5, 1.5):
        with pytest.raises(ConfigError, match="above 0 and up to 1"):
            share_latent(model, share=wrong)
    for both in ({}, {"rank": 2, "share": 0.5}):
        with pytest.raises(ConfigError, match="one of them"):
            share_latent(model, **both)
    with pytest.raises(ConfigError, match="selects no key"):
        share_latent(model, 2, pattern="mlp/up")
    with pytest.raises(ConfigError, match="selects nothing"):
        share_latent(model, 2, pattern="attention/kee")
    with pytest.raises(ConfigError, match=r"grams lack decoder/layers\[1\]/attention/key"):
        share_latent(model, 2, grams={key: np.eye(16)})
    with pytest.raises(ConfigError, match="all zero"):
        share_latent(model, 2, grams={key: np.zeros((16, 16))}, pattern=r"layers[0]/attention/key")
    with pytest.raises(ConfigError, match="attention_norm.*shared latent reads it"):
        lmx.reparam.fold_norms(share_latent(model, 2), "attention_norm")
    nan = tree.map(lambda w: w * jnp.nan, model, "attention/value$")
    with pytest.raises(ConfigError, match="not finite"):
        share_latent(nan, 2)
