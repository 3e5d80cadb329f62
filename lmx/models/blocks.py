"""Blocks and towers: a layer's parameters, and x through one layer or all of them, for every family.

A block is data: attention, attention to an encoder where it has that, and a feed-forward layer, behind and before
norms; what is absent is None. The config says the rest, and each block its kind: global, local (a window), unrotated
or both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import sharding, specs, weights
from lmx.core.nodes import node, static
from lmx.core.tree import Layers
from lmx.models import stacks
from lmx.models.config import LAYER_KINDS, Config
from lmx.nn import attention as attend
from lmx.nn import dot_product, embed, mlp, norm, position
from lmx.nn import latent as latents


@node
class Block:
    attention_norm: norm.Norm | None  # before attention, or (norm_placement "post") after the residual
    attention: attend.Attention
    mlp_norm: norm.Norm | None
    mlp: mlp.MLP
    attention_out_norm: norm.Norm | None = None  # of what attention gives, before the residual
    mlp_out_norm: norm.Norm | None = None
    cross_norm: norm.Norm | None = None
    cross: attend.Attention | None = None  # to the encoder
    cross_out_norm: norm.Norm | None = None
    kind: str = static(default="global")  # global, local, unrotated or local_unrotated


@node
class Tower:
    """Layers, each of which runs `repeats` times in a row, and the norm after the last one."""

    layers: Layers
    norm: norm.Norm | None
    position_bias: Any = None  # weight (buckets, h): a bias by distance that all layers share, or None
    repeats: int = static(default=1)


Attend = Callable[[Block, jax.Array], jax.Array]  # a block and x (b, t, d) to what its attention gives (b, t, d)


def abstract_block(c: Config, kind: str = "global", *, cross: bool = False, first: bool = False) -> Block:
    """The specs of one layer; `cross`: with attention to an encoder; `first`: the first one of all."""
    std = c.initializer_range
    out_std = std / (2 * c.num_layers) ** 0.5  # Radford et al. 2019, section 2.3
    before = _norm(c) if c.norm_placement != "output" else None
    after = _norm(c) if c.norm_placement in ("both", "output") else None
    qk_norm = None if c.qk_norm == "none" else norm.abstract(c.head_dim, c.norm_bias, c.dtype, offset=c.norm_offset)
    attention = lambda qk_norm: attend.abstract(  # noqa: E731
        c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.attention_bias, c.attention_out_bias,
        std, out_std, c.dtype, qk_norm, c.qk_norm == "full",
    )  # fmt: skip
    return Block(
        attention_norm=None if first and not c.first_attention_norm else before,
        attention=attention(qk_norm),
        mlp_norm=before,
        mlp=mlp.abstract(c.hidden_size, c.intermediate_size, c.activation, c.mlp_bias, std, out_std, c.dtype),
        attention_out_norm=after,
        mlp_out_norm=after,
        cross_norm=before if cross else None,
        cross=attention(None) if cross else None,
        cross_out_norm=after if cross else None,
        kind=kind,
    )


def _norm(c: Config) -> norm.Norm:
    return norm.abstract(c.hidden_size, c.norm_bias, c.dtype, offset=c.norm_offset)


def abstract_tower(c: Config, num_layers: int, *, cross: bool = False) -> Tower:
    """The specs of a tower: one stack of all layers, or of periods as the pattern has them, and what is left over."""
    block = lambda i: abstract_block(c, c.kind(i), cross=cross, first=i == 0)  # noqa: E731
    period, begin = len(c.layer_pattern), 0 if c.first_attention_norm else 1
    whole = (num_layers - begin) // period
    rest = begin + whole * period
    runs = [(1, range(begin)), (whole, range(begin, begin + period)), (1, range(rest, num_layers))]
    layers = [tuple(specs.stack(block(i), n) for i in run) for n, run in runs if n and len(run)]
    bias = embed.table(c.relative_buckets, c.num_heads, c.initializer_range, c.dtype).replace(axes=(None, "heads"))
    return Tower(
        layers=Layers.of(layers),
        norm=None if c.norm_placement == "post" else _norm(c),
        position_bias=bias if c.position == "relative" else None,
        repeats=c.layer_repeats,
    )


def tower_specs(c: Config, template: Tower, tower: Tower) -> Tower:
    """The specs of a tower as it is, after any surgery: kinds and shapes from its tree, axes from the config."""

    def one(block: Block) -> Block:
        bare = block.attention_norm is None
        like = abstract_block(c, block.kind, cross=block.cross is not None, first=bare)
        if block.attention.latent is not None:
            like = like.replace(attention=latents.share(like.attention, block.attention.latent.shape[-1]))
        if block.attention.joined is not None:
            query = like.attention.query  # whose axes it has, and more heads
            like = like.replace(attention=like.attention.replace(query=None, key=None, value=None, joined=query))
        return weights.specs_like(specs.stack(like, 1), block)

    layers = Layers(tuple(tuple(map(one, period)) for period in tower.layers.stacks), tower.layers.sizes)
    rest = weights.specs_like(template.replace(layers=None), tower.replace(layers=None))
    return rest.replace(layers=layers)


def normalise(c: Config, params: norm.Norm | None, x: jax.Array) -> jax.Array:
    """x by a norm of the config's kind; x itself where there are no parameters."""
    return norm.norm(params, x, c.norm, c.norm_eps, offset=c.norm_offset)


