"""A checksum of every array of a checkpoint, the same however the array lies on devices and processes.

For an array with elements x_i (i is the row-major index modulo 2^32) let

    h_i = mix(word_i XOR mix(i + 0x9E3779B9))           word_i: the bits of x_i as uint32
    g_i = mix(h_i XOR 0x7F4A7C15)
    checksum = (sum of g_i, sum of h_i), both modulo 2^32, written as 16 hexadecimal digits

where mix is the finalizer of MurmurHash3 (Appleby 2011, public domain), a bijection of uint32. Elements of fewer bits
are padded with zeros; of an element of several words the words go in one after the other, low word first (real before
imaginary): h = mix(word XOR h). A bijection turns a changed word into a changed sum, so a change within any one element
of up to 32 bits is always seen; any other change stays unseen with probability 2^-64. Sums do not depend on the order,
hence not on sharding or the number of processes, and each device sums its own part: no array is copied or gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

INDEX_SEED, SECOND_SEED = np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15)


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The checksum of each array by its name: 16 hexadecimal digits.

    One small program for each distinct shape, dtype and sharding is compiled and kept. All processes that hold a part
    of an array must call this; each learns the checksum of the whole.

    arrays: jax or numpy arrays of bool, integer, float or complex dtypes of any width, random keys as their data.
    """
    sums = {}
    for name, array in arrays.items():
        sums[name] = _begin(array)  # all are under way before one is awaited, but for those split over devices:
        if isinstance(array, jax.Array) and len(array.sharding.device_set) > 1:
            jax.block_until_ready(sums[name])  # on CPUs the collectives of two programs at once wait for each other
    return {name: f"{int(np.asarray(g)):08x}{int(np.asarray(h)):08x}" for name, (h, g) in sums.items()}


def _begin(array: Any) -> tuple[jax.Array, jax.Array]:
    """The two sums, not awaited; the same buffers are seen with Auto axes, so that no operation asks for a sharding."""
    if not (isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding)):
        return _sums(array)
    mesh, spec, memory = array.sharding.mesh, array.sharding.spec, array.sharding.memory_kind
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    parts = [shard.data for shard in array.addressable_shards]
    place = NamedSharding(auto, spec, memory_kind=memory)
    with jax.set_mesh(auto):
        return _sums(jax.make_array_from_single_device_arrays(array.shape, place, parts, dtype=array.dtype))


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two sums (h, g), () uint32 each. One reduction of both at once runs several times as fast as two on a CPU."""
    h = _mix(_index(x.shape) + INDEX_SEED)
    for word in _words(x):
        h = _mix(word ^ h)
    zero = np.uint32(0)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    return lax.reduce((h, _mix(h ^ SECOND_SEED)), (zero, zero), add, tuple(range(x.ndim)))


def _index(shape: tuple[int, ...]) -> jax.Array:
    """The row-major index of every element modulo 2^32."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _words(x: jax.Array) -> list[jax.Array]:
    """The bits of each element as arrays of uint32 of the shape of `x`."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return [*_words(jnp.real(x)), *_words(jnp.imag(x))]
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    info = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    bits = info(x.dtype).bits
    if bits == 64:
        pair = lax.bitcast_convert_type(x, jnp.uint32)
        return [pair[..., 0], pair[..., 1]]
    return [lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)]


def _mix(h: jax.Array) -> jax.Array:
    h ^= h >> 16
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> 13
    h *= np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
