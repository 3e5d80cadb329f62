import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import reparam
from lmx.core import specs
from lmx.core.errors import ConfigError
from lmx.reparam.allocate import curve
from lmx.reparam.decompose import decompose
from lmx.reparam.prices import UNITS, price_of


@pytest.mark.parametrize("form", ["two-factor", "pivoted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_bytes_and_flops_are_those_of_the_weight(form, dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)), dtype)
    made = reparam.factorize_weight(w, rank=5, form=form)
    floats = [x for x in jax.tree.leaves(made) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert price_of("numbers", form)((12, 20), 5) == sum(x.size for x in floats)
    assert price_of("bytes", form, dtype=dtype)((12, 20), 5) == specs.nbytes(made)
    assert price_of("flops", form)((12, 20), 5) == made.flops()
    for unit, dense in (("numbers", 240), ("flops", 480), ("bytes", 240 * jnp.dtype(dtype).itemsize)):
        assert price_of(unit, form, dtype=dtype)((12, 20), None) == dense


@pytest.mark.parametrize("form", ["two-factor", "pivoted", "dense"])
def test_seconds_are_measured_once(form):
    price = price_of("seconds", form, rows=4)
    first = [price((64, 96), rank) for rank in (None, 8)]
    assert all(0 < t < 10 for t in first) and [price((64, 96), rank) for rank in (None, 8)] == first


def test_every_unit_is_a_budget(model, batches):
    parts = reparam.decompose_model(model, method="svd")
    for unit in UNITS[:3]:
        price = price_of(unit, "two-factor")
        ranks = reparam.choose_ranks(model, parts, 0.6, form="two-factor", price=price)
        paid = sum(price(part.site.shape, ranks[path]) for path, part in parts.items())
        assert paid <= 0.6 * sum(price(part.site.shape, None) for part in parts.values())


def test_what_costs_more_than_dense_is_no_choice():
    """As two thin products do where they take longer than one."""
    slow = lambda shape, rank: 1.0 if rank is None else 1.0 + rank  # noqa: E731
    made = curve(decompose(np.eye(8)), slow, grid=2)
    assert made.ranks == (1, None)


def test_bad_input():
    with pytest.raises(ConfigError, match="no unit 'second', there are .*; did you mean 'seconds'"):
        price_of("second", "dense")
    with pytest.raises(ConfigError, match="no form 'lora'"):
        price_of("numbers", "lora")
