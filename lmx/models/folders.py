"""Model folders: `save(model, folder)` and `load(folder)` for any tree of nodes, without pickle or history.

A folder holds
  structure.json       the nodes of the model (lmx.models.structure), the version of the format, notes
  config.json          the config of a model whose root has a static field `config`
  model.safetensors    the arrays by path; large models have `model-00001-of-0000N.safetensors` and
                       `model.safetensors.index.json`
  tokenizer files      if a tokenizer was given

A folder is complete or absent (lmx.models.publishing).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from lmx.core import atomic
from lmx.core.arrays import open_arrays
from lmx.core.errors import FolderError
from lmx.models import structure
from lmx.models.filenames import CONFIG, INDEX, STRUCTURE
from lmx.models.publishing import local, publish, whole

VERSION = 1


def save(
    model: Any,
    folder: str | os.PathLike,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    notes: dict | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write a model to a folder.

    With several processes every process calls it; arrays are gathered one by one and process 0 writes.

    Args:
      model: a tree of nodes, tuples, lists, dicts, None and arrays.
      folder: a local path; it must not exist, or be empty, unless `overwrite`.
      tokenizer: anything with `save(folder)`; its files go into the same folder.
      overwrite: replace a model that is there, once the new one is complete: the files of lmx's and Hugging Face's
        format, a tokenizer's among them. What else is in the folder stays.
      notes: JSON data kept in structure.json, such as how the model was made.
      max_file_bytes: arrays are spread over several files of at most this size (a larger array has its own).

    Raises:
      FolderError: the folder is taken or cannot be written, or a part of the model cannot be held.
        What was there before is untouched then, and nothing half-written stays.
    """
    target = local(folder)
    description, arrays = structure.describe(model)
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))  # all aligned
    fetched = (whole(array) for array in arrays.values())
    publish(target, arrays, fetched, _texts(description, notes), tokenizer, overwrite, max_file_bytes)


def load(
    folder: str | os.PathLike,
    *,
    dtype: Any = None,
    shardings: Callable[[Any], Any] | None = None,
) -> Any:
    """Read a model from a folder, each array straight into its sharding and dtype.

    Args:
      folder: a folder that `save` wrote.
      dtype: cast the floating-point arrays to it while reading; None keeps what is stored.
      shardings: given the model with `jax.ShapeDtypeStruct` leaves, returns the same tree of shardings (None
        for a leaf or for all: the default device). Only the slices of this process's devices are read.

    Returns:
      The model, equal to the one saved: same nodes, static values and arrays.

    Raises:
      FolderError: not a folder of this format, damaged, incomplete, or written by a newer lmx.
    """
    path = local(folder)
    description = _read_structure(path)
    stored = _read_arrays(path)
    _compare(path, structure.shapes(description), stored)

    def abstract_leaf(name: str, shape: tuple[int, ...], stored_dtype: np.dtype) -> jax.ShapeDtypeStruct:
        castable = jnp.issubdtype(stored_dtype, jnp.floating) and stored_dtype.itemsize > 1  # not float8
        chosen = dtype if dtype is not None and castable else stored_dtype
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(chosen))

    abstract = structure.rebuild(description, abstract_leaf)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = None if shardings is None else shardings(abstract)
    chosen = [None] * len(leaves) if wanted is None else treedef.flatten_up_to(wanted)
    arrays = {}
    for (keys, leaf), sharding in zip(leaves, chosen, strict=True):
        name = jax.tree_util.keystr(keys, simple=True, separator=".") or structure.ROOT
        arrays[name] = _place(stored[name], leaf.dtype, sharding)
    return structure.rebuild(description, lambda name, *_: arrays[name])


def load_shapes(folder: str | os.PathLike) -> Any:
    """The model in a folder with a `jax.ShapeDtypeStruct` for every array; none is read. Raises FolderError."""
    leaf = lambda name, shape, dtype: jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))  # noqa: E731
    return structure.rebuild(_read_structure(local(folder)), leaf)


