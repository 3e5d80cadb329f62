"""Forms of a weight: the same matrix stored otherwise, on the host and in float64.

A low-rank weight a b holds r (m + n) numbers, of which r^2 say nothing, for a m and m^-1 b are the same weight;
`pivot` stores the r (m + n - r) others. `quantize` rounds to int8.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lmx.core import specs, tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank, Pivoted, Quantized

STEPS = 127  # of int8 on each side of zero


def pivot(w: LowRank) -> Pivoted:
    """The low-rank weight in the form that stores r (m + n - r) numbers; exact up to rounding.

    Rows of the factor a become pivots by QR with column pivoting of its transpose (Zhao et al. 2025, "Pivoting
    Factorization", algorithm 1), which keeps the combinations of the other rows small. A factor of lower rank than it
    has columns is no harm. Copies are done one by one; factors of any kind are written out.

    Raises ConfigError for another kind of weight, r >= m, or numbers that are not finite.
    """
    return jax.device_put(pivoted(w))


def pivoted(w: LowRank) -> Pivoted:
    """As `pivot`, in arrays of numpy."""
    if not isinstance(w, LowRank):
        raise ConfigError(f"pivot takes a LowRank weight, not a {type(w).__name__}; factorize it first")
    a, b = _float64(weights.dense(w.a), "a LowRank weight"), _float64(weights.dense(w.b), "a LowRank weight")
    n, r = w.copies, w.rank
    copies, inputs = w.shape[:n], w.shape[n : n + w.inputs]
    m = math.prod(inputs)
    if r >= m:
        raise ConfigError(
            f"a weight of {m} inputs and rank {r} has no pivoted form: its rank must be below the number of its inputs"
        )
    outs = b[(0,) * (n + 1)].size
    parts = [_pivot(*factors) for factors in zip(a.reshape(-1, m, r), b.reshape(-1, r, outs), strict=True)]
    rest, pivots, order = (np.stack(each) for each in zip(*parts, strict=True))
    return Pivoted(
        rest=rest.reshape(*copies, m - r, r).astype(w.a.dtype),
        b=pivots.reshape(b.shape).astype(w.b.dtype),
        order=order.reshape(*copies, m).astype(np.int32),
        inputs=inputs,
    )


def _pivot(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C (m - r, r), the rows (r, n) of a b that are pivots, the order (m,)) of a (m, r) and b (r, n)."""
    m, r = a.shape
    triangle, order = scipy.linalg.qr(a.T, mode="r", pivoting=True)  # a.T[:, order] = q triangle
    size = np.abs(np.diag(triangle))
    rank = int((size > size[0] * m * np.finfo(np.float64).eps).sum())
    rest = np.zeros((m - r, r))
    rest[:, :rank] = scipy.linalg.solve_triangular(triangle[:rank, :rank], triangle[:rank, r:]).T
    return rest, a[order[:r]] @ b, order


def quantize(w: Any, group: int = 64, *, inputs: int = 1, copies: int = 0) -> Quantized:
    """An array (copies..., inputs..., outputs...) in int8, rounded to the nearest: |w - q| <= scale / 2.

    group: how many successive inputs, flattened, share a scale for each output (the last group may be smaller); scale
    is the largest of them over 127. inputs, copies: how many axes are such.
    Raises ConfigError for what is no floating-point array, axes that do not add up, or numbers that are not finite.
    """
    return jax.device_put(_rounded(w, group, inputs, copies))


def _rounded(w: Any, group: int, inputs: int, copies: int) -> Quantized:
    """As `quantize`, in arrays of numpy."""
    if weights.is_weight(w) or not jnp.issubdtype(w.dtype, jnp.floating):
        what = type(w).__name__ if weights.is_weight(w) else f"{w.dtype} array"
        raise ConfigError(f"quantize takes a floating-point array, not a {what}; quantize_model takes models")
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise ConfigError(f"group must be a positive whole number of inputs, such as 64, not {group!r}")
    if inputs < 1 or copies < 0 or copies + inputs > w.ndim:
        raise ConfigError(f"{copies} copies and {inputs} inputs (at least 1) are not axes of an array {tuple(w.shape)}")
    numbers, shape = _float64(w, "an array to be quantized"), tuple(w.shape)
    sizes, outs = shape[:copies], shape[copies + inputs :]
    m = math.prod(shape[copies : copies + inputs])
    group = min(group, m)
    rows = numbers.reshape(*sizes, m, *outs)
    largest = np.maximum.reduceat(np.abs(rows), range(0, m, group), axis=copies)
    scale = np.maximum(largest / STEPS, jnp.finfo(w.dtype).smallest_normal).astype(w.dtype)  # as it is stored
    steps = np.rint(rows / np.repeat(scale.astype(np.float64), group, axis=copies).take(range(m), axis=copies))
    values = np.clip(steps, -STEPS, STEPS).astype(np.int8).reshape(shape)
    return Quantized(values, scale, group, inputs, len(outs))


def quantize_model(model: Any, pattern: str = ".", group: int = 64) -> Any:
    """The model (any tree that states its specs) with the selected matrices in int8, laid out on the mesh in force.

    pattern: a path pattern over weights; stacks that it cuts are split. Of a low-rank or pivoted weight the factors are
    quantized, of LoRA its base; biases, norms and what is int8 already stay.
    Raises ConfigError if the pattern selects no matrix of floating-point numbers, and as `quantize`.
    """
    model = tree.split(model, pattern, weights.is_weight)
    told = jax.tree.leaves(specs.of(model), is_leaf=weights.is_weight)
    found = tree.matches(model, pattern, weights.is_weight)
    leaves = [_quantized(w, spec, group) if hit.all() else w for (_, w, hit), spec in zip(found, told, strict=True)]
    if all(new is w for new, (_, w, _) in zip(leaves, found, strict=True)):
        raise ConfigError(f"path pattern {pattern!r} selects no matrix of floating-point numbers to quantize")
    return specs.lay_out(jax.tree.unflatten(jax.tree.structure(model, is_leaf=weights.is_weight), leaves))


def _quantized(w: Any, spec: Any, group: int) -> Any:
    if isinstance(w, Quantized):
        return w
    if isinstance(w, LoRA):
        return w.replace(base=_quantized(w.base, spec.base, group))
    if weights.is_weight(w):
        names = [field.name for field in dataclasses.fields(w) if field.metadata.get("pytree_node", True)]
        return w.replace(**{name: _quantized(getattr(w, name), getattr(spec, name), group) for name in names})
    if spec.inputs is None or not jnp.issubdtype(w.dtype, jnp.floating):
        return w
    return _rounded(w, group, spec.inputs, spec.leading)


def _float64(x: jax.Array, what: str) -> np.ndarray:
    numbers = np.asarray(x).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ConfigError(f"{what} {tuple(x.shape)} has numbers that are not finite; mend the model before surgery")
    return numbers
