"""Decoding with a cache: a decoder's state, started, stepped through and rewound."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import sharding
from lmx.core.nodes import node, static
from lmx.models import blocks, stacks
from lmx.models.blocks import Block, Tower
from lmx.models.config import Config
from lmx.nn import attention as attend
from lmx.nn import dot_product
from lmx.nn import latent as latents


@node
class DecodeState:
    """Where decoding stands: a cache a layer, and how many positions each row has. Every leaf has the rows first.

    `aligned` says that all rows have the same number, which lets them be written as one slice.
    """

    caches: tuple[attend.Cache | latents.LatentCache, ...]
    lengths: Any  # (b,) int32
    memory: tuple[attend.Cache, ...] = ()  # the encoder's keys and values for each layer, where there is one
    memory_mask: Any = None  # (b, s) bool: what of it is seen; None for all
    aligned: bool = static(default=True)


def start(c: Config, tower: Tower, batch: int, length: int) -> DecodeState:
    """An empty state with room for `length` positions a row."""

    def empty(rank: int | None) -> attend.Cache | latents.LatentCache:
        if rank is None:
            return attend.empty_cache(batch, c.num_kv_heads, length, c.head_dim, c.activation_dtype)
        return latents.empty_cache(batch, length, rank, c.activation_dtype)

    caches = tuple(map(empty, ranks(tower)))
    out = sharding.out_sharding((batch,), "batch")
    return DecodeState(caches, jnp.zeros((batch,), jnp.int32, out_sharding=out))


def ranks(tower: Tower) -> list[int | None]:
    """For each layer, as often as it runs: the width of the latents that it caches, or None for keys and values."""
    of = lambda block: None if block.attention.latent is None else block.attention.latent.shape[-1]  # noqa: E731
    runs = zip(tower.layers.sizes, tower.layers.stacks, strict=True)
    return [of(block) for n, period in runs for block in period * n for _ in range(tower.repeats)]


def remember(
    c: Config, tower: Tower, state: DecodeState, memory: jax.Array, segment_ids: jax.Array | None
) -> DecodeState:
    """The state with an encoder's memory (b, s, d), its keys and values computed once for all steps."""
    caches = []
    for params in _layers(tower):
        k, v = attend.project_key_value(params.cross, memory)
        caches.append(attend.Cache(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
    mask = None if segment_ids is None else segment_ids != 0
    return state.replace(memory=tuple(caches), memory_mask=mask)


def step(
    c: Config, tower: Tower, state: DecodeState, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, DecodeState]:
    """x (b, q, d) at positions (b, q), which follow those in the state: (features (b, q, d), the new state)."""
    length, q_len = state.caches[0].length, x.shape[1]
    begin = state.lengths.max() if state.aligned else state.lengths
    keys = jnp.arange(length)
    mask = positions[:, :, None] >= keys  # (b, q, s)
    near = None if c.window is None else mask & (positions[:, :, None] - keys < c.window)
    turns = blocks.angles(c, positions)
    # of what is in the cache: the places of keys, and no further, for there are scalings that follow the furthest
    turns_kept = blocks.angles(c, jnp.minimum(keys, positions.max())[None]) if any(ranks(tower)) else None
    at = begin + jnp.arange(q_len)[None] if state.aligned else positions
    bias = blocks.distance_bias(c, tower, at, keys[None], causal=True)
    of_heads, caches = functools.partial(blocks.normalise, c), []

    def own(params: Block, y: jax.Array) -> jax.Array:
        seen = {"mask": near if params.kind.startswith("local") else mask, "bias": bias, **blocks.scores(c)}
        cache = state.caches[len(caches)]
        if params.attention.latent is not None:
            q = attend.project_query(params.attention, y, turns[params.kind], of_heads)
            cache = latents.write(cache, attend.project_latent(params.attention, y), begin)
            caches.append(cache)
            z = latents.attention(params.attention, q, cache, turns_kept[params.kind], of_heads, **seen)
        else:
            q, k, v = attend.project(params.attention, y, turns[params.kind], of_heads)
            cache = attend.write(cache, k, v, begin)
            caches.append(cache)
            z = dot_product.attention(q, *_heads_last(cache), implementation="reference", **seen)
        return attend.project_out(params.attention, z)

    def cross(params: Block, y: jax.Array) -> jax.Array:
        k, v = _heads_last(state.memory[len(caches) - 1])
        seen = state.memory_mask
        if seen is not None:
            seen = jnp.broadcast_to(seen[:, None, :], (seen.shape[0], q_len, seen.shape[1]))
        return blocks.attend_memory(c, params, y, k, v, seen)

    for params in _layers(tower):
        x = blocks.apply(c, params, x, own, cross)
    state = state.replace(caches=tuple(caches), lengths=state.lengths + q_len)
    return blocks.normalise(c, tower.norm, x), state


def rewind(state: DecodeState, lengths: jax.Array) -> DecodeState:
    """The state as if only the first lengths (b,) tokens of each row had been fed."""
    lengths = sharding.place(jnp.asarray(lengths, jnp.int32), "batch")
    return state.replace(lengths=lengths, aligned=False)


def _layers(tower: Tower) -> list[Block]:
    """The parameters of each layer, as often as it runs."""
    return [layer for layer in stacks.layer_list(tower.layers) for _ in range(tower.repeats)]


def _heads_last(cache: attend.Cache) -> tuple[jax.Array, jax.Array]:
    """Keys and values (b, s, k, c) of a cache."""
    return jnp.swapaxes(cache.key, 1, 2), jnp.swapaxes(cache.value, 1, 2)
