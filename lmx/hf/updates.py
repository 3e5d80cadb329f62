"""LoRA over weights of a model: put there, layer by layer, and found again.

An update has its leaf and its layer. Layers are stored in stacks, whose leaves are of one kind, rank and alpha: where
neighbours differ the stack is cut, nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lmx.core import specs, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA
from lmx.core.tree import Layers, Path, paths
from lmx.models.transformer import Model

Key = tuple[str, int | None]  # a leaf, as `lmx.core.tree.paths` spells it, and its layer
Update = tuple[np.ndarray, np.ndarray, float]  # a (inputs..., r), b (r, outputs...), alpha


def attach(model: Model, updates: Mapping[Key, Update], max_stacks: int) -> Model:
    """The model with LoRA over the weights that have an update, laid out on the mesh in force as their specs say.

    Raises ConfigError if that needs more than `max_stacks` stacks in one tower.
    """
    params = _attached(_cut(model.params, updates, max_stacks), updates)
    return specs.lay_out(Model(model.config, params))


def held(model: Model) -> dict[Key, tuple[LoRA, int | None]]:
    """(leaf, layer) -> (its LoRA, the layer's position in it).

    Raises ConfigError if there is none, or one within another weight.
    """
    found: dict[Key, tuple[LoRA, int | None]] = {}
    for where, weight in paths(model.params, weights.is_weight):
        inside = weight.base if isinstance(weight, LoRA) else weight
        is_update = lambda x: isinstance(x, LoRA)  # noqa: E731
        if any(is_update(x) for x in jax.tree.leaves(inside, is_leaf=is_update)):
            raise ConfigError(f"{where} has an update within another weight; PEFT's adapters have one, outermost")
        if isinstance(weight, LoRA):
            for position, layer in enumerate(where.layers or (None,)):
                found[where.plain, layer] = (weight, None if layer is None else position)
    if not found:
        raise ConfigError("the model has no LoRA, so there is no adapter to write; lmx.save writes models")
    return found


def mapped(function: Callable[[Path, Any], Any], params: Any) -> Any:
    """`function(path, weight of any kind)` for every weight."""
    leaves = [function(where, leaf) for where, leaf in paths(params, weights.is_weight)]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=weights.is_weight), leaves)


def _cut(params: Any, updates: Mapping[Key, Update], max_stacks: int) -> Any:
    """The parameters with stacks cut so that in each stack a leaf has updates of one rank and alpha, or none."""

    def kind(leaf: str, layer: int | None) -> Any:
        update = updates.get((leaf, layer))
        return None if update is None else (update[0].shape, update[0].dtype, update[2])

    found = paths(params, weights.is_weight)
    kinds = iter([[kind(where.plain, layer) for layer in where.layers or (None,)] for where, _ in found])
    stops = lambda x: isinstance(x, Layers) or weights.is_weight(x)  # noqa: E731

    def cut(part: Any) -> Any:
        if not isinstance(part, Layers):
            next(kinds)
            return part
        stacks = []
        for n, period in zip(part.sizes, part.stacks, strict=True):
            rows = list(zip(*(next(kinds) for _ in jax.tree.leaves(period, is_leaf=weights.is_weight)), strict=True))
            bounds = [0, *(i for i in range(1, n) if rows[i] != rows[i - 1]), n]
            for low, high in zip(bounds, bounds[1:], strict=False):
                whole = (low, high) == (0, n)
                stacks.append(period if whole else jax.tree.map(lambda x, at=slice(low, high): x[at], period))
        if len(stacks) > max(max_stacks, len(part.stacks)):
            raise ConfigError(
                f"the adapter's ranks differ between layers so often that they need {len(stacks)} stacks, more than "
                f"max_stacks={max_stacks}; raise it (each costs compile time), or merge the adapter with PEFT"
            )
        return Layers.of(stacks)

    return jax.tree.map(cut, params, is_leaf=stops)


def _attached(params: Any, updates: Mapping[Key, Update]) -> Any:
    """The parameters with LoRA (of numpy arrays) over the leaves that have an update, in every layer of theirs."""

    def one(where: Any, leaf: Any) -> Any:
        own = [updates.get((where.plain, layer)) for layer in where.layers or (None,)]
        if own[0] is None:
            return leaf
        a, b = ([update[i] for update in own] for i in (0, 1))
        stack = (lambda x: x[0]) if where.layers is None else np.stack
        return LoRA(leaf, stack(a), stack(b), inputs=a[0].ndim - 1, alpha=own[0][2])

    return mapped(one, params)
