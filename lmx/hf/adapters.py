"""LoRA adapters in PEFT's format, both ways: load_adapter(model, folder) -> model, save_adapter(model, folder).

A folder holds adapter_config.json (`adapter_config.py`) and adapter_model.safetensors, in which each adapted module has
`base_model.model.MODULE.lora_A.weight` (r, inputs) and `.lora_B.weight` (outputs, r): the update of its weight
(outputs, inputs) is B A, times a scale. A family's table says which leaves a module holds. Where it holds several
(query, key and value in one), each has its rows of B and all share A.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmx.core import hub, weights
from lmx.core.arrays import open_arrays
from lmx.core.errors import ConfigError, FolderError
from lmx.core.specs import ParamSpec
from lmx.core.tree import paths
from lmx.hf import adapter_config, adapter_names, files, reading, tables, updates
from lmx.hf.adapter_names import FOLD, Names
from lmx.hf.families import FAMILIES
from lmx.hf.updates import Key, Update
from lmx.models import publishing, transformer
from lmx.models.transformer import Model

STEM, PREFIX = "adapter_model", "base_model.model."
HEADS = ("sequence", "tokens", "spans")  # trained from nothing with an adapter, and part of it
LOOKED_UP = ("embed/", "encoder_embed/", "encoder/position_bias", "decoder/position_bias")  # torch's Embedding
MERGE = "merge it with PEFT (merge_and_unload), save the model and load that"
_UPDATE = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
Pair = dict[str, np.ndarray]  # {"A": (r, inputs), "B": (outputs, r)}


def load_adapter(model: Model, folder: str | os.PathLike, *, max_stacks: int = 8) -> Model:
    """The model with `LoRA` over each weight that an adapter in PEFT's format names.

    folder: of the adapter, or its name on the hub. Every module has its own rank and alpha; where they differ between
    layers, or only some layers have an update, stacks are cut, at most into `max_stacks` a tower, since each costs
    compile time. Modules trained whole (`modules_to_save`: a head) replace the model's. Updates have the dtype they are
    stored in and are laid out as their weights on the mesh in force.

    Raises:
      FolderError: a folder without an adapter, a damaged one, or one for another base: what it names is not there, or
        has another shape.
      ConfigError: an adapter that lmx does not compute (DoRA among others), one on a weight that two modules of the
        model share, or one that needs more stacks.
    """
    path = hub.folder(folder)
    values = adapter_config.read(path)
    pairs, whole = _parse(path, _open(path))
    names = adapter_names.fitting(model, path, pairs, whole)
    known, specs = names.known(), _leaf_specs(model)
    found: dict[Key, Update] = {}
    for module, pair in pairs.items():
        tensor = names.bound.tensors[known[names.today(f"{module}.weight")]]
        if names.is_tied(tensor.name):
            raise ConfigError(
                f"{path} adapts {module}, whose weight another module of this model shares (tie_word_embeddings): in "
                f"PEFT the other one stays as it was; {MERGE}"
            )
        rank, alpha = adapter_config.strength(values, module)
        for key, a, b in _split(path, module, tensor, specs, pair, rank):
            found[key] = (a, b, alpha)
    replaced = _replaced(model.params, path, names, whole)
    return updates.attach(Model(model.config, replaced), found, max_stacks)


def save_adapter(
    model: Model, folder: str | os.PathLike, *, base: str | os.PathLike | None = None, overwrite: bool = False
) -> None:
    """Write the `LoRA` of a model as an adapter in PEFT's format, and nothing else of the model but a head for
    labels or spans, which PEFT keeps with an adapter (`modules_to_save`).

    base: the folder, or the name on the hub, of the model that the adapter is for, which is written down; a folder also
    says of which family the names are, and so does the name of a family ("mistral") in its place. By default it is the
    first family that can express the model. Where a module holds several leaves (GPT-2's c_attn) and some have no
    update, their rows of B are zeros.

    Raises:
      ConfigError: a model without LoRA, an update of an update, leaves of one module with unlike A, ranks or alphas, or
        a model that the family cannot express.
      FolderError: the folder is taken (unless overwrite) or cannot be written; nothing half-written stays.
    """
    held, specs = updates.held(model), _leaf_specs(model)
    origin = _origin(base)
    names = Names.of(model, origin)
    made: dict[str, np.ndarray] = {}
    heads: dict[str, np.ndarray] = {}
    strengths: dict[str, tuple[int, float]] = {}
    flipped = False
    for name, tensor in names.bound.tensors.items():
        parts = [held.pop((part.leaf, part.layer), None) for part in tensor.parts]
        if not any(parts):
            if model.config.head in HEADS and tensor.parts[0].leaf.startswith("head/"):
                heads[PREFIX + names.spelled(name)] = _whole(model, tensor)
            continue
        module = names.module(name)
        if names.is_tied(name):
            raise ConfigError(f"{module} shares its weight (tie_word_embeddings), and PEFT adapts one module; {FOLD}")
        a, b, alpha = _joined(module, tensor, parts, specs)
        rows = tensor.parts[0].leaf.startswith(LOOKED_UP)
        flipped |= tensor.entry.layout == "conv1d" and not rows
        spelled = "lora_embedding_{}" if rows else "lora_{}.weight"
        made |= {f"{PREFIX}{module}.{spelled.format(letter)}": x for letter, x in (("A", a), ("B", b))}
        strengths[module] = (a.shape[0], alpha)
    if held:
        raise ConfigError(f"the model has {tables.spell(*next(iter(held)))}, which its config does not say; mend it")
    where = None if base is None or isinstance(origin, str) else os.fspath(base)
    replaced = sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in heads})
    text = adapter_config.write(strengths, names.modules(), where, _task(model), flipped, replaced)
    made = dict(sorted((made | heads).items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    about = adapter_config.NAME
    publishing.publish(folder, made, iter(made.values()), {about: text}, None, overwrite, 1 << 62, (STEM, about))


def _whole(model: Model, tensor: tables.Tensor) -> np.ndarray:
    """A tensor of the head, which has one leaf a tensor."""
    (part,) = tensor.parts
    leaf = next(leaf for where, leaf in paths(model.params, weights.is_weight) if where.plain == part.leaf)
    numbers = publishing.whole(weights.dense(leaf))
    made = np.empty(tensor.shape, numbers.dtype)
    part.view(made)[...] = numbers
    return made


def _task(model: Model) -> str | None:
    if model.config.head == "lm" and model.config.architecture != "decoder":
        return "SEQ_2_SEQ_LM" if model.config.architecture == "encoder_decoder" else None
    return adapter_config.TASKS[model.config.head]


def _open(path: Path) -> dict[str, np.ndarray]:
    file = path / f"{STEM}.safetensors"
    if not file.exists():
        raise FolderError(f"{path} {hub.only_pickles(sorted(entry.name for entry in path.iterdir()))}")
    return open_arrays(file)


def _parse(path: Path, stored: Mapping[str, np.ndarray]) -> tuple[dict[str, Pair], dict[str, np.ndarray]]:
    """({module: its A and B}, {name: a tensor trained whole})."""
    pairs: dict[str, Pair] = {}
    whole = {}
    for name, array in stored.items():
        bare = name.removeprefix(PREFIX)
        if found := _UPDATE.fullmatch(bare):
            pairs.setdefault(found[1], {})[found[3]] = array
        elif "lora_" in bare:
            raise ConfigError(f"{path} holds {name}, which is no part of a plain LoRA (of DoRA, perhaps); {MERGE}")
        else:
            whole[bare.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = array
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise FolderError(f"{path} is damaged: of {module} it has lora_{next(iter(pair))} alone; copy it again")
    return pairs, whole


def _leaf_specs(model: Model) -> dict[Key, ParamSpec]:
    """The spec of every leaf of every layer, as the config has it."""
    found: dict[Key, ParamSpec] = {}
    for where, spec in paths(transformer.abstract(model.config)):
        one = spec if where.layers is None else spec.replace(shape=spec.shape[1:], axes=spec.axes[1:])
        found |= dict.fromkeys(((where.plain, layer) for layer in where.layers or (None,)), one)
    return found


def _layouts(tensor: tables.Tensor, specs: Mapping[Key, ParamSpec], rank: int) -> tuple[tuple, tuple]:
    """(shape, views) of a module's A, with the view of one leaf since all share it, and of its B."""
    matrix = lambda shape, inputs: ParamSpec(shape, (None,) * len(shape), inputs=inputs)  # noqa: E731
    spec = [specs[part.leaf, part.layer] for part in tensor.parts]
    a = matrix((*spec[0].shape[: spec[0].inputs], rank), spec[0].inputs)
    b = [matrix((rank, *one.shape[one.inputs :]), 1) for one in spec]
    linear = dataclasses.replace(tensor.entry, layout="linear")
    return tables.layout(dataclasses.replace(linear, per_head=False), [a]), tables.layout(linear, b)


def _split(
    path: Path, module: str, tensor: tables.Tensor, specs: Mapping[Key, ParamSpec], pair: Pair, rank: int
) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
    """(leaf and layer, its a (inputs..., r), its b (r, outputs...)) of a module. Raises FolderError for shapes
    that do not fit."""
    if any(specs[part.leaf, part.layer].inputs is None for part in tensor.parts):
        raise FolderError(f"{path} adapts {module}, which is no matrix in this model; it is for another base")
    (shape_a, (of_a,)), (shape_b, of_b) = _layouts(tensor, specs, rank)
    for letter, shape in (("A", shape_a), ("B", shape_b)):
        if pair[letter].shape != shape:
            raise FolderError(
                f"{path}: lora_{letter} of {module} has the shape {pair[letter].shape}; for this model, and the rank "
                f"{rank} that {adapter_config.NAME} says, it must be {shape}: the adapter is for another base"
            )
    a, b = (np.array(pair[letter], reading.kept(pair[letter].dtype)) for letter in "AB")
    for part, view in zip(tensor.parts, of_b, strict=True):
        yield (part.leaf, part.layer), of_a(a), view(b)


def _replaced(params: Any, path: Path, names: Names, whole: Mapping[str, np.ndarray]) -> Any:
    """The parameters with what was trained whole in place of their own."""
    new: dict[str, np.ndarray] = {}
    known = names.known()
    for name, array in whole.items():
        tensor = names.bound.tensors[known[names.today(name)]]
        if array.shape != tensor.shape:
            raise FolderError(f"{path}: {name} has the shape {array.shape}, in this model it must be {tensor.shape}")
        for part in tensor.parts:
            if part.layer is not None:
                raise ConfigError(f"{path} replaces {name}; lmx takes modules trained whole only outside of layers")
            numbers = part.view(array)
            if not np.array_equal(new.setdefault(part.leaf, numbers), numbers):
                raise ConfigError(f"{path} replaces {name}, and by other numbers the module that shares its weight")

    def one(where: Any, leaf: Any) -> Any:
        if where.plain not in new:
            return leaf
        if weights.is_weight(leaf):
            raise ConfigError(f"{path} replaces {where}, which is a {type(leaf).__name__} here; fold the model first")
        return jax.device_put(np.array(new[where.plain], leaf.dtype), leaf.sharding)

    return updates.mapped(one, params)


def _origin(base: Any) -> Any:
    """What `writing.describe` takes: the config.json of a base that is here, or the name of a family."""
    if base is None or os.fspath(base) in FAMILIES:
        return base
    path = Path(base).expanduser()
    return files.origin(path) if path.is_dir() else None


def _joined(
    module: str, tensor: tables.Tensor, parts: list, specs: Mapping[Key, ParamSpec]
) -> tuple[np.ndarray, np.ndarray, float]:
    """(A (r, inputs), B (outputs, r), alpha) of a module, of its leaves' (LoRA, position in a stack) or None."""
    strengths = {(pair[0].rank, pair[0].alpha) for pair in parts if pair is not None}
    if len(strengths) > 1:
        raise ConfigError(f"the leaves of {module} have unlike ranks or alphas, {sorted(strengths)}; {FOLD}")
    ((rank, alpha),) = strengths
    (shape_a, (of_a,)), (shape_b, of_b) = _layouts(tensor, specs, rank)
    a = b = None
    for part, pair, view in zip(tensor.parts, parts, of_b, strict=True):
        if pair is None:
            continue
        own, rows = (_one(x, pair[1]) for x in (pair[0].lora_a, pair[0].lora_b))
        spec = specs[part.leaf, part.layer]
        if own.shape != (*spec.shape[: spec.inputs], rank) or rows.shape != (rank, *spec.shape[spec.inputs :]):
            raise ConfigError(f"{tables.spell(part.leaf, part.layer)} has another shape than the model's config says")
        if a is None:
            a, b = np.zeros(shape_a, own.dtype), np.zeros(shape_b, rows.dtype)
            of_a(a)[...] = own
        elif not np.array_equal(of_a(a), own):
            raise ConfigError(
                f"{module} is one weight of {len(tensor.parts)} leaves, whose updates share A in PEFT's format, and "
                f"the A here differ; {FOLD}"
            )
        view(b)[...] = rows
    return a, b, alpha


def _one(weight: Any, position: int | None) -> np.ndarray:
    one = weight if position is None else jax.tree.map(lambda x: x[position], weight)
    return publishing.whole(weights.dense(one))
