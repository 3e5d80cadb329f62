"""The kinds of weight: `LowRank`, `LoRA`, `Pivoted`, `Quantized`, `Sum`, `OutputsFirst`.

`lmx.core.weights` says what each provides.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lmx.core import axes, sharding, weights
from lmx.core.nodes import node, static
from lmx.core.specs import ParamSpec
from lmx.core.weights import LETTERS


@node
class LowRank(weights.Weight):
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
        left, right, out = weights.parse(subscripts)
        rank = next(c for c in LETTERS if c not in subscripts)
        middle = self.copies + self.inputs
        letters_a, letters_b = right[:middle] + rank, right[: self.copies] + rank + right[middle:]
        first, second, letters_1, letters_2 = self.a, self.b, letters_a, letters_b
        if set(right[self.copies : middle]) & set(out):  # used transposed, as a tied output head is
            first, second, letters_1, letters_2 = self.b, self.a, letters_b, letters_a
        hidden = "".join(c for c in left if c in out or c not in letters_1) + rank
        h = weights.einsum(f"{left},{letters_1}->{hidden}", x, first)
        return weights.einsum(f"{hidden},{letters_2}->{out}", h, second, dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        lead, outs = LETTERS[: ids.ndim], LETTERS[ids.ndim + 1 : ids.ndim + len(self.b.shape)]
        rank = LETTERS[ids.ndim]
        return weights.einsum(f"{lead}{rank},{rank}{outs}->{lead}{outs}", weights.take(ids, self.a), self.b)

    def read_whole(self) -> tuple[Any, ...]:
        return (self.b, *weights.read_whole(self.a))

    def dense(self) -> jax.Array:
        n = len(self.shape)
        letters, rank, middle = LETTERS[:n], LETTERS[n], self.copies + self.inputs
        a, b = weights.dense(self.a), weights.dense(self.b)
        subscripts = f"{letters[:middle]}{rank},{letters[: self.copies]}{rank}{letters[middle:]}->{letters}"
        return weights.multiply(subscripts, a, b.astype(a.dtype)).astype(a.dtype)

    def children(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        lead, middle = spec.axes[: spec.leading], spec.leading + self.inputs
        return {
            "a": weights.part(spec, (*spec.axes[:middle], "rank"), self.inputs),
            "b": weights.part(spec, (*lead, "rank", *spec.axes[middle:]), 1),
        }


@node
class LoRA(weights.Weight):
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
        return weights.einsum(subscripts, x, self.base, dtype) + self.scale * self.update.einsum(subscripts, x, dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        rows = weights.take(ids, self.base)
        return (rows + self.scale * self.update.take(ids)).astype(rows.dtype)

    def read_whole(self) -> tuple[Any, ...]:
        return (self.lora_b, *weights.read_whole(self.base), *weights.read_whole(self.lora_a))

    def dense(self) -> jax.Array:
        base = weights.dense(self.base)
        return base + (self.scale * self.update.dense()).astype(base.dtype)

    def children(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        parts = self.update.children(spec)
        return {"base": spec, "lora_a": parts["a"], "lora_b": parts["b"]}


@node
class Pivoted(weights.Weight):
    """W = P [I; C] B of rank r without the freedom of two factors (a b = a m m^-1 b): r of W's rows are B, the others
    are combinations C of those, so that r (m + n - r) numbers are stored and not r (m + n).

    Zhao et al. 2025, "Pivoting Factorization" (PIFA); rows are inputs here. `rest` (copies..., m - r, r) is C, `b`
    (copies..., r, outputs...) is B, `order` (copies..., m) int32 the permutation P: which of the m inputs, flattened,
    the rows of B stand for, then which the rows of C. `inputs`: the sizes of the input axes.
    """

    rest: Any
    b: Any
    order: Any
    inputs: tuple[int, ...] = static()

    @property
    def copies(self) -> int:
        return len(self.order.shape) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        n = self.copies
        return (*self.order.shape[:n], *self.inputs, *self.b.shape[n + 1 :])

    @property
    def dtype(self) -> Any:
        return self.b.dtype

    @property
    def rank(self) -> int:
        return self.rest.shape[-1]

    def einsum(self, subscripts: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        left, right, out = weights.parse(subscripts)
        n, r = self.copies, self.rank
        lead, ins, outs = right[:n], right[n : n + len(self.inputs)], right[n + len(self.inputs) :]
        row, rank = [c for c in LETTERS if c not in subscripts][:2]
        used = outs if set(ins) & set(out) else ins  # outs: transposed, as a tied output head is
        rows = lead + "".join(c for c in left if c not in lead + used)
        rest, b = f"{lead}{row}{rank}", f"{lead}{rank}{outs}"
        if used == outs:
            h = weights.einsum(f"{left},{b}->{rows}{rank}", x, self.b, jnp.float32)
            y = weights.einsum(f"{rows}{rank},{rest}->{rows}{row}", h.astype(x.dtype), self.rest, jnp.float32)
            y = jnp.concatenate([axes.whole(h, -1), axes.whole(y, -1)], -1).astype(x.dtype if dtype is None else dtype)
            y = axes.split(axes.permute(y, self._places(), -1), -1, self.inputs)
            return jnp.transpose(y, [(rows + ins).index(c) for c in out])
        x = jnp.transpose(x, [left.index(c) for c in rows + ins])
        x = axes.merge(axes.whole(x, *range(len(rows), x.ndim)), len(rows))
        x = axes.permute(x, self.order, -1)
        h = weights.einsum(f"{rows}{row},{rest}->{rows}{rank}", x[..., r:], self.rest, jnp.float32)
        h = (x[..., :r].astype(jnp.float32) + h).astype(x.dtype)
        return weights.einsum(f"{rows}{rank},{b}->{out}", h, self.b, dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        lead, outs = LETTERS[: ids.ndim], LETTERS[ids.ndim + 1 : ids.ndim + len(self.b.shape)]
        place, rank = weights.take(ids, self._places())[..., None], LETTERS[ids.ndim]
        rows = weights.take(jnp.maximum(place[..., 0] - self.rank, 0), self.rest)
        rows = jnp.where(place < self.rank, (place == jnp.arange(self.rank)).astype(rows.dtype), rows)
        return weights.einsum(f"{lead}{rank},{rank}{outs}->{lead}{outs}", rows, self.b).astype(self.dtype)

    def read_whole(self) -> tuple[Any, ...]:
        return (self.b, self.order, *weights.read_whole(self.rest))

    def dense(self) -> jax.Array:
        b, n = weights.dense(self.b), self.copies
        lead, row, rank, outs = LETTERS[:n], LETTERS[n], LETTERS[n + 1], LETTERS[n + 2 : b.ndim + 1]
        subscripts = f"{lead}{row}{rank},{lead}{rank}{outs}->{lead}{row}{outs}"
        others = weights.multiply(subscripts, weights.dense(self.rest).astype(b.dtype), b).astype(b.dtype)
        rows = jnp.concatenate([axes.whole(b, n), axes.whole(others, n)], n)
        return axes.split(axes.permute(rows, self._places(), n), n, self.inputs)

    def children(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        lead, middle = spec.axes[: spec.leading], spec.leading + len(self.inputs)
        return {
            "rest": weights.part(spec, (*lead, spec.axes[spec.leading], "rank"), 1),
            "b": weights.part(spec, (*lead, "rank", *spec.axes[middle:]), 1),
            "order": weights.part(spec, (*lead, None), None).replace(init="zeros"),
        }

    def flops(self) -> int:
        return weights.flops(self.rest) + weights.flops(self.b)

    def _places(self) -> jax.Array:
        """(copies..., m): where among the rows of [B; C B] each input's row is, the inverse of `order`."""
        count = jnp.arange(self.order.shape[-1], dtype=self.order.dtype)
        invert = lambda order: jnp.zeros_like(order).at[order].set(count, unique_indices=True)  # noqa: E731
        for _ in range(self.copies):
            invert = jax.vmap(invert)
        return invert(self.order)


