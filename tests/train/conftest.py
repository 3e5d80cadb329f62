"""What the tests of training share: tiny random models and packed batches. Numpy draws them: it compiles nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core import specs
from lmx.models import transformer
from lmx.models.config import Config
from lmx.models.transformer import Model

MODELS = Path(__file__).parents[1] / "models" / "conftest.py"
SHAPE = dict(vocab_size=48, num_layers=2, hidden_size=16, num_heads=4, intermediate_size=24)
GPT2 = dict(
    activation="gelu_tanh", norm="layernorm", norm_bias=True, position="learned", max_length=16,
    attention_bias=True, attention_out_bias=True, mlp_bias=True,
)  # fmt: skip


def _same_fixture(name: str):
    """A fixture of tests/models, which pytest shows to that folder only."""
    spec = importlib.util.spec_from_file_location("lmx_tests_models", MODELS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


hugging_face = _same_fixture("hugging_face")


@pytest.fixture(scope="module")
def quick():
    """Compile for compile time: these programs run a few times on tiny arrays. Sharding and rounding are as ever."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny():
    """tiny(kind, **changes): a random model of two layers, "llama" (untied) or "gpt2", in which every leaf matters."""

    def make(kind: str = "llama", **changes) -> Model:
        own = GPT2 if kind == "gpt2" else dict(num_kv_heads=2, tie_embeddings=False)
        config = Config(**(SHAPE | dict(remat="none") | own | changes))
        rng = np.random.default_rng(0)

        def draw(spec: specs.ParamSpec) -> jax.Array:
            values = 0.25 * rng.normal(size=spec.shape) + (spec.init == "ones")
            return jnp.asarray(values, spec.dtype)

        return Model(config, jax.tree.map(draw, transformer.abstract(config)))

    return make


@pytest.fixture(scope="session")
def packed():
    """packed(seed, b, t): rows of two documents and padding, with unlike weights, a quarter of them 0."""

    def make(seed: int = 0, b: int = 8, t: int = 12) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        ends = np.sort(rng.integers(2, t + 1, (b, 2)), axis=1)  # of the two documents
        at = np.arange(t)
        segments = np.where(at < ends[:, :1], 1, np.where(at < ends[:, 1:], 2, 0)).astype(np.int32)
        tokens = rng.integers(1, 48, (b, t)).astype(np.int32)
        weights = rng.uniform(0.2, 2, (b, t)) * (rng.uniform(size=(b, t)) > 0.25) * (segments > 0)
        return {"tokens": tokens, "segment_ids": segments, "weights": weights.astype(np.float32)}

    return make