def _texts(description: Any, notes: dict | None) -> dict[str, str]:
    """The JSON files of a model; the root's config moves to a file of its own."""
    texts, config = {}, _root_static(description).get("config")
    if isinstance(config, dict) and "kind" in config:
        texts[CONFIG] = json.dumps(config["value"], indent=2) + "\n"
        moved = {"kind": config["kind"], "file": CONFIG}
        description = description | {"static": description["static"] | {"config": moved}}
    about = {"format": "lmx", "version": VERSION, "lmx": _lmx_version()} | ({"notes": notes} if notes else {})
    texts[STRUCTURE] = json.dumps(about | {"tree": description}, indent=1) + "\n"
    return texts


def _root_static(description: Any) -> dict[str, Any]:
    return description.get("static", {}) if isinstance(description, dict) else {}


def _lmx_version() -> str:
    try:
        return importlib.metadata.version("lmx")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


def _read_structure(path: Path) -> Any:
    """The description of the tree, with the config put back. Raises FolderError if there is none."""
    if not path.is_dir():
        aside = atomic.moved_aside(path)
        hint = f"; {aside} is what an interrupted save was replacing: rename it back" if aside else ""
        raise FolderError(f"{path} is {'a file, not a folder' if path.exists() else 'not there'}{hint}")
    if not (path / STRUCTURE).exists():
        raise FolderError(f"{path} is not a model folder of lmx: it has no {STRUCTURE}; {_instead(path)}")
    about = _read_json(path / STRUCTURE)
    if not isinstance(about, dict) or about.get("format") != "lmx" or "tree" not in about:
        raise FolderError(f"{path / STRUCTURE} was not written by lmx")
    if about.get("version", 0) > VERSION:
        raise FolderError(
            f"{path} has version {about['version']} of the format (written by lmx {about.get('lmx')}); "
            f"this lmx reads up to {VERSION}: install a newer one"
        )
    description = about["tree"]
    static = _root_static(description)
    config = static.get("config")
    if isinstance(config, dict) and "file" in config:
        static["config"] = {"kind": config["kind"], "value": _read_json(path / CONFIG)}
    return description


def _instead(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if CONFIG in names and "model_type" in _read_json(path / CONFIG):
        return "it is in Hugging Face's format: `lmx.load` reads it, and `lmx convert` makes it one of lmx"
    return f"it has {', '.join(names[:10]) + (', ...' if names[10:] else '') if names else 'no files'}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{path} is missing") from error
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not (path / INDEX).exists():
        return open_arrays(path / "model.safetensors")
    try:
        files = sorted(set(_read_json(path / INDEX)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path / INDEX} is damaged: it has no weight_map") from error
    stored = {}
    for file in files:
        stored |= open_arrays(path / file)
    return stored


def _compare(path: Path, expected: dict[str, jax.ShapeDtypeStruct], stored: dict[str, np.ndarray]) -> None:
    """Raise FolderError unless the files hold exactly the arrays that structure.json names."""
    lost, extra = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    for names, what in ((lost, "lack"), (extra, "also hold")):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise FolderError(f"the safetensors of {path} do not fit its {STRUCTURE}: they {what} {shown}")
    for name, want in expected.items():
        have = stored[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            raise FolderError(
                f"{name} in {path} has shape {have.shape} and dtype {have.dtype}, "
                f"its {STRUCTURE} says {want.shape} and {want.dtype}"
            )


def _place(stored: np.ndarray, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """An array on its devices; slices are copied out of the map, for jax may keep the memory it is given."""
    if sharding is None:
        return jax.device_put(np.array(stored, dtype))
    slices: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in slices:
            slices[str(index)] = np.array(stored[index], dtype)
        return slices[str(index)]

    return jax.make_array_from_callback(stored.shape, sharding, read)
