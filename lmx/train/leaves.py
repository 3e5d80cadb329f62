"""The leaves of a state on their way into a checkpoint and out of it: names, descriptions, what orbax is given."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lmx.core.errors import ConfigError


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path. Raises ConfigError if two have the same."""
    leaves = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(keys, simple=True, separator=".") or "state"
        if name in leaves:
            raise ConfigError(
                f"two leaves of the state have the path {name}; rename a dict key that contains a dot"
            )
        leaves[name] = (
            leaf if hasattr(leaf, "dtype") or not isinstance(leaf, int | float) else jnp.asarray(leaf)
        )
    return leaves


def describe(leaf: Any) -> list:
    """[shape, name of the dtype] of a leaf, as JSON. Raises ConfigError for what is no array or number."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise ConfigError(f"a checkpoint holds arrays and numbers, not a {type(leaf).__name__}: {leaf!r}")
    dtype = leaf.dtype if is_key(leaf) else jax.dtypes.canonicalize_dtype(leaf.dtype)
    return [list(leaf.shape), str(dtype)]


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_parts(leaf: Any) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The generator of a (possibly abstract) key array, and the shape of its data."""
    found = []

    def data(key: jax.Array) -> jax.Array:
        found.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    shape = jax.eval_shape(data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return found[0], shape


def storable(leaf: Any) -> Any:
    """What is written for a leaf: keys as their data, host arrays copied, as the caller may change them."""
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if not isinstance(leaf, jax.Array):
        return np.array(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))  # a copy: the caller may change it
    # Orbax refuses an array that only one of several processes holds; as numpy it is written by process 0.
    return np.asarray(leaf) if jax.process_count() > 1 and leaf.is_fully_addressable else leaf


def target(leaf: Any) -> Any:
    """What orbax restores a leaf into: its sharding, or plain numpy where it has none."""
    data = _key_parts(leaf)[1] if is_key(leaf) else leaf
    dtype = jax.dtypes.canonicalize_dtype(data.dtype)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or (isinstance(leaf, jax.Array) and not leaf.committed):
        return np.empty(data.shape, dtype)
    if is_key(leaf) and isinstance(
        sharding, NamedSharding
    ):  # the data have one axis more, which is not split
        sharding = NamedSharding(sharding.mesh, sharding.spec)
    return jax.ShapeDtypeStruct(data.shape, dtype, sharding=sharding)


def finish(array: Any, leaf: Any) -> jax.Array:
    """A leaf from what orbax read (None for one without elements)."""
    if array is None:
        return jnp.zeros(leaf.shape, leaf.dtype, device=getattr(leaf, "sharding", None))
    array = jnp.asarray(array)
    return jax.random.wrap_key_data(array, impl=_key_parts(leaf)[0]) if is_key(leaf) else array


def compare(path: Any, saved: dict[str, list], wanted: dict[str, list]) -> None:
    """Raise ConfigError, naming the paths, if what was saved is not what is wanted."""
    lost, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    differ = [
        f"{name} (saved {tuple(saved[name][0])} {saved[name][1]}, asked for {tuple(want[0])} {want[1]})"
        for name, want in wanted.items()
        if name in saved and saved[name] != want
    ]
    parts = (("it lacks", lost), ("it also holds", extra), ("these differ:", differ))
    said = [f"{what} {', '.join(names[:5])}{', ...' if names[5:] else ''}" for what, names in parts if names]
    if said:
        raise ConfigError(
            f"{path} holds another state than the one asked for: {'; '.join(said)}. "
            "Was it written with another model, optimizer or pattern of what is trained?"
        )


def json_size(data: Any) -> int:
    """The bytes of some data as JSON. Raises ConfigError if they are none."""
    try:
        return len(json.dumps(data))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"extra must be JSON data: {error}") from error
