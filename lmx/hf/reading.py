"""Reading a checkpoint in Hugging Face's format: tensors by name, straight into the leaves of a model.

config.json gives the family and the Config, the Config the tree of specs, the family's table the tensor of every leaf.
A leaf is filled layer by layer from views of memory maps, only the slices that this process's devices hold, cast on the
way: the host has at most one leaf's local part beside the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import arrays, sharding
from lmx.core import specs as spec_trees
from lmx.core.errors import FolderError
from lmx.core.specs import ParamSpec
from lmx.core.tree import paths
from lmx.hf import files, tables
from lmx.hf.families import family_of
from lmx.hf.family import Family
from lmx.models import transformer
from lmx.models.config import Config
from lmx.models.fields import AUTO, DTYPES
from lmx.models.transformer import Model

CHUNK = 1 << 22  # numbers of two tensors compared at a time
PAGES = 1 << 21  # bytes from which on an array has pages of its own


def load(path: Path, *, dtype: Any = None) -> Model:
    """The model of a folder, on the mesh in force.

    dtype: of all floating-point arrays; by default as they are stored (float64 becomes float32). What it computes in is
    decided where it is used (`Config.activation_dtype`).

    Raises:
      ConfigError: an architecture, or a value in config.json, that lmx does not know.
      FolderError: files that are missing, damaged, or do not fit config.json.
    """
    model, sources = _with_sources(path, dtype)
    filled = [_fill(spec, views) for spec, views in zip(jax.tree.leaves(model), sources, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(model), filled)


def load_shapes(path: Path) -> Model:
    """The model of a folder as `jax.ShapeDtypeStruct`s, with shardings where a mesh is in force; from config.json and
    the heads of the files, or by config.json alone where there are none."""
    if any(path.glob("*.safetensors")):
        return spec_trees.shapes(_with_sources(path, None)[0])
    _, _, config, _ = _bound(path)
    return spec_trees.shapes(Model(config, transformer.abstract(config)))


@dataclasses.dataclass(frozen=True)
class Views:
    """Where the numbers of a leaf are: a stored tensor and what to take of it, for each layer or once."""

    parts: list[tuple[np.ndarray, Callable]]
    stacked: bool

    def dtype(self) -> np.dtype:
        """That of the tensors, float32 where they differ."""
        kinds = {kept(array.dtype) for array, _ in self.parts}
        return kinds.pop() if len(kinds) == 1 else jnp.dtype(jnp.float32)


def kept(stored: Any) -> np.dtype:
    """The dtype in which numbers that are stored in another are held."""
    return jnp.dtype(stored) if jnp.dtype(stored).name in DTYPES else jnp.dtype(jnp.float32)


def _with_sources(path: Path, dtype: Any) -> tuple[Model, list[Views]]:
    """(the model of a folder as specs, with the dtypes that it will have, where the numbers of each leaf are)."""
    family, class_name, config, bound = _bound(path)
    found = _match(path, family, class_name, bound, files.open_tensors(path))
    _check_shapes(path, bound, found)
    specs, leaves, sources = transformer.abstract(config), [], []
    for where, spec in paths(specs):
        named = [bound.places[where.plain, layer] for layer in where.layers or (None,)]
        sources.append(Views([(found[name], part.view) for name, part in named], where.layers is not None))
        leaves.append(spec.replace(dtype=jnp.dtype(sources[-1].dtype() if dtype is None else dtype).name))
    config = config.replace(dtype=kept(leaves[0].dtype))
    return Model(config, jax.tree.unflatten(jax.tree.structure(specs), leaves)), sources


def _bound(path: Path) -> tuple[Family, str, Config, tables.Bound]:
    values = files.read_config(path)
    family = family_of(values)
    class_name = family.class_of(values)
    tied = None if family.tied_by_files is None else _tied(path, *family.tied_by_files)
    headless = family.classes[class_name].optional and _lacks_head(path, family, class_name)
    config = family.config(values, class_name, tied, headless).replace(compute_dtype=AUTO)
    return family, class_name, config, tables.bind(family.entries(config, class_name), transformer.abstract(config))


def _tied(path: Path, head: str, table: str) -> bool | None:
    """Whether the files hold no head beside the token table, or an equal one. Without files it is not known."""
    if not any(path.glob("*.safetensors")):
        return None
    stored = files.open_tensors(path)
    return head not in stored or table not in stored or _equal(stored[head], stored[table])


def _lacks_head(path: Path, family: Family, class_name: str) -> bool:
    """Whether the files hold no tensor of the head of their class. Without files it is as config.json says."""
    if not any(path.glob("*.safetensors")):
        return False
    stored = {_renamed(name, family) for name in files.open_tensors(path)}
    entries = tables.flatten(family.classes[class_name].table)
    names = [entry.name for entry in entries if isinstance(entry, tables.Entry)]
    return not any(other in stored for name in names for other in family.spelled(name, class_name))


def _match(
    path: Path, family: Family, class_name: str, bound: tables.Bound, stored: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Table name -> stored tensor. Raises FolderError for what is missing, left over, or a copy that is none."""
    left = {_renamed(name, family): array for name, array in stored.items()}

    def take(name: str) -> np.ndarray | None:
        return next((left.pop(other) for other in family.spelled(name, class_name) if other in left), None)

    found, lost = {}, []
    for name in bound.tensors:
        copies = [copy for copy, of in bound.copies.items() if of == name]
        array = next((array for other in (name, *copies) if (array := take(other)) is not None), None)
        if array is None:
            lost.append(name)
        else:
            found[name] = array
    for name, of in bound.copies.items():
        array = take(name)
        if array is not None and of in found and not _equal(array, found[of]):
            raise FolderError(
                f"{path}: config.json ties {name} to {of} (tie_word_embeddings), and the files hold different numbers "
                "for them; set it to false there if they are two"
            )
    for name in bound.computed:
        take(name)
    extra = [name for name in left if not _is_ignored(name, family, bound)]
    if lost or extra:
        said = [f"the files {what} {_some(names)}" for names, what in ((lost, "lack"), (extra, "also hold")) if names]
        raise FolderError(
            f"{path}: the weights do not fit config.json, by which this is a {class_name} (lmx/hf/families): "
            f"{'; '.join(said)}"
        )
    return found


