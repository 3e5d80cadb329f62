"""Norms against torch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import ConfigError
from lmx.nn import norm


def parts(bias: bool):
    x, scale, shift = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 3, 16), (16,), (16,)]))
    return 3 * x + 1, norm.Norm(scale, shift if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", norm.KINDS)
def test_equals_torch(kind, bias):
    torch = pytest.importorskip("torch", reason="torch is the oracle of norms; install the extra 'oracle'")
    x, params = parts(bias)
    tensor = lambda a: None if a is None else torch.tensor(np.asarray(a))  # noqa: E731
    if kind == "layernorm":
        wanted = torch.nn.functional.layer_norm(tensor(x), (16,), tensor(params.scale), tensor(params.bias), 1e-2)
    else:
        wanted = torch.nn.functional.rms_norm(tensor(x), (16,), tensor(params.scale), 1e-2)
        wanted = wanted + tensor(params.bias) if bias else wanted
    # Means of 16 float32 numbers: a few units in the last place.
    np.testing.assert_allclose(norm.norm(params, x, kind, 1e-2), wanted.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", norm.KINDS)
def test_float32_inside_and_the_dtype_of_x_outside(kind):
    x, params = parts(True)
    x = (x * 1e3 + 1e4).astype(jnp.bfloat16)
    y = norm.norm(params, x, kind, 1e-5)
    assert y.dtype == jnp.bfloat16
    assert (y == norm.norm(params, x.astype(jnp.float32), kind, 1e-5).astype(jnp.bfloat16)).all()


def test_specs():
    assert norm.abstract(8, False, "float32").bias is None
    specs = norm.abstract(8, True, "bfloat16")
    assert (specs.scale.init, specs.bias.init, specs.bias.shape, specs.bias.dtype) == (
        "ones",
        "zeros",
        (8,),
        "bfloat16",
    )


def test_an_unknown_norm():
    with pytest.raises(ConfigError, match="no norm 'rsmnorm', there are rmsnorm, layernorm; did you mean 'rmsnorm'"):
        norm.norm(parts(True)[1], jnp.ones((1, 16)), "rsmnorm", 1e-5)


def test_offset_scales_equal_gemma():
    torch = pytest.importorskip("torch", reason="torch is the oracle of norms; install the extra 'oracle'")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    x, params = parts(False)
    theirs = Gemma3RMSNorm(16, eps=1e-2)
    theirs.weight.data = torch.tensor(np.asarray(params.scale))
    wanted = theirs(torch.tensor(np.asarray(x))).detach().numpy()
    np.testing.assert_allclose(norm.norm(params, x, "rmsnorm", 1e-2, offset=True), wanted, rtol=1e-5, atol=1e-6)
    assert jnp.abs(norm.norm(params, x, "rmsnorm", 1e-2) - wanted).max() > 0.1
    assert norm.abstract(16, True, "float32", offset=True).scale.init == "zeros"


def test_the_scale_says_over_which_axes_and_no_parameters_change_nothing():
    x, scale = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)), jax.random.normal(jax.random.key(1), (4, 5))
    flat = norm.norm(norm.Norm(scale.reshape(20), None), x.reshape(2, 3, 20), "layernorm", 1e-5).reshape(x.shape)
    np.testing.assert_allclose(norm.norm(norm.Norm(scale, None), x, "layernorm", 1e-5), flat, rtol=1e-5, atol=1e-6)
    assert norm.norm(None, x, "rmsnorm", 1e-5) is x
