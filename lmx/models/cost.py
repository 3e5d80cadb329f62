"""What a model costs, by arithmetic on its tree: parameters, FLOPs and bytes a token.

XLA's own count takes the body of a scan once, so lmx counts for itself. Works on arrays and on specs alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import specs, weights
from lmx.models import cache
from lmx.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one model, at rows of `length` tokens."""

    parameters: int
    parameter_bytes: int
    forward_flops: int  # a token: matrix products and attention (causal: on average half of `length` keys); with an
    # encoder beside the decoder, of one token in each
    train_flops: int  # a token, all of it trained: three times forward; what remat recomputes is not counted
    cache_bytes: int  # a row of `length` tokens while decoding
    decode_bytes: int  # read to decode one token at the end of such a row: weights and cache, of a table its row only


def cost(model: Any, length: int) -> Cost:
    """The cost of a language model, or of any tree of them (the sum of the Transformers in it).

    Multiplying a vector by a weight of n numbers takes 2n FLOPs, looking a row up none (Kaplan et al. 2020, table 1).
    """
    is_model = lambda x: isinstance(x, Model)  # noqa: E731
    models = [m for m in jax.tree.leaves(model, is_leaf=is_model) if is_model(m)]
    forward = sum(_forward(m, length) for m in models)
    return Cost(
        parameters=specs.count(model),
        parameter_bytes=specs.nbytes(model),
        forward_flops=forward,
        train_flops=3 * forward,
        cache_bytes=sum(_cache(m, length) for m in models),
        decode_bytes=specs.nbytes(model) + sum(_cache(m, length) - _unread(m) for m in models),
    )


def attention_flops(model: Model, length: int, *, causal: bool = True) -> int:
    """Of attention's two products (with keys, with values), a token of a row of `length`: 4 FLOPs a key, head and
    channel; `causal` counts the keys before each query, on average half of them."""
    c, before = model.config, (length + 1) / 2 if causal else length
    keys = {"decoder": before, "encoder": length, "cross": length}
    runs = {name: tower.layers.num_layers * tower.repeats for name, tower in towers(model.params).items()}
    if len(runs) == 2:
        runs["cross"] = runs["decoder"]
    size = lambda tower: tower.num_heads * tower.head_dim  # noqa: E731
    return round(sum(4 * keys[name] * size(c.tower("encoder" if name == "encoder" else "decoder")) * n
                     for name, n in runs.items()))  # fmt: skip


def towers(params: Any) -> dict[str, Any]:
    """The decoder and the encoder, those there are."""
    found = {"decoder": params.decoder, "encoder": params.encoder}
    return {name: tower for name, tower in found.items() if tower is not None}


def readout(params: Any) -> tuple[Any, ...]:
    """What is multiplied after the last layer: the head, and the token table where that serves as its matrix."""
    if params.head is None:
        return ()
    return (params.head,) if params.head.out is not None else (params.head, params.embed.tokens)


def flops(tree: Any) -> int:
    """FLOPs to multiply one vector by every matrix of a tree that states its specs (`lmx.core.specs.of`)."""
    total = 0
    for w in jax.tree.leaves(tree, is_leaf=weights.is_weight):
        if weights.is_weight(w):
            total += w.flops()
        elif w.inputs is not None:
            total += 2 * specs.count(w)
    return total


def _forward(model: Model, length: int) -> int:
    p = model.specs().params
    layers = sum(flops(tower.layers) * tower.repeats for tower in towers(p).values())
    table = flops(weights.read_whole(p.embed.tokens))  # of a plain one a row is read, and nothing multiplied
    return layers + table + flops(p.embed.projection) + flops(readout(p)) + attention_flops(model, length)


def _cache(model: Model, length: int) -> int:
    c, decoder = model.config, model.params.decoder
    if decoder is None:
        return 0
    whole, ranks = 2 * c.num_kv_heads * c.head_dim, cache.ranks(decoder)
    numbers = sum(whole if rank is None else rank for rank in ranks)
    if model.params.encoder is not None:  # beside it the keys and values of as long a source
        numbers += whole * len(ranks)
    return numbers * length * jnp.dtype(c.activation_dtype).itemsize


def _unread(model: Model) -> int:
    """Bytes of tables of which decoding a token reads one row: learned positions, and an untied embedding."""
    embed = model.params.embed
    read = any(part is embed.tokens for part in readout(model.params))
    table = 0 if read else specs.nbytes(embed.tokens) - specs.nbytes(weights.read_whole(embed.tokens))
    return specs.nbytes(embed.positions) + table
