"""Checksums of arrays: the written formula in numpy, every flipped bit, and the same on every mesh and sharding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.train.checksums import checksums

DTYPES = ("bool int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 complex64 float8_e4m3fn int4").split()


def mix(h: np.ndarray) -> np.ndarray:
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def by_hand(array: np.ndarray) -> str:
    """The formula of the docstring over the bytes of the array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    raw = flat.view(np.uint8).reshape(flat.size, -1)
    if array.dtype == jnp.int4:
        raw = raw & 15
    padded = np.zeros((flat.size, max(4, raw.shape[1])), np.uint8)
    padded[:, : raw.shape[1]] = raw
    words = padded.view("<u4")
    h = mix(np.arange(flat.size, dtype=np.uint32) + np.uint32(0x9E3779B9))
    for column in words.T:
        h = mix(column ^ h)
    g = mix(h ^ np.uint32(0x7F4A7C15))
    return f"{g.sum(dtype=np.uint32):08x}{h.sum(dtype=np.uint32):08x}"


def values(dtype: str, shape=(6, 10)) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 3).astype(jnp.dtype(dtype))


def of(array) -> str:
    return checksums({"x": array})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_written_formula(dtype):
    array = values(dtype)
    assert of(array) == of(jnp.asarray(array)) == by_hand(array)


def test_wide_elements_scalars_and_keys():
    with jax.enable_x64(True):
        for dtype in ("int64", "float64", "complex128"):
            assert of(values(dtype)) == by_hand(values(dtype))
    assert of(jnp.float32(3)) == by_hand(np.float32(3))
    data = jax.random.key_data(jax.random.split(jax.random.key(0), 5))
    assert of(data) == by_hand(np.asarray(data))


def test_every_flipped_bit_and_every_exchange_changes_both_sums():
    array = values("float32", (4, 5))
    right = of(array)
    for bit in range(array.nbytes * 8):
        wrong = array.copy()
        wrong.view(np.uint8).reshape(-1)[bit // 8] ^= np.uint8(1 << bit % 8)
        assert of(wrong)[:8] != right[:8] and of(wrong)[8:] != right[8:]
    assert len({of(array[::-1]), of(array[:, ::-1]), of(array.reshape(5, 4).T.reshape(4, 5)), right}) == 4


def test_the_same_on_every_mesh_and_sharding(mesh):
    for dtype in ("float32", "bfloat16"):
        array, names = values(dtype, (8, 16)), mesh.axis_names
        for spec in (P(), P(names[0]), P(None, names[-1]), P(names), P(None, names)):
            assert of(jax.device_put(array, NamedSharding(mesh, spec))) == by_hand(array), spec
        assert of(array) == by_hand(array)
