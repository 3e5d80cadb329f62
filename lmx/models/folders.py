"""Model folders: `save(model, folder)` and `load(folder)` for any tree of nodes, without pickle or history.

A folder holds
  structure.json       the nodes of the model (lmx.models.structure), the version of the format, notes
  config.json          the config of a model whose root has a static field `config`
  model.safetensors    the arrays by path; large models have `model-00001-of-0000N.safetensors` and
                       `model.safetensors.index.json`
  tokenizer files      if a tokenizer was given

A folder is complete or absent (lmx.core.atomic).
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from lmx.core import atomic
from lmx.core.arrays import nbytes, open_arrays, write_arrays
from lmx.core.errors import FolderError
from lmx.models import structure

VERSION = 1
# The endings of the files of models and tokenizers in Hugging Face's format.
OF_A_MODEL = (".json", ".safetensors", ".jinja", ".txt", ".model", ".spm", ".md")
STRUCTURE, CONFIG, INDEX = "structure.json", "config.json", "model.safetensors.index.json"


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
      overwrite: replace a model folder that is there, everything in it, once the new one is complete.
      notes: JSON data kept in structure.json, such as how the model was made.
      max_file_bytes: arrays are spread over several files of at most this size (a larger array has its own).

    Raises:
      FolderError: the folder is taken or cannot be written, or a part of the model cannot be held.
        What was there before is untouched then, and nothing half-written stays.
    """
    target = _local(folder)
    description, arrays = structure.describe(model)
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))  # all aligned
    fetched = (whole(array) for array in arrays.values())
    publish(target, arrays, fetched, _texts(description, notes), tokenizer, overwrite, max_file_bytes)


def publish(
    folder: str | os.PathLike,
    arrays: dict[str, Any],
    fetched: Iterator[np.ndarray],
    texts: dict[str, str],
    tokenizer: Any,
    overwrite: bool,
    max_file_bytes: int,
    names: tuple[str, str] = ("model", CONFIG),
) -> None:
    """Write a folder of arrays and texts that is complete or absent; every process calls it, process 0 writes.

    arrays: name -> shape and dtype; fetched: their values, one by one in that order, taken by every process; texts:
    file name -> what it says; names: of the files of arrays, without their ending, and of the text beside them by which
    a folder of this kind is known when it is to be replaced. The rest, and what is raised, as in `save`.
    """
    target = _local(folder)
    leader, error = jax.process_index() == 0, None
    scratch = None
    try:
        if leader:
            _check_target(target, overwrite, *names)
            scratch = atomic.make_scratch(target)
    except Exception as caught:
        error = caught
    _agree(error, target)
    try:
        if leader:
            _write_arrays(scratch, arrays, fetched, max_file_bytes, names[0])
            for name, text in texts.items():
                (scratch / name).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(scratch)
            atomic.put(scratch, target)
    except Exception as caught:
        error = caught
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    if jax.process_count() > 1:  # followers, and a leader that failed, still take part in every gather
        collections.deque(fetched, maxlen=0)
    _agree(error, target)


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
    path = _local(folder)
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
    return structure.rebuild(_read_structure(_local(folder)), leaf)


def _local(folder: str | os.PathLike) -> Path:
    if "://" in os.fspath(folder):
        raise FolderError(f"{os.fspath(folder)} is no local path; save and load locally, and copy the folder")
    return Path(folder).expanduser().resolve()


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


def _check_target(target: Path, overwrite: bool, stem: str, about: str) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FolderError(f"{target} is a file; a model needs a folder")
    if not overwrite:
        raise FolderError(
            f"{target} exists; choose another folder, or replace it by overwrite=True (--overwrite)"
        )
    weights = any((target / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json"))
    if not (target / STRUCTURE).exists() and not (weights and (target / about).exists()):
        raise FolderError(
            f"{target} holds no model of lmx (no {STRUCTURE}) nor of Hugging Face, so it is not overwritten; remove it "
            "by hand"
        )
    strange = sorted(entry.name for entry in target.iterdir() if entry.is_dir() or entry.suffix not in OF_A_MODEL)
    if strange and not (target / STRUCTURE).exists():
        raise FolderError(
            f"{target} also holds {', '.join(strange[:5])}, which replacing the model would remove: move that away, "
            "or choose another folder"
        )


def _agree(error: Exception | None, target: Path) -> None:
    """Raise the leader's error in every process, so that none waits for the others."""
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if isinstance(error, OSError) and not isinstance(error, FolderError):
        raise FolderError(f"could not write {target}: {error}; nothing half-written was left") from error
    if error is not None:
        raise error
    if failed:
        raise FolderError(f"process 0 could not save {target}; its message says why")


def whole(array: Any) -> np.ndarray:
    """All values of an array in the memory of this process (a collective for arrays of several processes)."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _write_arrays(folder: Path, arrays: dict, fetched: Iterator[np.ndarray], max_bytes: int, stem: str) -> None:
    files, room = [{}], max_bytes
    for name, array in arrays.items():
        if files[-1] and nbytes(array) > room:
            files, room = [*files, {}], max_bytes
        files[-1][name] = array
        room -= nbytes(array)
    index = {}
    for i, part in enumerate(files, start=1):
        file = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{i:05d}-of-{len(files):05d}.safetensors"
        index |= dict.fromkeys(part, file)
        write_arrays(folder / file, part, lambda _: next(fetched))
    if len(files) > 1:
        total = sum(nbytes(array) for array in arrays.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / f"{stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


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
