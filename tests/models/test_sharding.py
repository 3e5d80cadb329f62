"""Sharded equals unsharded: logits, scores, gradients and steps, Explicit and Auto, 8 simulated devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from lmx.core import sharding, specs, tree, weights
from lmx.core.kinds import LoRA, LowRank
from lmx.models import transformer
from lmx.models.config import Config
from lmx.models.presets import preset
from lmx.models.transformer import Model, model_specs

SHAPE = dict(vocab_size=50, num_layers=2, hidden_size=32, num_heads=4, intermediate_size=48, initializer_range=0.2)
CONFIGS = {
    "llama": Config(**SHAPE, num_kv_heads=2, tie_embeddings=False),
    "gpt2, one key-value head": Config(
        **SHAPE, num_kv_heads=1, activation="gelu", norm="layernorm", norm_bias=True, position="learned",
        max_length=16, attention_bias=True, attention_out_bias=True, mlp_bias=True,
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 50, (8, 12)).astype(np.int32)
SEGMENTS = np.repeat([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], 4, axis=0).astype(np.int32)
LENGTHS = np.array([6, 2, 4, 1, 6, 3, 5, 2], np.int32)
# The same float32 numbers, added in another order by up to 8 devices, in two layers, logits up to about 10.
CLOSE = dict(rtol=1e-5, atol=5e-5)


def factorized(model: Model) -> Model:
    """Both layers of rank 4, one of them adapted, and a factorized embedding."""
    adapt = lambda w: LoRA(w, w.a[..., :2], w.b[:, :2], alpha=4.0)  # noqa: E731
    low = lambda w: LowRank(w.reshape(*w.shape[:2], -1)[..., :4], 0.1 + w[:, :4])  # noqa: E731
    model = tree.map(low, model, "layers/(attention/query|mlp/up)$", weights.is_weight)
    model = tree.map(adapt, model, "layers[1]/attention/query$", weights.is_weight)
    return tree.map(lambda w: LowRank(w[:, :7], 0.3 * jnp.eye(32)[:7]), model, "embed/tokens$", weights.is_weight)


def everything(model: Model, tokens: jax.Array, segment_ids: jax.Array, lengths: jax.Array):
    """Logits, scores, gradients, and log-probabilities of a prefill and, after rewinding, of two steps."""
    weight = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)

    def loss(model):
        scores = model.score(tokens, segment_ids=segment_ids)
        return -jnp.where(weight, scores, 0).sum() / weight.sum(), scores

    (_, scores), grads = jax.value_and_grad(loss, has_aux=True)(model)
    prefill, state = model.step(model.start(8, 9), tokens[:, :6])
    state = model.rewind(state, lengths)
    one, state = model.step(state, tokens[:, 6:7])
    two, state = model.step(state, tokens[:, 7:9])
    return model.logits(tokens, segment_ids=segment_ids), scores, grads, prefill, one, two, state.lengths


@functools.cache
def model_of(name: str) -> Model:
    return factorized(model_of("llama")) if name == "factorized" else transformer.init(CONFIGS[name], jax.random.key(1))


@pytest.fixture(scope="module")
def wanted():
    """`wanted(name)`: a model and its results on one device without a mesh."""

    @functools.cache
    def one(name: str):
        with sharding.use_mesh(None):
            model = model_of(name)
            return model, jax.device_get(jax.jit(everything)(model, TOKENS, SEGMENTS, LENGTHS))

    return one


def put(x: np.ndarray, mesh) -> jax.Array:
    return jax.device_put(x, sharding.named_sharding(("batch", None)[: x.ndim], x.shape, mesh))


@pytest.mark.slow
def test_sharded_equals_one_device(wanted, mesh):
    check(*wanted("llama"), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("name", ["gpt2, one key-value head", "factorized"])
def test_other_models_sharded_equal_one_device(wanted, name, explicit):
    with sharding.use_mesh("fsdp=4,tensor=2", explicit=explicit) as mesh:
        check(*wanted(name), mesh)


def check(model: Model, results, mesh) -> None:
    placed = Model(model.config, jax.device_put(model.params, specs.shardings(model_specs(model))))
    got = jax.jit(everything)(placed, put(TOKENS, mesh), put(SEGMENTS, mesh), put(LENGTHS, mesh))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **CLOSE), jax.device_get(got), results)
    if sharding.mesh_kind() is AxisType.Explicit:
        for (path, g), (_, p) in zip(tree.paths(got[2]), tree.paths(placed), strict=True):
            assert g.sharding.is_equivalent_to(p.sharding, g.ndim), f"the gradient of {path} lies as {g.sharding}"
        assert got[3].sharding.spec[0] is not None  # rows stay split


@pytest.mark.slow
def test_tokens_that_lie_anywhere(wanted):
    """What a user hands over works on an Explicit mesh as it is; so does a batch that does not divide."""
    model, results = wanted("llama")
    with sharding.use_mesh("fsdp=4,tensor=2"):
        placed = Model(model.config, jax.device_put(model.params, specs.shardings(model_specs(model))))
        got = jax.jit(everything)(placed, TOKENS, SEGMENTS, LENGTHS)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **CLOSE), jax.device_get(got), results)
        three = placed.logits(TOKENS[:3], segment_ids=SEGMENTS[:3])
    np.testing.assert_allclose(np.asarray(three), results[0][:3], **CLOSE)


def test_a_model_is_born_sharded():
    with sharding.use_mesh("fsdp=4,tensor=2"):
        model = transformer.init(CONFIGS["llama"], jax.random.key(1))
        query = model.params.decoder.layers.stacks[0][0].attention.query
        assert query.addressable_shards[0].data.shape == (2, 8, 2, 8)
    alone = transformer.init(CONFIGS["llama"], jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), model, alone)


def test_a_big_preset_lowers_on_an_abstract_mesh():
    """llama-7b's gradients for 64 devices: what fsdp=64 makes of the program, without a device or array."""
    config = preset("llama-7b")
    mesh = AbstractMesh((64,), ("fsdp",), axis_types=(AxisType.Explicit,))

    def shape(s: specs.ParamSpec) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, sharding.partition_spec(s.axes, s.shape, mesh))
        return jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype), sharding=place)

    model = Model(config, jax.tree.map(shape, transformer.abstract(config)))
    tokens = shape(specs.ParamSpec((128, 2048), ("batch", "sequence"), dtype="int32"))
    loss = lambda model, tokens: model.score(tokens).mean()  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(model, tokens)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    query = traced.out_info.params.decoder.layers.stacks[0][0].attention.query
    assert query.shape == (32, 4096, 32, 128) and query.sharding.spec == jax.P(None, "fsdp", None, None)
    assert "fsdp" in text and len(text) < 1e6  # layers are scanned: the program does not grow with them


@pytest.mark.parametrize("explicit", [True, False])
def test_bfloat16_on_a_mesh(explicit):
    model = model_of("llama")
    model = model.replace(config=model.config.replace(compute_dtype="bfloat16"))
    loss = lambda model, tokens: -model.score(tokens).mean()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(model, TOKENS)
    with sharding.use_mesh("fsdp=4,tensor=2", explicit=explicit) as mesh:
        placed = Model(model.config, jax.device_put(model.params, specs.shardings(model_specs(model))))
        got, got_grads = jax.jit(jax.value_and_grad(loss))(placed, put(TOKENS, mesh))
        # A sum added in another order may round to the next bfloat16, 2^-8 away, and what follows with it.
        assert float(got) == pytest.approx(float(value), rel=0.01)
        for (path, g), w in zip(tree.paths(jax.device_get(got_grads)), jax.tree.leaves(grads), strict=True):
            assert g.dtype == np.float32
            error = np.linalg.norm(g - np.asarray(w)) / np.linalg.norm(w)
            assert error < 0.1, f"{path}: {error}"
