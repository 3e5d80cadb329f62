"""The feed-forward layer against torch's activations and float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core import specs
from lmx.nn import mlp


def params(activation: str, bias: bool) -> mlp.MLP:
    tree = mlp.abstract(8, 12, activation, bias, 0.5, 0.5, "float32")
    made = specs.init(tree, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), made)  # no bias is zero


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
def test_equals_torch(activation, bias):
    torch = pytest.importorskip("torch", reason="torch is the oracle of activations; install the extra 'oracle'")
    F = torch.nn.functional
    functions = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
    functions |= {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": functions["gelu_tanh"], "reglu": F.relu}
    p, x = params(activation, bias), 2 * jax.random.normal(jax.random.key(1), (2, 3, 8))
    w = jax.tree.map(lambda a: torch.tensor(np.asarray(a, np.float64)), p)
    tx = torch.tensor(np.asarray(x, np.float64))
    h = tx @ w.up + (w.up_bias if bias else 0)
    gate = h if w.gate is None else tx @ w.gate + (w.gate_bias if bias else 0)
    h = functions[activation](gate) * (1 if w.gate is None else h)
    wanted = h @ w.down + (w.down_bias if bias else 0)
    # float32 sums of 12 terms against float64.
    np.testing.assert_allclose(mlp.mlp(p, x, activation), wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_only_gated_activations_have_a_gate():
    gated = [name for name in mlp.ACTIVATIONS if params(name, False).gate is not None]
    assert gated == ["swiglu", "geglu", "geglu_tanh", "reglu"] and not set(gated) & set(mlp.PLAIN)


def test_the_dtype_of_x_outside():
    assert mlp.mlp(params("swiglu", True), jnp.ones((1, 2, 8), jnp.bfloat16), "swiglu").dtype == jnp.bfloat16
