"""Spec trees: a parameter's shape, logical axes and initialiser, written once; all else is derived from them.

`abstract` functions of layers and models return the parameter tree with a `ParamSpec` in every leaf. From it follow:
arrays born sharded (`init`), shardings, restore targets, which axes of a weight are inputs (Muon, Adafactor), counts.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import sharding
from lmx.core.tree import paths

LEADING = ("layers", "experts")  # axes that count copies of a matrix rather than belong to it


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one array of a model is.

    shape:  its shape.
    axes:   a logical name (`lmx.core.sharding.Rules`) or None an axis.
    init:   "zeros", "ones", or the standard deviation of a normal distribution.
    inputs: for a matrix, how many of its axes (after `layers` and `experts`) are inputs, the others being outputs;
            None for what is not a matrix (biases, norm scales).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str | float = "zeros"
    inputs: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"a spec needs one axis name a dimension: shape {self.shape}, axes {self.axes}")

    @property
    def leading(self) -> int:
        """How many leading axes count copies (`layers`, `experts`)."""
        return next((i for i, axis in enumerate(self.axes) if axis not in LEADING), len(self.axes))

    def replace(self, **changes: Any) -> ParamSpec:
        return dataclasses.replace(self, **changes)

    def stacked(self, n: int, axis: str = "layers") -> ParamSpec:
        """The spec of n such arrays stored together along a new leading axis."""
        return self.replace(shape=(n, *self.shape), axes=(axis, *self.axes))


def stack(specs: Any, n: int, axis: str = "layers") -> Any:
    """A tree of specs, each of n arrays stored together along a new leading axis."""
    return jax.tree.map(lambda spec: spec.stacked(n, axis), specs)


def of(tree: Any) -> Any:
    """The specs of any tree: nodes that state their own (`node.specs()`) are asked.

    Other arrays get unnamed axes; of two and more dimensions they count as matrices whose last axis is the output.
    """

    def one(x: Any) -> Any:
        if hasattr(x, "specs"):
            return x.specs()
        n = len(x.shape)
        return ParamSpec(tuple(x.shape), (None,) * n, inputs=n - 1 if n > 1 else None, dtype=jnp.dtype(x.dtype).name)

    return jax.tree.map(one, tree, is_leaf=lambda x: hasattr(x, "specs"))


def _draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
    dtype, out = jnp.dtype(spec.dtype), sharding.out_sharding(spec.shape, *spec.axes)
    if spec.init in ("zeros", "ones"):
        return sharding.place(jnp.full(spec.shape, spec.init == "ones", dtype, out_sharding=out), *spec.axes)
    value = jax.random.normal(key, spec.shape, jnp.float32, out_sharding=out)
    return sharding.place((value * spec.init).astype(dtype), *spec.axes)


def init(specs: Any, key: jax.Array) -> Any:
    """Arrays for a tree of specs, drawn by one jitted function and sharded from birth on the mesh in force.

    Each leaf's key is folded from its path, so a leaf's values do not depend on what else is in the tree.
    """

    def draw(key: jax.Array) -> Any:
        leaves = [_draw(s, jax.random.fold_in(key, zlib.crc32(str(path).encode()))) for path, s in paths(specs)]
        return jax.tree.unflatten(jax.tree.structure(specs), leaves)

    mesh = sharding.concrete_mesh()
    return jax.jit(draw, out_shardings=None if mesh is None else shardings(specs))(key)


def shapes(specs: Any) -> Any:
    """The tree of `jax.ShapeDtypeStruct`, with shardings where a mesh is in force: what restoring fills."""
    mesh = sharding.layout_mesh()

    def shape(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        place = None if mesh is None else sharding.named_sharding(spec.axes, spec.shape, mesh)
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), sharding=place)

    return jax.tree.map(shape, specs)


def shardings(specs: Any) -> Any:
    """The tree of NamedSharding on the mesh in force. Raises ValueError without one."""
    mesh = sharding.concrete_mesh()
    if mesh is None:
        raise ValueError("shardings need a mesh; wrap the call in `with lmx.use_mesh(...)`")
    return jax.tree.map(lambda spec: sharding.named_sharding(spec.axes, spec.shape, mesh), specs)


def lay_out(tree: Any) -> Any:
    """A tree that states its specs, laid out by them on the mesh in force, if there is one; numpy's arrays as jax's."""
    is_held = lambda x: isinstance(x, np.ndarray | np.generic)  # noqa: E731
    if sharding.concrete_mesh() is None:
        return jax.tree.map(lambda x: jax.device_put(x) if is_held(x) else x, tree)

    def put(x: Any, where: jax.sharding.NamedSharding) -> jax.Array:
        # each process has all of numpy's array, and gives its own devices their parts
        return jax.make_array_from_callback(x.shape, where, x.__getitem__) if is_held(x) else jax.device_put(x, where)

    return jax.tree.map(put, tree, shardings(of(tree)))


def count(tree: Any) -> int:
    """How many numbers the arrays (or specs) of a tree hold."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """How many bytes the arrays (or specs) of a tree take, over all devices, each copy counted once."""
    return sum(math.prod(leaf.shape) * np.dtype(jnp.dtype(leaf.dtype)).itemsize for leaf in jax.tree.leaves(tree))
