"""From host memory to devices: rows of a batch become arrays on the mesh in force."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import sharding


def part_of_process(batch_size: int) -> tuple[int, int]:
    """(index, count): the smallest of `count` equal parts of a batch that has all rows of this process's devices.

    Processes whose devices hold the same rows (split by "tensor", say) have the same part; it is (0, 1), the whole
    batch, with one process.
    """
    mesh = sharding.concrete_mesh()
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    place = sharding.named_sharding(("batch",), (batch_size,), mesh)
    rows = [index[0].indices(batch_size) for index in place.addressable_devices_indices_map((batch_size,)).values()]
    first, last = min(row[0] for row in rows), max(row[1] for row in rows) - 1
    sizes = (size for size in range(1, batch_size + 1) if batch_size % size == 0 and first // size == last // size)
    size = next(sizes)
    return first // size, batch_size // size


def place_batch(batch: dict[str, np.ndarray], index: int = 0, count: int = 1) -> dict[str, Any]:
    """Arrays (b, ...), rows split as the rules say for "batch", from the index-th of `count` equal parts of the rows.

    With several processes each gives a part that has the rows of its own devices (`part_of_process`), or all rows.
    Raises nothing of its own; rows that do not divide over the mesh are kept whole on every device.
    """
    mesh = sharding.concrete_mesh()
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    def one(x: np.ndarray) -> jax.Array:
        size, first = x.shape[0] * count, x.shape[0] * index
        place = sharding.named_sharding(("batch", *[None] * (x.ndim - 1)), (size, *x.shape[1:]), mesh)

        def rows(where: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = where[0].indices(size)
            return x[begin - first : end - first]

        if jax.process_count() == 1:
            return jax.device_put(x, place)
        return jax.make_array_from_callback((size, *x.shape[1:]), place, rows)

    return jax.tree.map(one, batch)
