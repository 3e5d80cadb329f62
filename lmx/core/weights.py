"""Weights of every kind behind three verbs: `einsum`, `take`, `dense`.

Where a layer needs a matrix its parameters hold a plain array or a `Weight`: a node that can multiply, look rows up
and write itself out as an array. Kinds nest (the base of a `LoRA` is any kind). A new kind is one dataclass here and
no change to any model: surgery is a tree map from weights to weights.

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
from lmx.core.nodes import node, static
from lmx.core.specs import ParamSpec

PRODUCT = "product"  # the name of products with weights, by which a remat policy can keep them
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Weight:
    """What a kind provides. `shape` is that of the array it stands for, copies included; `rank` is what says how small
    it is, in the kind's own sense."""

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

    def flops(self) -> int:
        """Floating-point operations to multiply one vector by every copy of this weight."""
        return sum(2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(self))


def is_weight(x: Any) -> bool:
    """Whether x is a weight of a kind of its own, not a plain array: an `is_leaf` for tree maps."""
    return isinstance(x, Weight)


@node
class LowRank(Weight):
    """W = a b of rank r: a (copies..., inputs..., r), b (copies..., r, outputs...)."""

    a: Any
    b: Any
    inputs: int = static(default=1)

    @property
    def copies(self) -> int:
        return len(self.a.shape) - 1 - self.inputs

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.a.shape[:-1], *self.b.shape[self.copies + 1 :])

    @property
    def dtype(self) -> Any:
        return self.a.dtype

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def einsum(self, subscripts: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        left, right, out = _parse(subscripts)
        rank = next(c for c in LETTERS if c not in subscripts)
        middle = self.copies + self.inputs
        letters_a, letters_b = right[:middle] + rank, right[: self.copies] + rank + right[middle:]
        first, second, letters_1, letters_2 = self.a, self.b, letters_a, letters_b
        if set(right[self.copies : middle]) & set(out):  # used transposed, as a tied output head is
            first, second, letters_1, letters_2 = self.b, self.a, letters_b, letters_a
        hidden = "".join(c for c in left if c in out or c not in letters_1) + rank
        h = einsum(f"{left},{letters_1}->{hidden}", x, first)
        return einsum(f"{hidden},{letters_2}->{out}", h, second, dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        lead, outs = LETTERS[: ids.ndim], LETTERS[ids.ndim + 1 : ids.ndim + len(self.b.shape)]
        rank = LETTERS[ids.ndim]
        return einsum(f"{lead}{rank},{rank}{outs}->{lead}{outs}", take(ids, self.a), self.b)

    def dense(self) -> jax.Array:
        n = len(self.shape)
        letters, rank, middle = LETTERS[:n], LETTERS[n], self.copies + self.inputs
        a, b = dense(self.a), dense(self.b)
        subscripts = f"{letters[:middle]}{rank},{letters[: self.copies]}{rank}{letters[middle:]}->{letters}"
        return _multiply(subscripts, a, b.astype(a.dtype)).astype(a.dtype)

    def children(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        lead, middle = spec.axes[: spec.leading], spec.leading + self.inputs
        return {
            "a": _part(spec, (*spec.axes[:middle], "rank"), self.inputs),
            "b": _part(spec, (*lead, "rank", *spec.axes[middle:]), 1),
        }


@node
class LoRA(Weight):
    """W = base + (alpha / r) a b: a frozen or trained base of any kind and a low-rank update.

    Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3; `lora_a` (copies..., inputs..., r)
    and `lora_b` (copies..., r, outputs...) are the paper's A and B transposed, as lmx writes inputs before outputs.
    """

    base: Any
    lora_a: Any
    lora_b: Any
    inputs: int = static(default=1)
    alpha: float = static(default=1.0)

    @property
    def update(self) -> LowRank:
        return LowRank(self.lora_a, self.lora_b, self.inputs)

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def einsum(self, subscripts: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        return einsum(subscripts, x, self.base, dtype) + self.scale * self.update.einsum(subscripts, x, dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        rows = take(ids, self.base)
        return (rows + self.scale * self.update.take(ids)).astype(rows.dtype)

    def dense(self) -> jax.Array:
        base = dense(self.base)
        return base + (self.scale * self.update.dense()).astype(base.dtype)

    def children(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        parts = self.update.children(spec)
        return {"base": spec, "lora_a": parts["a"], "lora_b": parts["b"]}


def _part(spec: ParamSpec, axes: tuple[str | None, ...], inputs: int) -> ParamSpec:
    return spec.replace(shape=(0,) * len(axes), axes=axes, inputs=inputs)


def einsum(subscripts: str, x: jax.Array, w: Any, dtype: Any = None) -> jax.Array:
    """`x` times a weight of any kind, such as `einsum("btd,dhc->bthc", x, w)`: one letter an axis, the second operand
    in the order (copies, inputs, outputs), or with inputs and outputs exchanged in their roles (a tied output head).

    The product is taken in x's dtype, accumulated in float32 and returned in `dtype` (x's own by default). On an
    Explicit mesh the output's sharding follows from the operands and what FSDP split is gathered, here and only here.
    """
    if is_weight(w):
        return w.einsum(subscripts, x, dtype)
    y = _multiply(subscripts, x, w.astype(x.dtype)).astype(x.dtype if dtype is None else dtype)
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


def fold(tree: Any) -> Any:
    """The same tree with every weight written out as a plain array: computes what `tree` did, up to rounding."""
    return jax.tree.map(dense, tree, is_leaf=is_weight)


def specs_like(template: Any, tree: Any) -> Any:
    """The specs of `tree`: kinds, shapes and dtypes read from it, axes and inputs from the `template` of specs."""
    return jax.tree.map(_spec_of, template, tree)


def _spec_of(spec: ParamSpec, w: Any) -> Any:
    if w is None:  # a hole that partition left
        return None
    if not is_weight(w):
        return spec.replace(shape=tuple(w.shape), dtype=jnp.dtype(w.dtype).name)
    parts = w.children(spec)
    return w.replace(**{name: _spec_of(part, getattr(w, name)) for name, part in parts.items()})


def _parse(subscripts: str) -> tuple[str, str, str]:
    operands, out = subscripts.split("->")
    left, right = operands.split(",")
    return left, right, out


def _layout(subscripts: str, x: jax.Array, w: jax.Array) -> tuple[P, P]:
    """(the sharding `w` takes for this product, the sharding of the product), letter by letter."""
    left, right, out = _parse(subscripts)
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
    _, right, _ = _parse(subscripts)
    names = dict(zip(dict.fromkeys(right + "".join(filter(str.isalpha, subscripts))), LETTERS, strict=False))
    return "".join(names.get(c, c) for c in subscripts)


def _multiply(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The float32 product of two plain arrays of one dtype."""
    subscripts = _in_order(subscripts)
    left, right, out = _parse(subscripts)
    rows = _shared_lead(left, right, out)
    if rows > 1 and x.dtype == jnp.float32 and sharding.mesh_kind() is None:
        return _multiply_rows(subscripts, rows, x, w)
    if sharding.mesh_kind() is AxisType.Explicit:
        w_spec, out_spec = _layout(subscripts, x, w)
        w = jax.reshard(w, w_spec)
    else:
        out_spec = None
    if x.dtype == jnp.float32:
        return jnp.einsum(subscripts, x, w, out_sharding=out_spec)
    return _low_precision(subscripts, out_spec, x, w)


def _shared_lead(left: str, right: str, out: str) -> int:
    """How many leading axes of the first operand lead the result too, and are none of the weight's."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1] and pair[0] not in right, zip(left, out, strict=False))
    return len(list(pairs))


def _multiply_rows(subscripts: str, rows: int, x: jax.Array, w: jax.Array) -> jax.Array:
    """`_multiply` with the leading axes of x, which are also the result's, as one: on CPUs the weight's gradient, a
    product over all of them, else begins with a transposed copy and takes twice as long. (Not in bfloat16: XLA's CPU
    backend has no such product of rows with a float32 result.)"""
    left, right, out = _parse(subscripts)
    lead, rest = x.shape[:rows], x.shape[rows:]
    y = _multiply(f"{left[rows - 1 :]},{right}->{out[rows - 1 :]}", x.reshape(math.prod(lead), *rest), w)
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
    left, right, out = _parse(subscripts)
    g = g.astype(x.dtype)
    explicit = sharding.mesh_kind() is AxisType.Explicit
    like = lambda a: jax.typeof(a).sharding.spec if explicit else None  # noqa: E731
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx = product(f"{out},{right}->{left}", g, w, out_sharding=like(x))
    dw = product(f"{left},{out}->{right}", x, g, out_sharding=like(w))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_low_precision.defvjp(_low_precision_forward, _low_precision_backward)
