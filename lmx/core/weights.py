"""Weights of every kind behind three verbs: `einsum`, `take`, `dense`.

Where a layer needs a matrix its parameters hold a plain array or a `Weight`: a node that can multiply, look rows up
and write itself out as an array. The kinds are in `lmx.core.kinds`; they nest (the base of a `LoRA` is any kind). A new
kind is one dataclass there and no change to any model: surgery is a tree map from weights to weights.

A weight's axes are (copies ..., inputs ..., outputs ...): `copies` are the stacked layers or experts, present in
storage and gone inside a scan; `inputs` is stated by each kind, never guessed from shapes.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lmx.core import sharding
from lmx.core.specs import ParamSpec

PRODUCT = "product"  # the name of products with weights, by which a remat policy can keep them
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Weight:
    """What a kind provides. `shape` is that of the array it stands for, copies included, `dtype` that of what it gives;
    `rank` is what says how small it is, in the kind's own sense."""

    shape: tuple[int, ...]
    rank: int
    dtype: Any

    def einsum(self, subscripts: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        """`x` times this weight, in `dtype`; `subscripts` as in `lmx.core.weights.einsum`."""
        raise NotImplementedError

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of a weight with one input axis: ids (...,) -> (..., outputs)."""
        raise NotImplementedError

    def dense(self) -> jax.Array:
        """The array this weight stands for."""
        raise NotImplementedError

    def children(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        """For each field, the spec (axes, inputs) it has if this weight stands for an array of `spec`."""
        raise NotImplementedError

    def read_whole(self) -> tuple[Any, ...]:
        """The parts that `take` reads whole; of the others it reads a row."""
        return ()

    def flops(self) -> int:
        """Floating-point operations to multiply one vector by every copy of this weight."""
        fields = jax.tree.leaves(self, is_leaf=lambda x: is_weight(x) and x is not self)
        return sum(flops(field) for field in fields)


def is_weight(x: Any) -> bool:
    """Whether x is a weight of a kind of its own, not a plain array: an `is_leaf` for tree maps."""
    return isinstance(x, Weight)


def einsum(subscripts: str, x: jax.Array, w: Any, dtype: Any = None) -> jax.Array:
    """`x` times a weight of any kind, such as `einsum("btd,dhc->bthc", x, w)`: one letter an axis, the second operand
    in the order (copies, inputs, outputs), or with inputs and outputs exchanged in their roles (a tied output head).

    The product is taken in x's dtype, accumulated in float32 and returned in `dtype` (x's own by default). On an
    Explicit mesh the output's sharding follows from the operands and what FSDP split is gathered, here and only here.
    """
    if is_weight(w):
        return w.einsum(subscripts, x, dtype)
    y = multiply(subscripts, x, w.astype(x.dtype)).astype(x.dtype if dtype is None else dtype)
    return checkpoint_name(y, PRODUCT)


def take(ids: jax.Array, w: Any) -> jax.Array:
    """Rows `ids` (...,) of a weight (n, outputs...) of any kind -> (..., outputs...), in the weight's dtype."""
    if is_weight(w):
        return w.take(ids)
    if sharding.mesh_kind() is not AxisType.Explicit:
        return w.at[ids].get(mode="clip")
    spec = [*sharding.entries(ids), *[None] * (w.ndim - 1)]
    rows = P(sharding.entries(w)[0], *[None] * (w.ndim - 1))
    return jax.reshard(w, rows).at[ids].get(mode="clip", out_sharding=P(*spec))


def dense(w: Any) -> jax.Array:
    """The plain array that a weight of any kind stands for."""
    return w.dense() if is_weight(w) else w


def flops(w: Any) -> int:
    """Floating-point operations to multiply one vector by every copy of a weight of any kind (or its specs)."""
    return w.flops() if is_weight(w) else 2 * math.prod(w.shape)


def read_whole(w: Any) -> tuple[Any, ...]:
    """The parts of a table of any kind (or its specs) that are read whole where one row is looked up."""
    return w.read_whole() if is_weight(w) else ()


def fold(tree: Any) -> Any:
    """The same tree with every weight written out as a plain array: computes what `tree` did, up to rounding."""
    return jax.tree.map(dense, tree, is_leaf=is_weight)


def specs_like(template: Any, tree: Any) -> Any:
    """The specs of `tree`: kinds, shapes and dtypes read from it, axes and inputs from the `template` of specs."""
    return jax.tree.map(_spec_of, template, tree)


def _spec_of(spec: Any, w: Any) -> Any:
    if w is None:  # a hole that partition left
        return None
    if isinstance(w, tuple):  # several weights in one field
        return tuple(map(_spec_of, spec, w))
    if not is_weight(w):
        return spec.replace(shape=tuple(w.shape), dtype=jnp.dtype(w.dtype).name)
    parts = w.children(spec)
    return w.replace(**{name: _spec_of(part, getattr(w, name)) for name, part in parts.items()})


def part(spec: ParamSpec, axes: tuple[str | None, ...], inputs: int | None) -> ParamSpec:
    """The spec of a field of a weight of `spec`: its axes, and how many of them are inputs (None: it is no matrix)."""
    return spec.replace(shape=(0,) * len(axes), axes=axes, inputs=inputs)


