"""The language of a family's table: which Hugging Face tensor holds which leaf of lmx, and how.

A table is a (nested) tuple of entries. It is written once and read in both directions, for an entry says only where a
leaf's numbers stand inside a tensor: importing reads that view, exporting writes it. The family of Llama:

    TABLE = (
        embedding("model.embed_tokens", "embed/tokens"),
        within("model.layers.{i}.", "decoder/layers/",
            norm("input_layernorm", "attention_norm"),
            linear("self_attn.q_proj", "attention/query"),      # also q_proj.bias, where the model has query_bias
            linear("self_attn.k_proj", "attention/key"),
            ...
        ),
        norm("model.norm", "decoder/norm"),
    )

Names. The left side is the name in the safetensors files, `{i}` the number of a layer. The right side is the path of a
leaf without layer range, as `lmx.core.tree.paths` spells it; `decoder/layers[0]/...` names the leaf of one layer alone
(then there is no `{i}`). How lmx stacks its layers, in runs or periods, does not matter to a table.
An entry whose leaves a config does not have (a bias, a gate, a norm) is not expected in the files of that config, so a
table lists all that a family can have and the Config decides. Every leaf of a model must be named by some entry.

Entries.
    linear(module, *leaves)      module.weight (outputs, inputs), module.bias (outputs,): torch's Linear. However many
                                 axes of the leaf are inputs and outputs (its ParamSpec says it), they are flattened.
                                 The bias goes to the leaf's name + "_bias". Several leaves: one tensor holds them one
                                 after the other along its outputs (q|k|v, gate|up), of any sizes;
                                 `per_head=True`: head by head instead, each head's q, k and v together (GPT-NeoX).
    conv1d(module, *leaves)      the same with a weight (inputs, outputs): GPT-2's Conv1D.
    embedding(module, leaf)      module.weight (rows, width), as lmx has it.
    norm(module, leaf)           module.weight -> leaf/scale, module.bias -> leaf/bias.
    tensor(name, leaf, layout)   a single tensor of that full name; layout "linear", "conv1d" (also: as it is), or "row"
                                 (1, n) for a vector (Marian's final_logits_bias). Vectors are flat in every layout.
    copy(name, of)               a tensor that may be stored although it equals another: a tied lm_head. Compared when
                                 it is there, read when only it is there, not written. Where another entry claims the
                                 name (an untied head), that one counts.
    computed(name, values)       a tensor that follows from the config: values(config) -> array. Not read, but written.
    ignored(pattern)             stored tensors without meaning for the model (old masks, rotary inv_freq): a regular
                                 expression that must match the whole name. Neither read nor written.
    within(hf, lmx, *entries)    the entries with both sides prefixed; `copy`'s `of` and patterns of `ignored` too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lmx.core.errors import ConfigError
from lmx.core.specs import ParamSpec
from lmx.core.tree import paths

LAYOUTS = ("linear", "conv1d", "row")
Table = tuple  # of entries and tables


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor and the leaves it holds."""

    name: str
    leaves: tuple[str, ...]
    layout: str = "linear"
    per_head: bool = False


@dataclasses.dataclass(frozen=True)
class Copy:
    """A tensor that equals another where both are stored."""

    name: str
    of: str


