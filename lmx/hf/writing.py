"""Writing a model in Hugging Face's format: config.json, safetensors by their names, tensor by tensor.

Which family: that of the config.json the model came with, or the first that can express the model. Whether one can is
found by reading back what it would write: a field that does not come back is what stands in the way.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import weights
from lmx.core.errors import ConfigError
from lmx.core.tree import paths
from lmx.hf import files, tables
from lmx.hf.families import FAMILIES, family_of
from lmx.hf.family import Family, differences
from lmx.models import cache, cost, publishing, transformer
from lmx.models.config import Config
from lmx.models.filenames import CONFIG, GENERATION
from lmx.models.transformer import Model
from lmx.nn import latent

log = logging.getLogger("lmx")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION_IDS = (*SPECIAL_IDS, "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def save(
    model: Any,
    folder: str | os.PathLike,
    *,
    like: str | os.PathLike | dict[str, Any] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write a model so that transformers, and what else reads its format, loads it.

    like: where the model comes from: a folder in Hugging Face's format, one of lmx that `lmx convert` made of such, or
    the content of a config.json; its family is kept and so are the fields of config.json that lmx has no use for. Or
    the name of a family ("mistral"). By default the first family that can express the model.
    The rest as in `lmx.models.folders.save`. Weights of other kinds than plain arrays are written out.

    Raises:
      ConfigError: no family (or not the given one) can express the model; the message names what is in the way.
      FolderError: the folder is taken or cannot be written; nothing half-written stays.
    """
    if not isinstance(model, Model):
        raise ConfigError(f"a {type(model).__name__} has no form among Hugging Face's; save it as format='lmx'")
    original = origin_of(like)
    family, class_name, values = describe(model.config, original)
    bound = tables.bind(family.entries(model.config, class_name), transformer.abstract(model.config))
    model = _without_latents(model)
    held = _held(model)
    _check(model, held)
    values = _with_ids(values, model, tokenizer, new=not isinstance(original, dict))
    shapes = {name: _shape(tensor, held) for name, tensor in bound.tensors.items()}
    made: dict[str, Callable[[], np.ndarray]] = {
        name: lambda tensor=tensor: _assemble(tensor, held, shapes[tensor.name].dtype)
        for name, tensor in bound.tensors.items()
    }
    for name, compute in bound.computed.items():
        numbers = np.asarray(compute(model.config))
        shapes[name], made[name] = jax.ShapeDtypeStruct(numbers.shape, numbers.dtype), lambda numbers=numbers: numbers
    spelled = {family.spelled(name, class_name)[0]: name for name in shapes}
    spelled = dict(sorted(spelled.items(), key=lambda item: (-shapes[item[1]].dtype.itemsize, item[0])))
    fetched: Iterator[np.ndarray] = (made[name]() for name in spelled.values())
    texts = {CONFIG: _json(values)}
    if model.config.head == "lm" and (ids := {k: values[k] for k in GENERATION_IDS if values.get(k) is not None}):
        texts[GENERATION] = _json({"_from_model_config": True, **ids})
    named = {name: shapes[of] for name, of in spelled.items()}
    publishing.publish(folder, named, fetched, texts, tokenizer, overwrite, max_file_bytes)


def describe(config: Config, original: dict[str, Any] | str | None = None) -> tuple[Family, str, dict[str, Any]]:
    """(family, class, config.json) that express a config.

    original: the config.json a model came with, or the name of a family. Raises ConfigError, naming the fields in the
    way, if that family, or without it every one, has no such models.
    """
    if isinstance(original, str):
        chosen, values = [FAMILIES[original]], {}
    elif original is not None:
        chosen, values = [family_of(original)], original
    else:
        chosen, values = list(FAMILIES.values()), {}
    reasons = {}
    for family in chosen:
        class_name = family.class_for(config)
        if class_name is None:
            reasons[family.model_type] = [f"head={config.head!r}", "", ""]  # which counts as three fields
            continue
        try:
            written = _merged(family, class_name, config, values)
            ways = differences(config, family.config(written, class_name, config.tie_embeddings, config.head == "none"))
        except ConfigError as error:
            reasons[family.model_type] = [str(error), ""]  # a name that the family lacks counts as two fields
            continue
        if not ways:
            names = {"architectures": [class_name], "model_type": family.model_type}
            return family, class_name, {**names, **written, **names}
        reasons[family.model_type] = [f"{name}={getattr(config, name)!r}" for name in ways]
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    ways = ", ".join(filter(None, reasons[nearest]))
    if len(chosen) > 1:
        raise ConfigError(
            f"no family of Hugging Face's that lmx writes can express this model; nearest is {nearest!r}, which does "
            f"not have {ways}. Save it as format='lmx'"
        )
    raise ConfigError(
        f"Hugging Face's models of the family {nearest!r} do not have {ways}. Leave the family open (like=None), or "
        "save it as format='lmx'"
    )


