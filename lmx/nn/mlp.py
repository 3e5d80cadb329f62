"""The feed-forward layer: plain (gelu, relu, ...) or gated (SwiGLU, GeGLU)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import weights
from lmx.core.nodes import node
from lmx.core.specs import ParamSpec

# name -> (the function, whether it gates a second projection)
ACTIVATIONS = {
    "gelu": (functools.partial(jax.nn.gelu, approximate=False), False),  # Hendrycks and Gimpel 2016
    "gelu_tanh": (functools.partial(jax.nn.gelu, approximate=True), False),  # its tanh form: GPT-2
    "relu": (jax.nn.relu, False),
    "silu": (jax.nn.silu, False),
    "tanh": (jnp.tanh, False),
    "swiglu": (jax.nn.silu, True),  # Shazeer 2020, "GLU Variants Improve Transformer", equation 5
    "geglu": (functools.partial(jax.nn.gelu, approximate=False), True),
    "geglu_tanh": (functools.partial(jax.nn.gelu, approximate=True), True),
    "reglu": (jax.nn.relu, True),
}
PLAIN = tuple(name for name, (_, gates) in ACTIVATIONS.items() if not gates)


@node
class MLP:
    gate: Any  # weight (d, f), or None where the activation does not gate
    up: Any  # weight (d, f)
    down: Any  # weight (f, d)
    up_bias: Any  # (f,) or None
    down_bias: Any  # (d,) or None
    gate_bias: Any = None  # (f,) or None


def abstract(width: int, hidden: int, activation: str, bias: bool, std: float, out_std: float, dtype: str) -> MLP:
    """The specs of a feed-forward layer of `hidden` units on vectors of `width`."""
    up = ParamSpec((width, hidden), ("embed", "mlp"), std, inputs=1, dtype=dtype)
    down = ParamSpec((hidden, width), ("mlp", "embed"), out_std, inputs=1, dtype=dtype)
    gates, up_bias = ACTIVATIONS[activation][1], ParamSpec((hidden,), ("mlp",), dtype=dtype) if bias else None
    return MLP(
        gate=up if gates else None,
        up=up,
        down=down,
        up_bias=up_bias,
        down_bias=ParamSpec((width,), (None,), dtype=dtype) if bias else None,
        gate_bias=up_bias if gates else None,
    )


def mlp(params: MLP, x: jax.Array, activation: str) -> jax.Array:
    """The feed-forward layer on x (b, t, d) -> (b, t, d)."""
    function, _ = ACTIVATIONS[activation]
    h = linear("btd,df->btf", x, params.up, params.up_bias)
    h = function(h) if params.gate is None else function(linear("btd,df->btf", x, params.gate, params.gate_bias)) * h
    return linear("btf,fd->btd", h, params.down, params.down_bias)


def linear(subscripts: str, x: jax.Array, weight: Any, bias: Any) -> jax.Array:
    """x times a weight of any kind, plus a bias unless None, in x's dtype."""
    return add_bias(weights.einsum(subscripts, x, weight), bias)


def add_bias(y: jax.Array, bias: Any) -> jax.Array:
    """y plus a bias unless None, in y's dtype."""
    return y if bias is None else y + bias.astype(y.dtype)
