"""A model's tree as JSON and back: its nodes, their static values, and the names of its arrays.

    {"node": "LowRank",
     "fields": {"left": {"array": {"name": "params.up.left", "shape": [4, 2], "dtype": "float32"}}, ...},
     "static": {"inputs": 1}}

Containers are `{"tuple": [...]}`, `{"list": [...]}`, `{"dict": {...}}` and `null` (None). Only registered
classes are ever built, by their own constructor: nothing in a folder can name code to run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import kinds  # noqa: F401  (registers the kinds of weight)
from lmx.core.arrays import storable
from lmx.core.errors import FolderError, LmxError, nearest
from lmx.core.nodes import REGISTRY, node_class

ROOT = "array"  # the name of the only array of a tree that is itself an array


def describe(tree: Any) -> tuple[Any, dict[str, Any]]:
    """The JSON description of a tree and its arrays by name.

    Returns:
      (description, {name: array}); a name is the path of the array, such as `params.layers.0.up`.

    Raises:
      FolderError: a part that a folder cannot hold, named by its path.
    """
    arrays: dict[str, Any] = {}
    return _describe(tree, (), arrays), arrays


def rebuild(description: Any, leaf: Callable[[str, tuple[int, ...], np.dtype], Any]) -> Any:
    """The tree of a description, with `leaf(name, shape, dtype)` in the place of every array.

    Raises:
      FolderError: an unknown node class or field, a missing field, or a description that makes no sense.
    """
    if description is None:
        return None
    if not isinstance(description, dict):
        raise FolderError(f"structure.json is damaged: {description!r} describes no part of a model")
    match description:
        case {"array": {"name": name, "shape": shape, "dtype": dtype}}:
            return leaf(name, tuple(shape), jnp.dtype(dtype))
        case {"tuple": items}:
            return tuple(rebuild(item, leaf) for item in items)
        case {"list": items}:
            return [rebuild(item, leaf) for item in items]
        case {"dict": items}:
            return {key: rebuild(item, leaf) for key, item in items.items()}
        case {"node": kind, "fields": fields, "static": static}:
            return _rebuild_node(
                kind,
                {name: rebuild(item, leaf) for name, item in fields.items()}
                | {name: _decode(value) for name, value in static.items()},
            )
    raise FolderError(f"structure.json is damaged: no part has the keys {sorted(description)}")


def shapes(description: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of every array of a description. Raises FolderError if it makes no sense."""
    found: dict[str, jax.ShapeDtypeStruct] = {}

    def note(name: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
        found[name] = jax.ShapeDtypeStruct(shape, dtype)
        return found[name]

    try:
        rebuild(description, note)
    except LmxError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise FolderError(f"structure.json is damaged: {error}") from error
    return found


def _describe(tree: Any, path: tuple[str, ...], arrays: dict[str, Any]) -> Any:
    if tree is None:
        return None
    if type(tree) in (tuple, list):
        items = [_describe(item, (*path, str(i)), arrays) for i, item in enumerate(tree)]
        return {type(tree).__name__: items}
    if type(tree) is dict:
        for key in tree:
            if not isinstance(key, str):
                raise FolderError(f"{_at(path)} is a dict with the key {key!r}; a folder holds only strings")
        return {"dict": {key: _describe(item, (*path, key), arrays) for key, item in tree.items()}}
    if REGISTRY.get(type(tree).__name__) is type(tree):
        return _describe_node(tree, path, arrays)
    if isinstance(tree, jax.Array | np.ndarray | np.generic):
        return _describe_array(tree, path, arrays)
    raise FolderError(
        f"{_at(path)} is a {type(tree).__name__}, which a folder cannot hold; it holds arrays, None, tuples, "
        "lists, dicts and classes made with lmx.core.nodes.node"
    )


def _describe_node(tree: Any, path: tuple[str, ...], arrays: dict[str, Any]) -> dict:
    fields, static = {}, {}
    for field in dataclasses.fields(tree):
        value, inner = getattr(tree, field.name), (*path, field.name)
        if field.metadata.get("pytree_node", True):
            fields[field.name] = _describe(value, inner, arrays)
        else:
            static[field.name] = _encode(value, inner)
    return {"node": type(tree).__name__, "fields": fields, "static": static}


def _describe_array(array: Any, path: tuple[str, ...], arrays: dict[str, Any]) -> dict:
    name = ".".join(path) or ROOT
    if not storable(array.dtype):
        raise FolderError(f"{_at(path)} is an array of dtype {array.dtype}, which safetensors cannot hold")
    if name in arrays:
        raise FolderError(f"two arrays would be named {name!r}; rename a dict key that contains a dot")
    arrays[name] = array
    return {"array": {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}}


def _encode(value: Any, path: tuple[str, ...]) -> Any:
    """A static value as JSON: scalars as they are, all else as an object with one telling key."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is tuple:
        return {"tuple": [_encode(item, path) for item in value]}
    kind = type(value).__name__
    if REGISTRY.get(kind) is type(value) and hasattr(value, "to_dict"):
        return {"kind": kind, "value": value.to_dict()}
    raise FolderError(
        f"the static value {_at(path)} is a {kind}; a folder holds str, int, float, bool, None, tuples of "
        "them, and registered classes with to_dict and from_dict"
    )


def _decode(value: Any) -> Any:
    match value:
        case {"float": text}:
            return float(text)
        case {"tuple": items}:
            return tuple(_decode(item) for item in items)
        case {"kind": kind, "value": fields}:
            return node_class(kind).from_dict(fields)
        case dict() | list():
            raise FolderError(f"structure.json is damaged: {value!r} is no static value")
    return value


def _rebuild_node(kind: str, values: dict[str, Any]) -> Any:
    cls = node_class(kind)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise FolderError(
                f"structure.json gives {kind} a field {name!r}, which is unknown here{nearest(name, known)}. "
                "A newer lmx may have written it."
            )
    needed = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in values]
    if missing:
        raise FolderError(f"structure.json is damaged: {kind} lacks {', '.join(missing)}")
    return cls(**values)


def _at(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the model"