@node
class Quantized(weights.Weight):
    """W = values * scale: int8 numbers, and one positive scale for `group` successive inputs of each output.

    Symmetric rounding to the nearest, as in Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", by
    blocks of inputs: `values` has W's shape, `scale` (copies..., groups, outputs...) where groups = ceil(m / group) of
    the m inputs, flattened; the last group may be smaller. Products are taken in x's dtype, as with an array.
    """

    values: Any
    scale: Any
    group: int = static(default=64)
    inputs: int = static(default=1)
    outputs: int = static(default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @property
    def rank(self) -> int:
        return self.group

    def einsum(self, subscripts: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        values = self.values
        if sharding.mesh_kind() is AxisType.Explicit:  # what FSDP split is gathered while it is small
            values = jax.reshard(values, weights.layout(subscripts, x, values)[0])
        return weights.einsum(subscripts, x, self._scaled(values, x.dtype), dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        rows, scale = weights.take(ids, self.values), weights.take(ids // self.group, self.scale)
        return (rows.astype(jnp.float32) * scale.astype(jnp.float32)).astype(self.dtype)

    def dense(self) -> jax.Array:
        return self._scaled(self.values, self.dtype)

    def children(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        of_scale = (*spec.axes[: spec.leading], None, *spec.axes[spec.leading + self.inputs :])
        return {"values": spec, "scale": weights.part(spec, of_scale, None)}

    def flops(self) -> int:
        return weights.flops(self.values)

    def _scaled(self, values: jax.Array, dtype: Any) -> jax.Array:
        """values times the scale of each, rounded once, to `dtype`."""
        at = values.ndim - self.inputs - self.outputs
        sizes, explicit = values.shape[at : at + self.inputs], sharding.mesh_kind() is AxisType.Explicit
        spec = jax.typeof(self.scale).sharding.spec if explicit else None
        scale = jnp.repeat(self.scale.astype(jnp.float32), self.group, at, out_sharding=spec)
        scale = axes.split(jax.lax.slice_in_dim(scale, 0, math.prod(sizes), axis=at), at, sizes)
        scale = jax.reshard(scale, jax.typeof(values).sharding.spec) if explicit else scale
        return (values.astype(jnp.float32) * scale).astype(dtype)


@node
class Sum(weights.Weight):
    """W = the sum of `parts`, weights of any kind and of one shape; `rank` is how many they are.

    Ding et al. 2021, "RepVGG": branches while training, one matrix to serve.
    """

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parts[0].shape)

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @property
    def rank(self) -> int:
        return len(self.parts)

    def einsum(self, subscripts: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        return _total([weights.einsum(subscripts, x, part, dtype) for part in self.parts])

    def take(self, ids: jax.Array) -> jax.Array:
        return _total([weights.take(ids, part) for part in self.parts]).astype(self.dtype)

    def read_whole(self) -> tuple[Any, ...]:
        return tuple(part for each in self.parts for part in weights.read_whole(each))

    def dense(self) -> jax.Array:
        return _total([weights.dense(part) for part in self.parts]).astype(self.dtype)

    def children(self, spec: ParamSpec) -> dict[str, Any]:
        return {"parts": (spec,) * len(self.parts)}


@node
class OutputsFirst(weights.Weight):
    """W as it is, stored with its outputs before its inputs: `array` (copies..., outputs..., inputs...).

    What a CPU multiplies by few rows in half the time (`lmx.core.weights.weights_first`), and so what decoding makes of
    a model for its own use; `rank` is the number of output axes.
    """

    array: Any
    inputs: int = static(default=1)
    outputs: int = static(default=1)

    @classmethod
    def of(cls, w: jax.Array, inputs: int, outputs: int) -> OutputsFirst:
        """That of a plain array (copies..., inputs..., outputs...)."""
        first = w.ndim - inputs - outputs
        return cls(jnp.moveaxis(w, range(first, first + inputs), range(-inputs, 0)), inputs, outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._swapped(tuple(self.array.shape), self.outputs)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def rank(self) -> int:
        return self.outputs

    def einsum(self, subscripts: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        left, right, out = weights.parse(subscripts)
        right = "".join(self._swapped(tuple(right), self.inputs))
        return weights.einsum(f"{left},{right}->{out}", x, self.array, dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        return weights.take(ids, self.dense())

    def read_whole(self) -> tuple[Any, ...]:
        return (self.array,)

    def dense(self) -> jax.Array:
        return jnp.transpose(self.array, self._swapped(tuple(range(self.array.ndim)), self.outputs))

    def children(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        return {"array": weights.part(spec, self._swapped(spec.axes, self.inputs), self.outputs)}

    def _swapped(self, axes: tuple, first: int) -> tuple:
        """What is said of each axis, with the `first` ones after the copies behind the others."""
        n = len(axes) - self.inputs - self.outputs
        return (*axes[:n], *axes[n + first :], *axes[n : n + first])


def outputs_first(specs: Any, tree: Any) -> Any:
    """A tree with its plain float32 matrices, those within weights too, as `OutputsFirst`; all else as it is."""
    done = lambda x: isinstance(x, OutputsFirst)  # noqa: E731

    def turn(spec: ParamSpec, w: Any) -> Any:
        if done(w) or spec.inputs is None or w.dtype != jnp.float32:
            return w
        return OutputsFirst.of(w, spec.inputs, w.ndim - spec.leading - spec.inputs)

    return jax.tree.map(turn, specs, tree, is_leaf=done)


def _total(arrays: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, arrays)