@dataclasses.dataclass(frozen=True)
class Computed:
    """A tensor that follows from the config."""

    name: str
    values: Callable[[Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Names of tensors that are neither read nor written."""

    pattern: str


def linear(module: str, *leaves: str, per_head: bool = False) -> Table:
    """A torch Linear: weight (outputs, inputs) and bias, of one leaf or of several along the outputs."""
    return _layer(module, leaves, "linear", per_head)


def conv1d(module: str, *leaves: str) -> Table:
    """GPT-2's Conv1D: weight (inputs, outputs) and bias, of one leaf or of several along the outputs."""
    return _layer(module, leaves, "conv1d", False)


def _layer(module: str, leaves: tuple[str, ...], layout: str, per_head: bool) -> Table:
    biases = tuple(f"{leaf}_bias" for leaf in leaves)
    return (Entry(f"{module}.weight", leaves, layout, per_head), Entry(f"{module}.bias", biases, layout, per_head))


def embedding(module: str, leaf: str) -> Entry:
    """A torch Embedding: rows by id."""
    return Entry(f"{module}.weight", (leaf,), "conv1d")


def norm(module: str, leaf: str) -> Table:
    """A norm: weight and bias."""
    return (Entry(f"{module}.weight", (f"{leaf}/scale",)), Entry(f"{module}.bias", (f"{leaf}/bias",)))


def tensor(name: str, leaf: str, layout: str = "linear") -> Entry:
    """One tensor by its full name."""
    return Entry(name, (leaf,), layout)


def copy(name: str, of: str) -> Copy:
    """A tensor that equals another."""
    return Copy(name, of)


def computed(name: str, values: Callable[[Any], np.ndarray]) -> Computed:
    """A tensor that follows from the config."""
    return Computed(name, values)


def ignored(pattern: str) -> Ignored:
    """Stored tensors that mean nothing to the model."""
    return Ignored(pattern)


def within(hf: str, lmx: str, *entries: Any) -> Table:
    """The entries with a prefix on each side."""

    def one(entry: Any) -> Any:
        match entry:
            case Entry(name, leaves):
                return dataclasses.replace(entry, name=hf + name, leaves=tuple(lmx + leaf for leaf in leaves))
            case Copy(name, of):
                return Copy(hf + name, hf + of)
            case Computed(name, values):
                return Computed(hf + name, values)
            case Ignored(pattern):
                return Ignored(re.escape(hf).replace(re.escape("{i}"), r"\d+") + pattern)

    return tuple(one(entry) for entry in flatten(entries))


def flatten(table: Any) -> Iterator[Any]:
    """The entries of nested tables, in order."""
    for item in table:
        if isinstance(item, (tuple, list)):
            yield from flatten(item)
        else:
            yield item


@dataclasses.dataclass(frozen=True)
class Part:
    """One leaf's place in a tensor: `view` takes the whole tensor and gives the leaf's numbers, in the leaf's shape."""

    leaf: str
    layer: int | None
    view: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as the files of one config hold it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    entry: Entry  # that says how the parts are laid out


@dataclasses.dataclass(frozen=True)
class Bound:
    """A table for one model: what its files hold."""

    tensors: dict[str, Tensor]  # by name
    places: dict[tuple[str, int | None], tuple[str, Part]]  # (leaf, layer) -> (name of its tensor, its part)
    copies: dict[str, str]  # name -> of
    computed: dict[str, Callable[[Any], np.ndarray]]
    ignored: tuple[re.Pattern, ...]


def bind(table: Table, specs: Any) -> Bound:
    """A table for the tree of specs of one config.

    Raises ConfigError, naming it, for a leaf that no entry names or that several do, and for a tensor of which a config
    has only some leaves.
    """
    leaves = _leaves(specs)
    entries = list(flatten(table))
    tensors, places = {}, {}
    for entry in entries:
        if not isinstance(entry, Entry):
            continue
        for name, keys in _expand(entry, leaves):
            if name in tensors:
                raise ConfigError(f"the table of this family names the tensor {name} twice")
            shape, views = layout(entry, [leaves[key] for key in keys])
            parts = tuple(Part(*key, view) for key, view in zip(keys, views, strict=True))
            tensors[name] = Tensor(name, shape, parts, entry)
            for key, part in zip(keys, parts, strict=True):
                if key in places:
                    raise ConfigError(f"two tensors hold {spell(*key)}: {places[key][0]} and {name}")
                places[key] = (name, part)
    if lost := [key for key in leaves if key not in places]:
        raise ConfigError(f"this family has no tensor for {spell(*lost[0])}, which this config has")
    copies = {e.name: e.of for e in entries if isinstance(e, Copy) and e.name not in tensors}
    derived = {e.name: e.values for e in entries if isinstance(e, Computed)}
    patterns = tuple(re.compile(e.pattern) for e in entries if isinstance(e, Ignored))
    return Bound(tensors, places, copies, derived, patterns)


def spell(leaf: str, layer: int | None) -> str:
    """A leaf of one layer, for messages: decoder/layers[3]/mlp/up."""
    return leaf if layer is None else leaf.replace("/layers/", f"/layers[{layer}]/", 1)


def _leaves(specs: Any) -> dict[tuple[str, int | None], ParamSpec]:
    """The spec of every leaf of every layer, without the axis that stacks layers."""
    found = {}
    for path, spec in paths(specs):
        if path.layers is None:
            found[path.plain, None] = spec
        else:
            one = spec.replace(shape=spec.shape[1:], axes=spec.axes[1:])
            found |= dict.fromkeys(((path.plain, layer) for layer in path.layers), one)
    return found


_ONE = re.compile(r"/layers\[(\d+)\]/")


def _expand(entry: Entry, leaves: dict) -> Iterator[tuple[str, list[tuple[str, int | None]]]]:
    """(name, leaves) of every tensor of an entry that this model has."""
    plain = [_ONE.sub("/layers/", leaf) for leaf in entry.leaves]
    fixed = [int(found[1]) if (found := _ONE.search(leaf)) else None for leaf in entry.leaves]
    if "{i}" in entry.name:
        layers = sorted({layer for leaf, layer in leaves if leaf in plain and layer is not None})
        rows = [(entry.name.replace("{i}", str(i)), [(leaf, i) for leaf in plain]) for i in layers]
    else:
        rows = [(entry.name, list(zip(plain, fixed, strict=True)))]
    for name, keys in rows:
        there = [key in leaves for key in keys]
        if all(there):
            yield name, keys
        elif any(there):
            lacks = ", ".join(spell(*key) for key, has in zip(keys, there, strict=True) if not has)
            raise ConfigError(f"{name} holds {len(keys)} leaves together, and this config lacks {lacks}")


def layout(entry: Entry, specs: Sequence[ParamSpec]) -> tuple[tuple[int, ...], list[Callable]]:
    """The shape of a tensor that holds these leaves, and the view of each."""
    if entry.layout not in LAYOUTS:
        raise ConfigError(f"{entry.name}: no layout {entry.layout!r}, there are {', '.join(LAYOUTS)}")
    inputs = [spec.shape[: spec.inputs or 0] for spec in specs]
    outputs = [spec.shape[spec.inputs or 0 :] for spec in specs]
    rows, width = math.prod(inputs[0]), [math.prod(outs) for outs in outputs]
    total = sum(width)
    if specs[0].inputs is None:
        shape = (1, total) if entry.layout == "row" else (total,)
    else:
        shape = (rows, total) if entry.layout == "conv1d" else (total, rows)
    heads = outputs[0][0] if entry.per_head else 1
    starts = np.cumsum([0, *width[:-1]]) // heads

    def view(start: int, ins: tuple[int, ...], outs: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
        size = math.prod(outs) // heads
        outputs_last = entry.layout == "conv1d" and bool(ins)

        def of(array: np.ndarray) -> np.ndarray:
            if outputs_last:
                return array[:, start : start + size].reshape(*ins, *outs)
            part = array.reshape(heads, total // heads, -1)[:, start : start + size]  # (heads, size, rows)
            if heads == 1:
                part = part[0]
            part = part.reshape(*outs, *ins)
            return part.transpose(*range(len(outs), part.ndim), *range(len(outs)))

        return of

    return shape, [view(int(s), i, o) for s, i, o in zip(starts, inputs, outputs, strict=True)]
