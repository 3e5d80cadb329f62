"""Stacks of layers: run by scan, taken apart into single layers, put together again.

A run of identical periods is stored stacked (`lmx.core.tree.Layers`) and computed by one `lax.scan` over a
checkpointed period, so that a deep model compiles as fast as a shallow one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import weights
from lmx.core.errors import ConfigError
from lmx.core.tree import Layers

REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(weights.PRODUCT),
}


def run(
    layers: Layers, x: jax.Array, block: Callable[[Any, jax.Array], jax.Array], remat: str, repeats: int = 1
) -> jax.Array:
    """x through every layer, `repeats` times each: `block(parameters of one layer, x) -> x`. A stack of one period is
    not scanned."""

    def once(x: jax.Array, parameters: Any) -> jax.Array:
        if repeats == 1:
            return block(parameters, x)
        again = lambda x, _: (block(parameters, x), None)  # noqa: E731
        step = again if remat == "none" else jax.checkpoint(again, policy=REMAT[remat], prevent_cse=False)
        return jax.lax.scan(step, x, length=repeats)[0]

    def period(x: jax.Array, blocks: tuple) -> tuple[jax.Array, None]:
        for parameters in blocks:
            x = once(x, parameters)
        return x, None

    for n, stack in zip(layers.sizes, layers.stacks, strict=True):
        if n == 1:
            step = period if remat == "none" else jax.checkpoint(period, policy=REMAT[remat])
            x, _ = step(x, jax.tree.map(lambda leaf: leaf[0], stack))
        else:
            step = period if remat == "none" else jax.checkpoint(period, policy=REMAT[remat], prevent_cse=False)
            x, _ = jax.lax.scan(step, x, stack)
    return x


def layer_list(layers: Layers) -> list[Any]:
    """The parameters of each layer on its own, in order."""
    return list(EachLayer(layers))


class EachLayer:
    """The parameters of each layer on its own, in order, each taken out of its stack when it is asked for: so that no
    two copies of a model are held. It has a length, is indexed and iterated over."""

    def __init__(self, layers: Layers) -> None:
        self._places = _places(layers)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, layer: int) -> Any:
        block, i = self._places[layer]
        return _taken(block, i)

    def __iter__(self) -> Iterator[Any]:
        return (self[layer] for layer in range(len(self)))


def stack_layers(layers: Sequence[Any], period: int = 1, max_stacks: int = 8) -> Layers:
    """Stack neighbours of equal structure, shapes and dtypes; `period` layers repeat together.

    Each distinct stack costs compile time, so more than `max_stacks` raise ConfigError: use a coarser grid of ranks, a
    period that covers the pattern, or a larger bound.
    """
    if len(layers) % period:
        raise ConfigError(f"{len(layers)} layers are not a whole number of periods of {period}")
    return stack_parts([[tuple(layers[i : i + period]) for i in range(0, len(layers), period)]], max_stacks)


def stack_parts(parts: Iterable[Sequence[tuple]], max_stacks: int) -> Layers:
    """Periods, tuples of layers, stacked as `stack_layers` does; they come in parts, which no stack joins."""
    runs: list[list[tuple]] = []
    for part in parts:
        for j, period in enumerate(part):
            if j and _kind(runs[-1][0]) == _kind(period):
                runs[-1].append(period)
            else:
                runs.append([period])
    if len(runs) > max_stacks:
        raise ConfigError(
            f"{sum(len(period) for run in runs for period in run)} layers would need {len(runs)} stacks, more than "
            f"max_stacks={max_stacks}; make neighbours alike (ranks from a coarser grid, a pattern without gaps, "
            "period= where kinds alternate), or raise max_stacks"
        )
    return Layers.of([stack(run) for run in runs])


def _kind(period: tuple) -> Any:
    return jax.tree.structure(period), [(x.shape, str(x.dtype)) for x in jax.tree.leaves(period)]


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one with an axis more in front. What is numpy's in all of them stays so; all other
    arrays have to be on the same devices, for they are stacked by one program: one for each array and shape would take
    most of the time of surgery."""
    columns = list(zip(*map(jax.tree.leaves, trees), strict=True))
    held = [all(isinstance(x, np.ndarray | np.generic) for x in leaves) for leaves in columns]
    others = iter(_stack([leaves for leaves, is_held in zip(columns, held, strict=True) if not is_held]))
    made = [np.stack(leaves) if is_held else next(others) for leaves, is_held in zip(columns, held, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(trees[0]), made)


@jax.jit
def _stack(columns: list[tuple[jax.Array, ...]]) -> list[jax.Array]:
    return [jnp.stack(leaves) for leaves in columns]


def _taken(block: Any, i: int, keepdims: bool = False) -> Any:
    """The parameters of layer i of a stacked block, with or without the axis of layers. Arrays on devices are taken by
    one program for all i; within a program that is being traced the position stays a constant of it."""
    leaves, structure = jax.tree.flatten(block)
    computed = [isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in leaves]
    there = iter(_take([x for x, on_device in zip(leaves, computed, strict=True) if on_device], i, keepdims))
    at = slice(i, i + 1) if keepdims else i
    made = [next(there) if on_device else x[at] for x, on_device in zip(leaves, computed, strict=True)]
    return jax.tree.unflatten(structure, made)


@functools.partial(jax.jit, static_argnames="keepdims")
def _take(leaves: list[jax.Array], i: int, keepdims: bool) -> list[jax.Array]:
    return [jax.lax.dynamic_index_in_dim(x, i, keepdims=keepdims) for x in leaves]


def _places(layers: Layers) -> list[tuple[Any, int]]:
    """For each layer, in order, the stacked block that it is in and its position there."""
    sized = zip(layers.sizes, layers.stacks, strict=True)
    return [(block, i) for n, period in sized for i in range(n) for block in period]


def _each(tree: Any, change: Callable[[Layers], Layers]) -> Any:
    is_layers = lambda x: isinstance(x, Layers)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if is_layers(x) else x, tree, is_leaf=is_layers)


def unstack(tree: Any) -> Any:
    """The same model (any tree) with every layer a stack of its own: what decoding wants, and what never scans."""

    def apart(layers: Layers) -> Layers:
        if len(layers.stacks) == layers.num_layers:
            return layers
        return Layers.of([(_taken(block, i, keepdims=True),) for block, i in _places(layers)])

    return _each(tree, apart)


def restack(tree: Any, period: int = 1, max_stacks: int = 8) -> Any:
    """The same model (any tree) with neighbouring equal layers stacked again. Raises ConfigError as `stack_layers`."""
    return _each(tree, lambda layers: stack_layers(layer_list(layers), period, max_stacks))
