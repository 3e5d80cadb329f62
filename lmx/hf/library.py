"""Load and save as a user calls them: lmx's own folders, Hugging Face's, and names of the hub, told apart here."""

from __future__ import annotations

import os
from typing import Any

from jax.sharding import Mesh

from lmx.core import hub, sharding, specs
from lmx.core.errors import ConfigError, nearest
from lmx.core.sharding import Rules
from lmx.hf import files, reading, writing
from lmx.models import folders, transformer
from lmx.models import unigram as _unigram  # noqa: F401  (registers a node that folders hold)

FORMATS = ("lmx", "hf")


def load(
    folder: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | str | None = None, rules: Rules | None = None
) -> Any:
    """The model in a folder, each array read straight into its dtype and its place on the mesh.

    folder: what `lmx.save` or `lmx train` wrote; a folder in Hugging Face's format (config.json and safetensors); or
            the name of a model of the hub, "owner/name" or "hf:name".
    dtype:  of the floating-point arrays; as stored by default.
    mesh:   a mesh or its string ("fsdp=4,tensor=2"); by default the one in force, if any. rules: as in `use_mesh`.

    Raises:
      FolderError: a folder that is missing, damaged or does not fit its config, a name that cannot be fetched.
      ConfigError: an architecture that lmx does not know.
    """
    place = hub.folder(folder)
    with sharding.use_mesh(sharding.concrete_mesh() if mesh is None else mesh, rules):
        if files.is_folder(place):
            return reading.load(place, dtype=dtype)
        placed = None
        if sharding.concrete_mesh() is not None:
            placed = lambda shapes: specs.shardings(specs.of(shapes))  # noqa: E731
        return transformer.retyped(folders.load(place, dtype=dtype, shardings=placed), dtype)


def load_shapes(folder: str | os.PathLike) -> Any:
    """The model in a folder as `jax.ShapeDtypeStruct`s, with shardings where a mesh is in force; no array is read."""
    place = hub.folder(folder)
    return reading.load_shapes(place) if files.is_folder(place) else specs.shapes(specs.of(folders.load_shapes(place)))


def save(
    model: Any,
    folder: str | os.PathLike,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    notes: dict | None = None,
    format: str = "lmx",
    like: str | os.PathLike | dict | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write a model, and its tokenizer if given, to a folder.

    format: "lmx": structure.json, config.json and safetensors, for a model of any kind, with `notes` (JSON data); "hf":
    what transformers and others load, weights of other kinds than plain arrays written out.
    like: with "hf", where the model came from, as in `lmx.hf.writing.save`.

    Raises:
      FolderError: the folder is taken (unless overwrite) or cannot be written; nothing is then left half-done.
      ConfigError: with "hf", a model that no family can express.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is none of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    if format == "lmx":
        if like is not None:
            raise ConfigError("like= says how to write Hugging Face's format; give format='hf' too, or leave it out")
        folders.save(model, folder, tokenizer=tokenizer, overwrite=overwrite, notes=notes)
        return
    if notes is not None:
        raise ConfigError("Hugging Face's format has no place for notes=; leave them out, or give format='lmx'")
    writing.save(
        model, folder, like=like, tokenizer=tokenizer, overwrite=overwrite, max_file_bytes=max_file_bytes
    )
