"""What the tests of surgery share: tiny random models of several families, and what they compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx.core.specs import ParamSpec
from lmx.models import transformer
from lmx.models.config import Config
from lmx.models.transformer import Model

SHAPE = dict(vocab_size=29, num_layers=3, hidden_size=16, num_heads=4, intermediate_size=24, remat="none")
BIASED = dict(norm="layernorm", norm_bias=True, attention_bias=True, attention_out_bias=True, mlp_bias=True)
MODELS = {
    "llama": dict(num_kv_heads=2, tie_embeddings=False),
    "tied": dict(num_kv_heads=1),
    "gpt2": dict(
        activation="gelu_tanh", position="learned", max_length=16, tie_embeddings=False, head_bias=True, **BIASED,
    ),
    "neox": dict(activation="gelu", rotary_dim=2, parallel_residual=True, tie_embeddings=False, **BIASED),
    "gemma": dict(
        num_kv_heads=2, norm_offset=True, norm_placement="both", embedding_scale=4.0, layer_pattern=("local", "global"),
        window=4, tie_embeddings=False, activation="geglu_tanh", head_dim=6,
    ),
    "bert": dict(
        architecture="encoder", norm_placement="post", embedding_norm=True, type_vocab_size=2, position="learned",
        max_length=16, activation="gelu", head="tokens", num_labels=3, head_bias=True, **BIASED,
    ),
    "modernbert": dict(
        architecture="encoder", norm="layernorm", first_attention_norm=False, embedding_norm=True,
        layer_pattern=("global", "local"), window=3, head="sequence", num_labels=3, pool="mean", head_bias=True,
    ),
    "t5": dict(architecture="encoder_decoder", position="relative", attention_scale=1.0, tie_embeddings=False),
}  # fmt: skip

LENGTH = 24  # of the rows of `batches`


def random(config: Config, seed: int = 0) -> Model:
    """A model in which every leaf matters."""
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> jax.Array:
        size = 0.25 if spec.inputs is None else 0.3
        return jnp.asarray(size * rng.normal(size=spec.shape) + (spec.init == "ones"), spec.dtype)

    return Model(config, jax.tree.map(draw, transformer.abstract(config)))


@pytest.fixture(scope="session")
def tiny():
    """tiny(name, seed=0, **changes of the config): a random model of three layers."""
    return lambda name="llama", seed=0, **changes: random(Config(**(SHAPE | MODELS[name] | changes)), seed)


@pytest.fixture(scope="session")
def answer():
    """answer(model) -> its logits for some tokens, padded where it is an encoder, as float64."""

    def compute(model: Model) -> np.ndarray:
        rng = np.random.default_rng(1)
        given = {"tokens": rng.integers(1, 29, (2, 9)), "segment_ids": np.ones((2, 9), int)}
        if model.config.architecture == "encoder":
            given["segment_ids"][1, 6:] = 0
        if model.config.architecture == "encoder_decoder":
            given["encoder_tokens"] = rng.integers(1, 29, (2, 7))
        given = {name: jnp.asarray(x, jnp.int32) for name, x in given.items()}
        few = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        run = jax.jit(lambda m, x: m.logits(**x)).lower(model, given).compile(compiler_options=few)
        return np.asarray(run(model, given), np.float64)

    return compute


@pytest.fixture
def sound(tmp_path):
    """sound(model): it states its own structure, and a folder holds it without its history."""

    def check(model: Model) -> Model:
        said = jax.tree.map(lambda s: (s.shape, s.dtype), model.specs())
        assert said == jax.tree.map(lambda x: (x.shape, x.dtype.name), model)
        lmx.save(model, tmp_path / "sound", overwrite=True)
        loaded = lmx.load(tmp_path / "sound")
        assert jax.tree.structure(loaded) == jax.tree.structure(model)
        jax.tree.map(np.testing.assert_array_equal, loaded, model)
        return loaded

    return check


@pytest.fixture(scope="session")
def model():
    """A decoder with grouped heads, its spectra not flat."""
    config = lmx.preset("llama-tiny", vocab_size=97, num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4)
    return lmx.init(config.replace(num_kv_heads=2, initializer_range=0.3), jax.random.key(0))


@pytest.fixture(scope="session")
def batches() -> list[dict]:
    """Two batches of rows, some of them padded."""
    made = []
    for i in range(2):
        tokens = jax.random.randint(jax.random.key(10 + i), (8, LENGTH), 0, 97)
        ends = jnp.array([LENGTH, 10, LENGTH, LENGTH, 17, LENGTH, LENGTH, 5])
        segments = (jnp.arange(LENGTH) < ends[:, None]).astype(jnp.int32)
        made.append({"tokens": tokens, "segment_ids": segments})
    return made
