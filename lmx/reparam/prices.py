"""What a matrix costs at a rank, in the unit that a budget is stated in: `numbers`, `flops`, `nbytes`, `seconds`.

Each makes a price: a function of a matrix's shape (m, n) and its rank, dense where that is None. Numbers and FLOPs fall
in step. Seconds do not: two thin products can take longer than one whole, and then the whole one is kept.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import weights
from lmx.core.errors import ConfigError, nearest
from lmx.core.kinds import LowRank, Pivoted
from lmx.reparam.allocate import Price
from lmx.reparam.decompose import check_form, stored

UNITS = ("numbers", "flops", "bytes", "seconds")


def price_of(unit: str, form: str, *, dtype: Any = "float32", rows: int = 64) -> Price:
    """The price in a unit of `UNITS`, of weights of a dtype; seconds are measured for products of so many rows.

    Raises ConfigError for a unit or a form that there is not.
    """
    if unit not in UNITS:
        raise ConfigError(f"no unit {unit!r}, there are {', '.join(UNITS)}{nearest(unit, UNITS)}")
    check_form(form)
    if unit == "numbers":
        return numbers(form)
    if unit == "flops":
        return lambda shape, rank: 2.0 * stored(shape, rank, form)
    return nbytes(form, dtype) if unit == "bytes" else seconds(form, dtype, rows)


def numbers(form: str) -> Price:
    """Stored numbers."""
    return lambda shape, rank: float(stored(shape, rank, form))


def nbytes(form: str, dtype: Any = "float32") -> Price:
    """Bytes, those of a pivoted weight's order with them."""
    size = jnp.dtype(dtype).itemsize

    def price(shape: tuple[int, int], rank: int | None) -> float:
        order = 4 * shape[0] if form == "pivoted" and rank is not None else 0
        return float(size * stored(shape, rank, form) + order)

    return price


def seconds(form: str, dtype: Any = "float32", rows: int = 64, repeats: int = 5) -> Price:
    """Seconds to multiply (rows, m) by the weight on jax's default device, the median of some repeats; each shape and
    rank is measured once."""
    known: dict[tuple, float] = {}

    def price(shape: tuple[int, int], rank: int | None) -> float:
        at = (shape, rank)
        if at not in known:
            known[at] = _measured(_weight(shape, rank, form, dtype), rows, repeats)
        return known[at]

    return price


def _weight(shape: tuple[int, int], rank: int | None, form: str, dtype: Any) -> Any:
    m, n = shape
    if rank is None or form == "dense" or form == "pivoted" and rank >= m:
        return jnp.ones(shape, dtype)
    if form == "pivoted":
        return Pivoted(
            jnp.ones((m - rank, rank), dtype), jnp.ones((rank, n), dtype), jnp.arange(m, dtype=jnp.int32), (m,)
        )
    return LowRank(jnp.ones((m, rank), dtype), jnp.ones((rank, n), dtype))


_product = jax.jit(lambda x, w: weights.einsum("bd,df->bf", x, w))


def _measured(w: Any, rows: int, repeats: int) -> float:
    x = jnp.ones((rows, w.shape[0]), w.dtype)
    _product(x, w).block_until_ready()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        _product(x, w).block_until_ready()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