def _renamed(name: str, family: Family) -> str:
    for pattern, replacement in family.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _is_ignored(name: str, family: Family, bound: tables.Bound) -> bool:
    return any(pattern.fullmatch(other) for pattern in bound.ignored for other in (name, family.prefix + name))


def _some(names: list[str]) -> str:
    return f"{len(names)} tensor{'s'[: len(names) > 1]} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two stored tensors hold the same numbers, a part at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.reshape(-1), other.reshape(-1)
    for begin in range(0, one.size, CHUNK):
        same = np.array_equal(one[begin : begin + CHUNK], other[begin : begin + CHUNK])
        arrays.forget(one[begin : begin + CHUNK])
        arrays.forget(other[begin : begin + CHUNK])
        if not same:
            return False
    return True


def _check_shapes(path: Path, bound: tables.Bound, found: Mapping[str, np.ndarray]) -> None:
    for name, tensor in bound.tensors.items():
        if found[name].shape != tensor.shape:
            raise FolderError(
                f"{path}: {name} has the shape {found[name].shape}, by config.json it must be {tensor.shape} "
                f"({', '.join(dict.fromkeys(part.leaf for part in tensor.parts))}); one of the two is wrong"
            )
        if not jnp.issubdtype(found[name].dtype, jnp.floating) or found[name].dtype.itemsize < 2:
            raise FolderError(
                f"{path}: {name} is stored as {found[name].dtype}; lmx reads float32, bfloat16 and float16: "
                "dequantize it with the tool that wrote it"
            )


def _fill(spec: ParamSpec, views: Views) -> jax.Array:
    """A leaf in its place; only what this process's devices hold is read."""
    mesh = sharding.concrete_mesh()
    place = None if mesh is None else sharding.named_sharding(spec.axes, spec.shape, mesh)
    read_parts: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in read_parts:  # replicas share it
            read_parts[str(index)] = _read(views, index, jnp.dtype(spec.dtype))
        return read_parts[str(index)]

    if place is None:
        array = jax.device_put(_read(views, (slice(None),) * len(spec.shape), jnp.dtype(spec.dtype)))
    else:
        array = jax.make_array_from_callback(spec.shape, place, read)
    return array.block_until_ready()  # or the next leaf would be read while this one's copy is still held


def _read(views: Views, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The numbers at `index` of a leaf, copied out of the maps."""
    chosen, inner = (views.parts[index[0]], index[1:]) if views.stacked else (views.parts, index)
    part = None
    for i, (array, view) in enumerate(chosen):
        numbers = view(array)[inner]
        if part is None:
            part = _empty((len(chosen), *numbers.shape), dtype)
        part[i] = numbers
        arrays.forget(array)
    return part if views.stacked else part[0]


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Room for numbers. Much of it comes in pages of its own: on a CPU jax keeps an array that begins with a page as it
    is, without a copy, and elsewhere the system gets it back at once."""
    size = math.prod(shape) * dtype.itemsize
    if size < PAGES:
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, size)
    with contextlib.suppress(AttributeError, OSError):  # a wish that not every system grants
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)
