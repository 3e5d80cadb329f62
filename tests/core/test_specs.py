"""Spec trees: arrays, shapes, shardings and counts that follow from them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core import sharding, specs
from lmx.core.specs import ParamSpec

TREE = {
    "embed": ParamSpec((24, 16), ("vocab", "embed"), 0.02, inputs=1),
    "up": ParamSpec((3, 16, 32), ("layers", "embed", "mlp"), 0.5, inputs=1, dtype="bfloat16"),
    "scale": ParamSpec((16,), (None,), "ones"),
    "bias": ParamSpec((16,), (None,)),
    "none": None,
}
WANTED = {  # on a mesh fsdp=4, tensor=2, by the default rules
    "embed": P("tensor", "fsdp"),
    "up": P(None, "fsdp", "tensor"),
    "scale": P(None),
    "bias": P(None),
}


@pytest.fixture(scope="module")
def plain():
    return jax.device_get(specs.init(TREE, jax.random.key(0)))


def test_init_draws_what_the_specs_say(plain):
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), plain) == jax.tree.map(lambda s: (s.shape, s.dtype), TREE)
    assert (plain["scale"] == 1).all() and (plain["bias"] == 0).all()
    # The deviation of n normal numbers is within 5 / sqrt(2 n) of the true one, but once in a million.
    up = plain["up"].astype(np.float64)
    assert abs(up.std() / 0.5 - 1) < 5 / (2 * up.size) ** 0.5 and abs(up.mean()) < 5 * 0.5 / up.size**0.5


def test_a_leaf_does_not_depend_on_its_neighbours(plain):
    alone = specs.init({"up": TREE["up"]}, jax.random.key(0))["up"]
    assert (np.asarray(alone) == plain["up"]).all()
    renamed = specs.init({"down": TREE["up"]}, jax.random.key(0))["down"]
    assert (np.asarray(renamed) != plain["up"]).any()


def test_init_on_a_mesh_gives_the_same_numbers(plain, mesh):
    for made in (
        specs.init(TREE, jax.random.key(0)),
        jax.jit(lambda key: specs.init(TREE, key))(jax.random.key(0)),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), made, plain)
        # born where the specs say, in somebody else's jit too
        assert all(
            jax.tree.leaves(
                jax.tree.map(lambda x, s: s.is_equivalent_to(x.sharding, x.ndim), made, specs.shardings(TREE))
            )
        )


def test_init_inside_a_transformation_without_a_mesh(plain):
    made = jax.jit(lambda key: specs.init(TREE, key))(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), made, plain)
    assert jax.eval_shape(lambda key: specs.init(TREE, key), jax.random.key(0)) == specs.shapes(TREE)


@pytest.mark.parametrize("explicit", [True, False])
def test_shardings_follow_the_rules(explicit):
    with sharding.use_mesh("fsdp=4,tensor=2", explicit=explicit) as mesh:
        found, shapes = specs.shardings(TREE), specs.shapes(TREE)
        for name, spec in WANTED.items():
            assert found[name] == NamedSharding(mesh, spec) == shapes[name].sharding
            assert (shapes[name].shape, shapes[name].dtype) == (TREE[name].shape, jnp.dtype(TREE[name].dtype))
    with sharding.use_mesh("fsdp=4,tensor=2", sharding.Rules(embed=(), mlp=("tensor", "fsdp")), explicit=explicit):
        assert specs.shardings(TREE)["up"].spec == P(None, None, ("tensor", "fsdp"))


def test_shardings_need_a_mesh():
    with pytest.raises(ValueError, match="need a mesh"):
        specs.shardings(TREE)


@struct.dataclass
class Pair:
    """Two arrays that state their specs."""

    w: Any
    b: Any

    def specs(self) -> Pair:
        return Pair(ParamSpec((8, 16), ("embed", "mlp"), inputs=1), ParamSpec((16,), ("mlp",)))


def test_laid_out_on_a_mesh(mesh):
    given = Pair(np.arange(128, dtype=np.float32).reshape(8, 16), jnp.arange(16, dtype=jnp.float32))
    made = specs.lay_out(given)
    jax.tree.map(np.testing.assert_array_equal, made, given)
    assert jax.tree.map(lambda x: x.sharding, made) == specs.shardings(given.specs())
    assert len(made.w.sharding.device_set) == 8 and not made.w.is_fully_replicated


def test_laid_out_without_a_mesh():
    given = Pair(np.ones((8, 16), jnp.bfloat16), jnp.ones(16))
    made = specs.lay_out(given)
    assert isinstance(made.w, jax.Array) and made.w.dtype == jnp.bfloat16 and made.b is given.b


def test_counts():
    assert specs.count(TREE) == 24 * 16 + 3 * 16 * 32 + 32
    assert specs.nbytes(TREE) == 4 * (24 * 16 + 32) + 2 * 3 * 16 * 32


def test_stacked():
    twice = specs.stack({"w": ParamSpec((4, 6), ("experts", "mlp"), inputs=0)}, 3)["w"]
    assert (twice.shape, twice.axes, twice.leading) == ((3, 4, 6), ("layers", "experts", "mlp"), 2)
    assert ParamSpec((3,), ("layers",)).leading == 1


def test_a_spec_names_every_axis():
    with pytest.raises(ValueError, match="one axis name a dimension"):
        ParamSpec((3, 4), ("embed",))