def parse(subscripts: str) -> tuple[str, str, str]:
    """The letters of x, of the weight, and of the product."""
    operands, out = subscripts.split("->")
    left, right = operands.split(",")
    return left, right, out


def layout(subscripts: str, x: jax.Array, w: jax.Array) -> tuple[P, P]:
    """(the sharding `w` takes for this product, the sharding of the product), letter by letter."""
    left, right, out = parse(subscripts)
    of_x = dict(zip(left, sharding.entries(x), strict=True))
    busy = {axis for entry in of_x.values() for axis in entry}
    of_w = {
        c: of_x[c] if c in of_x else tuple(a for a in entry if a not in busy)
        for c, entry in zip(right, sharding.entries(w), strict=True)
    }
    merged = of_w | of_x
    return P(*[of_w[c] or None for c in right]), P(*[merged[c] or None for c in out])


def _in_order(subscripts: str) -> str:
    """The same product with letters that follow the alphabet in the weight.

    jnp.einsum contracts several axes in the order of their letters, and any other order than the weight's own would
    copy it, transposed, before every product."""
    _, right, _ = parse(subscripts)
    names = dict(zip(dict.fromkeys(right + "".join(filter(str.isalpha, subscripts))), LETTERS, strict=False))
    return "".join(names.get(c, c) for c in subscripts)


def multiply(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The float32 product of two plain arrays of one dtype."""
    subscripts = _in_order(subscripts)
    left, right, out = parse(subscripts)
    rows = _shared_lead(left, right, out)
    if rows > 1 and x.dtype == jnp.float32 and sharding.mesh_kind() is None:
        return _multiply_rows(subscripts, rows, x, w)
    if sharding.mesh_kind() is AxisType.Explicit:
        w_spec, out_spec = layout(subscripts, x, w)
        w = jax.reshard(w, w_spec)
    else:
        out_spec = None
    if x.dtype == jnp.float32:
        if rows == 1 and weights_first(x.shape[0]) and (turned := _turned(left, right, out)):
            return jnp.moveaxis(jax.lax.optimization_barrier(jnp.einsum(turned, w, x)), -1, 0)
        return jnp.einsum(subscripts, x, w, out_sharding=out_spec)
    return _low_precision(subscripts, out_spec, x, w)


def few_rows(rows: int) -> bool:
    """Whether these are 1 to 32 rows on a CPU and no mesh, where a step's time goes into reading weights and starting
    products."""
    if sharding.mesh_kind() is not None or sharding.platform() != "cpu":
        return False
    return isinstance(rows, int) and 1 <= rows <= 32


def weights_first(rows: int) -> bool:
    """Whether so many rows are multiplied faster by a weight that has its outputs first, as `OutputsFirst` of
    `lmx.core.kinds` has them. XLA's backend for CPUs spends more time on rearranging a matrix for a product of more
    than one row than on the product, unless that is written with the weight first; with many rows that does not count,
    and with two both take equally long."""
    return few_rows(rows) and rows > 2


def _turned(left: str, right: str, out: str) -> str | None:
    """The product with the weight as the first operand and x's rows last, where its outputs come before its inputs. XLA
    would turn that round again: it must not see that the result is transposed."""
    outputs, inputs = out[1:], left[1:]
    return f"{right},{left}->{outputs}{left[0]}" if right == outputs + inputs else None


def _shared_lead(left: str, right: str, out: str) -> int:
    """How many leading axes of the first operand lead the result too, and are none of the weight's."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1] and pair[0] not in right, zip(left, out, strict=False))
    return len(list(pairs))


def _multiply_rows(subscripts: str, rows: int, x: jax.Array, w: jax.Array) -> jax.Array:
    """`multiply` with the leading axes of x, which are also the result's, as one: on CPUs the weight's gradient, a
    product over all of them, else begins with a transposed copy and takes twice as long. (Not in bfloat16: XLA's CPU
    backend has no such product of rows with a float32 result.)"""
    left, right, out = parse(subscripts)
    lead, rest = x.shape[:rows], x.shape[rows:]
    y = multiply(f"{left[rows - 1 :]},{right}->{out[rows - 1 :]}", x.reshape(math.prod(lead), *rest), w)
    return y.reshape(*lead, *y.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _low_precision(subscripts: str, out_spec: P | None, x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of bfloat16 arrays whose backward products also take their operands in that dtype;
    automatic differentiation would multiply float32 cotangents and leave the fast units idle."""
    return jnp.einsum(subscripts, x, w, preferred_element_type=jnp.float32, out_sharding=out_spec)


def _low_precision_forward(subscripts, out_spec, x, w):
    return _low_precision(subscripts, out_spec, x, w), (x, w)


def _low_precision_backward(subscripts, out_spec, saved, g):
    x, w = saved
    left, right, out = parse(subscripts)
    g = g.astype(x.dtype)
    explicit = sharding.mesh_kind() is AxisType.Explicit
    like = lambda a: jax.typeof(a).sharding.spec if explicit else None  # noqa: E731
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx = product(f"{out},{right}->{left}", g, w, out_sharding=like(x))
    dw = product(f"{left},{out}->{right}", x, g, out_sharding=like(w))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_low_precision.defvjp(_low_precision_forward, _low_precision_backward)
