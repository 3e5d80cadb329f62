"""Models out of checkpoints: what travels with the weights, and opening them without the run that saved them.

    checkpoints.save(step, state, {"model": travelling(state.model, tokenizer), ...})     # a lmx.train.TrainState
    model, tokenizer = open_checkpoint("run/checkpoints")          # or run/checkpoints/200

A checkpoint is opened straight into the mesh in force; of the state only the arrays of the model are read, not those of
the optimizer. Where the run kept a moving average of the trained arrays, that is the model. Frozen arrays are stored in
every checkpoint like the others, so that each of them is whole by itself.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx import data
from lmx.core import specs
from lmx.core.errors import FolderError
from lmx.models import generation, structure, transformer  # noqa: F401  (registers the nodes of models)
from lmx.models.filenames import CONFIG, TOKENIZER_TEXTS
from lmx.train import leaves, steps, verified
from lmx.train.checkpoints import open_path
from lmx.train.verified import Damaged

MODEL = "model"  # the key in a checkpoint's extra data


@dataclass(frozen=True)
class StoredFiles:
    """A tokenizer's files as a checkpoint holds them, the chat template among them: what `lmx.save` takes."""

    texts: Mapping[str, str]  # by name

    @property
    def names(self) -> list[str]:
        return list(self.texts)

    def save(self, folder: str | Path) -> None:
        """Write them."""
        for name, text in self.texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")


def travelling(model: Any, tokenizer: Any, notes: dict | None = None) -> dict[str, Any]:
    """What goes into a checkpoint's extra data under "model": structure (and in it the config), tokenizer and notes.

    model: the whole model as the state has it (`state.model`), with arrays or `jax.ShapeDtypeStruct`s.
    tokenizer: anything with `save(folder)`, or None. Of its files those of `TOKENIZER_TEXTS` travel: others only repeat
    its tokenizer.json.
    """
    stand_in = lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # noqa: E731
    made: dict[str, Any] = {"structure": structure.describe(jax.tree.map(stand_in, model))[0], "notes": notes or {}}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory(prefix="lmx-tokenizer-") as folder:
            tokenizer.save(folder)
            files = [path for path in sorted(Path(folder).iterdir()) if path.name in TOKENIZER_TEXTS]
            made["tokenizer"] = {path.name: path.read_text(encoding="utf-8") for path in files}
    return made


def found_in(name: str) -> list[Any]:
    """The checkpoints that a user may mean by a folder: itself, or all that it holds, the newest first."""
    path = open_path(name)
    if path.name.removesuffix(steps.REPLACED).isdigit() and steps.is_complete(path):
        return [path]
    return list(reversed(steps.find(path).values()))


def open_checkpoint(name: str, *, dtype: Any = None) -> tuple[Any, data.Tokenizer | None]:
    """(model, tokenizer or None) of a checkpoint, or of the newest sound one of a folder of them.

    dtype: cast the floating-point arrays to it. Nothing is moved or removed, for the run may be going on.
    Raises FolderError if there is none, all are damaged, or no model travelled with it.
    """
    return _first_sound(name, lambda path: (_read(path, dtype), load_tokenizer(path)))


def open_shapes(name: str) -> Any:
    """The model with `jax.ShapeDtypeStruct` leaves, sharded where a mesh is in force. Raises as `open_checkpoint`."""
    return _first_sound(name, lambda path: _shapes(travelled(path)["structure"]))


def open_tokenizer(name: str) -> data.Tokenizer | None:
    """The tokenizer that travelled with a checkpoint. Raises as `open_checkpoint`."""
    return _first_sound(name, load_tokenizer)


def open_tokenizer_files(name: str) -> StoredFiles | None:
    """The same as files, the chat template with it where there is one. Raises as `open_checkpoint`."""
    return _first_sound(name, _stored_files)


def open_notes(name: str) -> dict[str, Any]:
    """The notes that travelled with a checkpoint. Raises as `open_checkpoint`."""
    return _first_sound(name, lambda path: travelled(path)["notes"])


def at_tokenizer(name: str, read: Callable[[Path], Any]) -> Any:
    """What `read` gives of a folder with the tokenizer's files of a checkpoint, and the config.json that its model came
    with; it is empty where nothing travelled. Raises as `open_checkpoint`, and what `read` does."""
    return _first_sound(name, lambda path: _at_tokenizer(path, read))


def travelled(path: Any) -> dict[str, Any]:
    """What `travelling` gave to a checkpoint. Raises Damaged, or FolderError if nothing did."""
    found = verified.about(path)["extra"].get(MODEL)
    if found is None:
        raise FolderError(f"{path} has no model with it that can be opened alone; go on with the run that saved it")
    return found


def load_tokenizer(path: Any) -> data.Tokenizer | None:
    """The tokenizer of one checkpoint."""
    return None if _stored_files(path) is None else _at_tokenizer(path, data.load_tokenizer)


def _at_tokenizer(path: Any, read: Callable[[Path], Any]) -> Any:
    stored, origin = _stored_files(path), travelled(path)["notes"].get(generation.NOTES)
    with tempfile.TemporaryDirectory(prefix="lmx-tokenizer-") as folder:
        if stored is not None:
            stored.save(folder)
        if origin is not None:
            (Path(folder) / CONFIG).write_text(json.dumps(origin), encoding="utf-8")
        return read(Path(folder))


def _stored_files(path: Any) -> StoredFiles | None:
    found = travelled(path).get("tokenizer")
    if found is None:
        return None
    text = lambda x: x if isinstance(x, str) else json.dumps(x)  # noqa: E731  (older ones hold values of JSON)
    return StoredFiles({name: text(content) for name, content in found.items() if name in TOKENIZER_TEXTS})


def _first_sound(name: str, read: Any) -> Any:
    """What `read` gives for the newest checkpoint that is not damaged; damaged ones are warned about."""
    found = found_in(name)
    if not found:
        raise FolderError(f"{name} holds no checkpoint; `lmx train` writes them to its folder's checkpoints/")
    for path in found:
        try:
            return read(path)
        except Damaged as error:
            if path is found[-1]:
                raise
            warnings.warn(f"{error}. The checkpoint before it is used", stacklevel=3)
    raise AssertionError("not reached")


def _shapes(description: Any) -> Any:
    """The model's tree of shapes, with shardings where a mesh is in force."""
    leaf = lambda name, shape, dtype: jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))  # noqa: E731
    return specs.shapes(specs.of(structure.rebuild(description, leaf)))


def _read(path: Any, dtype: Any) -> Any:
    """The model of one checkpoint."""
    model = _shapes(travelled(path)["structure"])
    saved = verified.about(path)["leaves"]
    wanted = {}
    for name, leaf in leaves.named(model).items():
        place = next((part for part in ("ema", "trained", "frozen") if f"{part}.{name}" in saved), None)
        if place is None:
            raise FolderError(f"{path} lacks {name}, which its model has; was {MODEL!r} made of another state?")
        kept = jnp.float32 if place == "ema" else leaf.dtype
        wanted[f"{place}.{name}"] = jax.ShapeDtypeStruct(leaf.shape, kept, sharding=leaf.sharding)
    arrays, _ = verified.fetch(path, wanted, others=True)

    def cast(array: jax.Array, like: Any) -> jax.Array:
        asked = dtype if dtype is not None and jnp.issubdtype(like.dtype, jnp.floating) else like.dtype
        return array.astype(asked)

    read = [cast(array, leaf) for array, leaf in zip(arrays.values(), jax.tree.leaves(model), strict=True)]
    return transformer.retyped(jax.tree.unflatten(jax.tree.structure(model), read), dtype)
