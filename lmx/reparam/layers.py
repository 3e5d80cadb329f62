"""Layers as a list, edited on the host, and stacked again as the config's own model would be: the frame of surgery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmx.core import specs, weights
from lmx.core.errors import ConfigError
from lmx.core.tree import Layers
from lmx.models import blocks, stacks
from lmx.models.blocks import Block, Tower
from lmx.models.config import Config
from lmx.models.folders import whole
from lmx.models.transformer import Model

TOWERS = ("encoder", "decoder")


def towers(model: Model) -> dict[str, Tower]:
    """The towers that a model has, by name."""
    return {name: getattr(model.params, name) for name in TOWERS if getattr(model.params, name) is not None}


def check_tower(model: Model, name: str | None) -> str:
    """The name of a tower, which may be left out where there is one. Raises ConfigError for one that is not there."""
    there = list(towers(model))
    if name is None and len(there) == 1:
        return there[0]
    if name not in there:
        raise ConfigError(f"tower {name!r} is not in this model, which has {' and '.join(there)}: say which")
    return name


def with_tower(model: Model, name: str, tower: Tower, **changes: Any) -> Model:
    """The model with another tower and changed fields of its config."""
    return Model(model.config.replace(**changes), model.params.replace(**{name: tower}))


def stacked(c: Config, layers: Sequence[Block], max_stacks: int = 8) -> Layers:
    """Layers stored in the stacks that a new model of this config has, cut where neighbours differ in kind or shape.

    Raises ConfigError if that needs more than `max_stacks` stacks: each costs compile time.
    """
    like, parts, at = blocks.abstract_tower(c, len(layers)).layers, [], 0
    for n, period in zip(like.sizes, like.stacks, strict=True):
        end = at + n * len(period)
        parts.append([tuple(layers[i : i + len(period)]) for i in range(at, end, len(period))])
        at = end
    return stacks.stack_parts(parts, max(max_stacks, len(like.stacks)))


def restacked(model: Model, max_stacks: int = 8) -> Model:
    """The same model in as few stacks as its layers allow."""
    c, changed = model.config, {}
    for name, tower in towers(model).items():
        layers = stacked(c, stacks.layer_list(tower.layers), max_stacks)
        changed[name] = tower.replace(layers=layers)
    return model.replace(params=model.params.replace(**changed))


def on_host(x: Any) -> np.ndarray:
    """The array that a weight of any kind stands for, in float64 on the host."""
    return whole(weights.dense(x)).astype(np.float64)


def finished(model: Model, max_stacks: int = 8) -> Model:
    """What surgery ends with: stacked again, arrays of numpy put where their specs say on the mesh in force."""
    return specs.lay_out(restacked(model, max_stacks))


def added(x: Any, more: np.ndarray) -> np.ndarray:
    """x plus a float64 array, in x's dtype."""
    return (whole(x).astype(np.float64) + more).astype(x.dtype)


def each_block(function: Callable[[Block, Block], Block], params: Any, chosen: Any) -> Any:
    """The parameters with `function(block, which of its leaves are chosen)` of every block."""
    made = {}
    for name in TOWERS:
        tower, wanted = getattr(params, name), getattr(chosen, name)
        if tower is not None:
            pairs = zip(tower.layers.stacks, wanted.layers.stacks, strict=True)
            layers = Layers.of([tuple(map(function, *pair)) for pair in pairs])
            made[name] = tower.replace(layers=layers)
    return params.replace(**made)