def _merged(family: Family, class_name: str, config: Config, original: dict[str, Any]) -> dict[str, Any]:
    """The original's fields, those that the config decides changed to it where it is not what they say already."""
    if original:
        try:
            found = family.config(original, class_name, config.tie_embeddings, config.head == "none")
            if not differences(config, found):
                return dict(original)
        except ConfigError:  # of another class, say: then what it decides is written anew
            pass
    fields = family.describe(config, class_name)
    if len(original.get("id2label") or ()) == len(fields.get("id2label", ())):
        fields.pop("id2label", None), fields.pop("label2id", None)
    return {**original, **fields}


def origin_of(like: Any) -> dict[str, Any] | str | None:
    """What `like` means (see `save`): a config.json, the name of a family, or None. Raises ConfigError for neither."""
    if like is None or isinstance(like, dict):
        return like
    if isinstance(like, str) and like in FAMILIES:
        return like
    path = Path(like).expanduser()
    found = files.origin(path) if path.is_dir() else None
    if found is None:
        raise ConfigError(
            f"like={os.fspath(like)!r} is neither a folder that knows a config.json of Hugging Face's nor a family; "
            f"there are {', '.join(FAMILIES)}"
        )
    return found


def _with_ids(values: dict[str, Any], model: Model, tokenizer: Any, new: bool) -> dict[str, Any]:
    dtype = next(w.dtype for w in jax.tree.leaves(model.params, is_leaf=weights.is_weight))  # of the first weight
    dtype = jnp.dtype(dtype).name
    values = {**values, "dtype": dtype} | ({"torch_dtype": dtype} if "torch_dtype" in values else {})
    if new:  # transformers' own defaults are the ids of somebody's tokenizer
        ends = getattr(tokenizer, "eos_ids", (getattr(tokenizer, "eos_id", None),))
        eos = list(ends) if len(ends) > 1 else next(iter(ends), None)
        ids = {**dict.fromkeys(SPECIAL_IDS), "eos_token_id": eos}
        values = values | {name: value for name, value in ids.items() if name not in values}
    return values


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


Held = dict[tuple[str, int | None], tuple[Any, int | None]]


def _held(model: Model) -> Held:
    """(leaf, layer) -> (weight, its position in it) of the model as it is, whatever its stacks."""
    held: Held = {}
    for where, weight in paths(model.params, weights.is_weight):
        for position, layer in enumerate(where.layers or (None,)):
            held[where.plain, layer] = (weight, None if layer is None else position)
    return held


def _without_latents(model: Model) -> Model:
    """The model with keys and values made from x alone; says it where that changes something."""
    count = sum(rank is not None for tower in cost.towers(model.params).values() for rank in cache.ranks(tower))
    if count:
        log.warning("the shared latents of %d layers are written as plain matrices: their cache is whole again", count)
    return latent.unshare(model)


def _check(model: Model, held: Held) -> None:
    """Raise ConfigError unless the model's leaves are those of its config; say what is written out."""
    for where, spec in paths(transformer.abstract(model.config)):
        for layer in where.layers or (None,):
            name = tables.spell(where.plain, layer)
            if (where.plain, layer) not in held:
                raise ConfigError(f"the model's config says that it has {name}, and it has not; mend the config")
            weight = held[where.plain, layer][0]
            if weight.shape[where.layers is not None :] != spec.shape[where.layers is not None :]:
                one = weight.shape[where.layers is not None :]
                raise ConfigError(
                    f"{name} has the shape {one}, and by the model's config all layers have "
                    f"{spec.shape[where.layers is not None :]}: Hugging Face's models have one shape for all"
                )
    known = {(w.plain, i) for w, _ in paths(transformer.abstract(model.config)) for i in w.layers or (None,)}
    if more := [key for key in held if key not in known]:
        raise ConfigError(f"the model has {tables.spell(*more[0])}, which its config does not say; mend the config")
    kinds = {type(weight).__name__ for weight, _ in held.values() if weights.is_weight(weight)}
    if kinds:
        count = sum(weights.is_weight(weight) for weight, _ in held.values())
        log.warning(
            "%d weights of the kind %s are written as plain matrices: what they compute travels, their size does not",
            count, " and ".join(sorted(kinds)),
        )  # fmt: skip


def _shape(tensor: tables.Tensor, held: Held) -> jax.ShapeDtypeStruct:
    dtypes = {jnp.dtype(held[part.leaf, part.layer][0].dtype) for part in tensor.parts}
    return jax.ShapeDtypeStruct(tensor.shape, dtypes.pop() if len(dtypes) == 1 else jnp.dtype(jnp.float32))


def _assemble(tensor: tables.Tensor, held: Held, dtype: np.dtype) -> np.ndarray:
    """One tensor of the files, gathered from the leaves it holds (a collective where they are spread)."""
    numbers = np.empty(tensor.shape, dtype)
    for part in tensor.parts:
        weight, position = held[part.leaf, part.layer]
        one = weight if position is None else jax.tree.map(lambda x, at=position: x[at], weight)
        part.view(numbers)[...] = publishing.whole(weights.dense(one))
    return numbers
