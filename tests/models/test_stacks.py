"""Stacks: run by scan, taken apart, put together again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.errors import ConfigError
from lmx.core.tree import Layers
from lmx.models import stacks


def layer(i: int, width: int) -> dict:
    """y = x w + b: layers do not commute, so their order shows; `width` makes kinds of unlike shapes."""
    w = jax.random.normal(jax.random.key(i), (2, width)) / width
    return {
        "in": w,
        "out": jax.random.normal(jax.random.key(100 + i), (width, 2)),
        "bias": jnp.full(2, float(i)),
    }


def block(parameters: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ parameters["in"] @ parameters["out"] + parameters["bias"])


def same(one: Layers, two: Layers) -> bool:
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), stacks.layer_list(one), stacks.layer_list(two))
    return all(jax.tree.leaves(equal))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_stacking_keeps_the_layers_and_their_order(widths):
    plain = [layer(i, w) for i, w in enumerate(widths)]
    made = stacks.stack_layers(plain)
    runs = [w for i, w in enumerate(widths) if i == 0 or widths[i - 1] != w]
    assert len(made.stacks) == len(runs) and made.num_layers == len(widths)
    for one, two in zip(stacks.layer_list(made), plain, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, two)
    apart = stacks.unstack({"layers": made})
    assert apart["layers"].sizes == (1,) * len(widths)
    again = stacks.restack(apart)["layers"]
    assert again.sizes == made.sizes and same(again, made)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize(
    ("widths", "period"), [([2, 2, 2], 1), ([3, 2, 2, 2], 1), ([2, 3, 2, 3, 2, 3], 2), ([2, 3], 2)]
)
def test_run_equals_a_loop(widths, period, remat):
    plain = [layer(i, w) for i, w in enumerate(widths)]
    made = stacks.stack_layers(plain, period)
    assert made.num_layers == len(widths)
    x = jax.random.normal(jax.random.key(1), (4, 2))

    def loop(plain):
        y = x
        for parameters in plain:
            y = block(parameters, y)
        return y.sum(), y

    (_, wanted), wanted_grads = jax.value_and_grad(loop, has_aux=True)(plain)
    run = lambda made: (stacks.run(made, x, block, remat).sum(), stacks.run(made, x, block, remat))  # noqa: E731
    (_, y), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(made)
    # At most six layers of float32 sums of 3 terms.
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    close = lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, stacks.layer_list(grads), wanted_grads)


def test_unlike_dtypes_are_not_stacked():
    one, two = layer(0, 2), jax.tree.map(lambda x: x.astype(jnp.bfloat16), layer(1, 2))
    assert stacks.stack_layers([one, two]).sizes == (1, 1)


def test_unstacking_twice_is_unstacking_once():
    apart = stacks.unstack({"layers": stacks.stack_layers([layer(i, 2) for i in range(3)])})
    assert stacks.unstack(apart)["layers"] is apart["layers"]


def test_what_is_numpys_stays_numpys():
    trees = [{"held": np.full(2, i, jnp.bfloat16), "scalar": np.float32(i), "put": jnp.full(3, i)} for i in range(3)]
    made = stacks.stack(trees)
    kinds = {name: type(x) is np.ndarray for name, x in made.items()}
    assert kinds == {"held": True, "scalar": True, "put": False} and made["held"].dtype == jnp.bfloat16
    for got, wanted in zip(stacks.layer_list(Layers.of([(made,)])), trees, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        assert isinstance(got["held"], np.ndarray) and isinstance(got["put"], jax.Array)


def test_a_layer_is_compiled_as_a_whole_and_once(caplog):
    plain = [layer(i, 11) for i in range(6)]  # of a width that no other test has
    with jax.log_compiles():
        made = stacks.restack(stacks.unstack(stacks.stack_layers(plain)))
    jax.tree.map(np.testing.assert_array_equal, stacks.layer_list(made), plain)
    programs = [line for line in caplog.messages if line.startswith("Compiling")]
    assert 0 < len(programs) <= 4, programs  # stacked, taken out of it, taken out of their own, stacked again


def test_errors():
    plain = [layer(i, 2 + i % 2) for i in range(10)]
    with pytest.raises(ConfigError, match="10 layers would need 10 stacks, more than max_stacks=8.*coarser grid"):
        stacks.stack_layers(plain)
    assert stacks.stack_layers(plain, max_stacks=10).sizes == (1,) * 10
    assert stacks.stack_layers(plain, period=2).sizes == (5,)
    with pytest.raises(ConfigError, match="10 layers are not a whole number of periods of 3"):
        stacks.stack_layers(plain, period=3)