def apply(c: Config, params: Block, x: jax.Array, attention: Attend, cross: Attend | None = None) -> jax.Array:
    """x (b, t, d) through one layer; how it attends is said by the caller, who may have a cache."""
    feed_forward = lambda y: mlp.mlp(params.mlp, y, c.activation)  # noqa: E731
    if c.parallel_residual:
        y = attention(params, normalise(c, params.attention_norm, x))
        x = x + y + feed_forward(normalise(c, params.mlp_norm, x))
        return sharding.place(x, "batch", "sequence", None)
    x = _residual(c, x, params.attention_norm, params.attention_out_norm, lambda y: attention(params, y))
    if params.cross is not None:
        x = _residual(c, x, params.cross_norm, params.cross_out_norm, lambda y: cross(params, y))
    x = _residual(c, x, params.mlp_norm, params.mlp_out_norm, feed_forward)
    return sharding.place(x, "batch", "sequence", None)


def _residual(c: Config, x: jax.Array, before: Any, after: Any, branch: Callable) -> jax.Array:
    if c.norm_placement == "post":
        return normalise(c, before, x + branch(x))
    return x + normalise(c, after, branch(normalise(c, before, x)))


def angles(c: Config, positions: jax.Array) -> dict[str, attend.Angles]:
    """Rotary angles for layers of each kind at positions (b, t); None where nothing turns.

    Local layers with a theta of their own do not stretch: the scaling is for what reaches far.
    """
    if c.position != "rotary":
        return dict.fromkeys(LAYER_KINDS)
    width = c.head_dim if c.rotary_dim is None else c.rotary_dim
    scaling = None if c.rope_scaling is None else dict(c.rope_scaling)
    everywhere = position.rotary_angles(positions, width, c.rope_theta, scaling)
    near = everywhere
    if c.rope_local_theta is not None:
        near = position.rotary_angles(positions, width, c.rope_local_theta)
    return {"global": everywhere, "local": near, "unrotated": None, "local_unrotated": None}


def distance_bias(c: Config, tower: Tower, queries: jax.Array, keys: jax.Array, causal: bool) -> jax.Array | None:
    """(b or 1, h, t, s): the tower's bias for queries at (b or 1, t) and keys at (b or 1, s), or None."""
    if tower.position_bias is None:
        return None
    buckets = position.relative_buckets(
        queries, keys, bidirectional=not causal, buckets=c.relative_buckets, max_distance=c.relative_max_distance
    )
    bias = jnp.moveaxis(weights.take(buckets, tower.position_bias), -1, 1)
    return sharding.place(bias, "batch", "heads", None, None)


def run(
    c: Config,
    tower: Tower,
    x: jax.Array,
    positions: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    memory: jax.Array | None = None,
    memory_mask: jax.Array | None = None,
    same_positions: bool = False,
) -> jax.Array:
    """x (b, t, d) through all layers and the last norm.

    positions (b, t): of the tokens; same_positions: within each segment they differ as places in the row do, so that
    a bias by distance is computed once. memory (b, s, d): what an encoder gave; memory_mask (b, t, s): which of it each
    position sees.
    """
    one = layer(
        c, tower, positions, x.shape[1], causal=causal, segment_ids=segment_ids, memory=memory, memory_mask=memory_mask,
        same_positions=same_positions,
    )  # fmt: skip
    x = stacks.run(tower.layers, x, one, c.remat, tower.repeats)
    return normalise(c, tower.norm, x)


def layer(
    c: Config,
    tower: Tower,
    positions: jax.Array,
    length: int,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    memory: jax.Array | None = None,
    memory_mask: jax.Array | None = None,
    same_positions: bool = False,
) -> Callable[[Block, jax.Array], jax.Array]:
    """One layer of a tower as a function of its parameters and x (b, length, d); the arguments are those of `run`."""
    turns = angles(c, positions)
    of_heads = functools.partial(normalise, c)
    at = jnp.arange(length)[None] if same_positions else positions
    bias = distance_bias(c, tower, at, at, causal)

    def own(params: Block, y: jax.Array) -> jax.Array:
        q, k, v = attend.project(params.attention, y, turns[params.kind], of_heads)
        z = dot_product.attention(
            q, k, v, causal=causal, segment_ids=segment_ids, bias=bias, implementation=c.attention,
            window=c.window if params.kind.startswith("local") else None, **scores(c),
        )  # fmt: skip
        return attend.project_out(params.attention, z)

    def cross(params: Block, y: jax.Array) -> jax.Array:
        k, v = attend.project_key_value(params.cross, memory)
        return attend_memory(c, params, y, k, v, memory_mask)

    return lambda params, x: apply(c, params, x, own, cross)


def attend_memory(c: Config, params: Block, y: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
    """What queries of y (b, t, d) find in an encoder's keys and values (b, s, k, c); mask (b, t, s) or None for all."""
    q = attend.project_query(params.cross, y)
    z = dot_product.attention(q, k, v, causal=False, mask=mask, **scores(c))
    return attend.project_out(params.cross, z)


def scores(c: Config) -> dict[str, float | None]:
    """How the products of queries and keys are scaled and bounded."""
    return {"scale": c.attention_scale, "softcap": c.attention_softcap}

