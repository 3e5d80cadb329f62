"""Fewer layers: dropped or merged, by how much each of them changes what it is given or what the model loses without
it.

seen = layer_importance(model, batches)             # (layers,)
model = prune_layers(model, 10, seen)               # the ten that matter most
model = drop_layers(model, [3, 7])
model = merge_layers(model, 4, 6)                   # layers 4 and 5 as one
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import weights
from lmx.core.errors import ConfigError, nearest
from lmx.core.tree import paths
from lmx.hf.family import layer_pattern
from lmx.losses import cross_entropy
from lmx.models import blocks, stacks
from lmx.models.blocks import Block
from lmx.models.transformer import Model, memory_mask
from lmx.reparam.layers import check_tower, finished, on_host, stacked, towers, with_tower

Batch = Mapping[str, Any]
MEASURES = ("cosine", "loss")


def layer_importance(
    model: Model, batches: Iterable[Batch], *, measure: str = "cosine", tower: str | None = None
) -> np.ndarray:
    """(layers,) float64: how much each layer of a tower matters on calibration batches.

    measure: "cosine", 1 - cos of what a layer reads and gives, a mean over the tokens (Men et al. 2024, "ShortGPT",
    equation 1, block influence), one pass in all; or "loss", by how much the loss a token rises without the layer, one
    pass a layer. batches: as the loss takes them; padding (segment 0) does not count, nor for "loss" a target of weight
    0.

    Raises ConfigError for batches without tokens, a measure or a tower that there is not.
    """
    tower = check_tower(model, tower)
    if measure not in MEASURES:
        raise ConfigError(f"no measure {measure!r}, there are {', '.join(MEASURES)}{nearest(measure, MEASURES)}")
    batches = [{name: jnp.asarray(x) for name, x in batch.items()} for batch in batches]
    found = _losses(model, tower, batches) if measure == "loss" else _mean(_influence, model, tower, batches)
    return np.asarray(found, np.float64)


def prune_layers(model: Model, num_layers: int, importance: Sequence[float], *, tower: str | None = None) -> Model:
    """The model with the `num_layers` layers of a tower that matter most, in their order.

    Raises ConfigError for another number of importances than layers, or a number of layers that it cannot have.
    """
    tower = check_tower(model, tower)
    there = towers(model)[tower].layers.num_layers
    if len(importance) != there or not np.isfinite(importance).all():
        raise ConfigError(f"importance must be {there} finite numbers, one a layer of the {tower}; it has {importance}")
    if not 1 <= num_layers <= there:
        raise ConfigError(f"the {tower} has {there} layers, of which 1 to {there} can stay, not {num_layers}")
    least = least_important(importance, num_layers)
    return drop_layers(model, least, tower=tower) if least else model


def least_important(importance: Sequence[float], keep: int) -> list[int]:
    """The layers that go where `keep` stay, in order; of equals the first."""
    return sorted(np.argsort(importance, kind="stable")[: len(importance) - keep].tolist())


def drop_layers(model: Model, layers: Sequence[int], *, tower: str | None = None, max_stacks: int = 8) -> Model:
    """The model without these layers of a tower, numbered from 0; its config has fewer, and their kinds.

    Raises ConfigError for layers that there are not, or if none would be left.
    """
    tower = check_tower(model, tower)
    blocks = stacks.layer_list(towers(model)[tower].layers)
    if wrong := [i for i in layers if i not in range(len(blocks))]:
        raise ConfigError(f"the {tower} has no layer {wrong[0]}; they are numbered 0 to {len(blocks) - 1}")
    left = [block for i, block in enumerate(blocks) if i not in set(layers)]
    if not left:
        raise ConfigError(f"all {len(blocks)} layers of the {tower} would be dropped; keep at least one")
    return _with_layers(model, tower, left, max_stacks)


def merge_layers(
    model: Model,
    start: int,
    stop: int,
    *,
    coefficients: Sequence[float] | None = None,
    tower: str | None = None,
    max_stacks: int = 8,
) -> Model:
    """The model with the layers start, ..., stop - 1 of a tower as one: the weighted sum of their parameters.

    coefficients: one a layer, that sum to 1; by default each counts the same. (1 - m, 1, ..., 1) for m layers that go
    into the first is Yang et al. 2024, "LaCo", equation 1.
    Raises ConfigError for fewer than two layers, layers of unlike kind or shape, or weights that are no plain arrays.
    """
    tower = check_tower(model, tower)
    every = stacks.layer_list(towers(model)[tower].layers)
    if not 0 <= start < stop - 1 < len(every):
        raise ConfigError(f"layers[{start}:{stop}] of {len(every)} are no two or more neighbours to merge")
    chosen = every[start:stop]
    shares = [1 / len(chosen)] * len(chosen) if coefficients is None else list(coefficients)
    if len(shares) != len(chosen) or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"coefficients must be {len(chosen)} numbers that sum to 1, not {shares}")
    for block in chosen:
        _check_mergeable(chosen[0], block, start)
    total = lambda *xs: sum(s * on_host(x) for s, x in zip(shares, xs, strict=True)).astype(xs[0].dtype)  # noqa: E731
    return _with_layers(model, tower, [*every[:start], jax.tree.map(total, *chosen), *every[stop:]], max_stacks)


def _check_mergeable(first: Block, other: Block, start: int) -> None:
    for path, leaf in paths(other, weights.is_weight):
        if weights.is_weight(leaf):
            raise ConfigError(f"{path} is of the kind {type(leaf).__name__}, whose factors have no mean; fold it first")
    shapes = lambda block: jax.tree.map(jnp.shape, block)  # noqa: E731
    if jax.tree.structure(first) != jax.tree.structure(other) or shapes(first) != shapes(other):
        raise ConfigError(f"the layers from {start} on are of unlike kind or shape ({first.kind}, {other.kind})")


def _with_layers(model: Model, tower: str, layers: list[Block], max_stacks: int) -> Model:
    """The model with other layers, and a config that says so."""
    c = model.config
    of_encoder = c.architecture == "encoder_decoder" and tower == "encoder"
    changes: dict[str, Any] = {"num_encoder_layers" if of_encoder else "num_layers": len(layers)}
    if c.architecture == "encoder_decoder":  # both towers have one pattern
        if len(c.layer_pattern) > 1:
            raise ConfigError(
                "the encoder's and the decoder's layers share a pattern of kinds, which would not fit both"
            )
    else:
        changes["layer_pattern"] = layer_pattern([block.kind for block in layers])
        if not any(kind.startswith("local") for kind in changes["layer_pattern"]):
            changes["window"] = None
        changes["first_attention_norm"] = c.first_attention_norm or layers[0].attention_norm is not None
    changed = towers(model)[tower].replace(layers=stacked(c.replace(**changes), layers, max_stacks))
    return finished(with_tower(model, tower, changed, **changes), max_stacks)


def _losses(model: Model, tower: str, batches: list[Batch]) -> list[float]:
    """By how much the loss a token rises without each layer."""
    loss = jax.jit(lambda model, batch: cross_entropy(model, batch)[:2])
    mean = lambda model: _mean(lambda m, _, b: loss(m, b), model, tower, batches)  # noqa: E731
    if towers(model)[tower].layers.num_layers == 1:
        raise ConfigError(f"the {tower} has one layer, and without it there is no model to measure")
    count, whole = towers(model)[tower].layers.num_layers, mean(model)
    return [mean(drop_layers(model, [i], tower=tower, max_stacks=1 << 30)) - whole for i in range(count)]


def _mean(measure: Any, model: Model, tower: str, batches: list[Batch]) -> Any:
    """The sums of a measure over all batches, over their weights."""
    total, weight = 0.0, 0.0
    for batch in batches:
        sums, count = measure(model, tower, batch)
        total, weight = total + np.asarray(sums, np.float64), weight + float(count)
    if not weight:
        raise ConfigError("the calibration batches have no token that counts; give text that is more than padding")
    return total / weight


@functools.partial(jax.jit, static_argnums=1)
def _influence(model: Model, tower: str, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """((layers,), tokens): the sums of 1 - cos over a batch, and how many tokens it has."""
    c = model.config
    of_encoder = c.architecture == "encoder_decoder" and tower == "encoder"
    prefix, memory = "encoder_" if of_encoder else "", {}
    tokens, segments = batch[f"{prefix}tokens"], batch.get(f"{prefix}segment_ids")
    if c.architecture == "encoder_decoder" and not of_encoder:
        of_memory = batch.get("encoder_segment_ids")
        memory = {"memory": model.encoded(batch["encoder_tokens"], of_memory)}
        memory["memory_mask"] = memory_mask(tokens, segments, of_memory)
    place = {} if of_encoder else {"positions": batch.get("positions"), "types": batch.get("types")}
    x, about = model.enter_tower(tower, tokens, segments, place.get("positions"), place.get("types"))
    whole = getattr(model.params, tower)
    one = blocks.layer(c.tower(tower), whole, length=x.shape[1], **about, **memory)
    real = jnp.ones(tokens.shape, jnp.float32) if segments is None else (segments != 0).astype(jnp.float32)
    found = []
    for block in stacks.layer_list(whole.layers):
        before = x
        for _ in range(whole.repeats):
            x = one(block, x)
        found.append(((1 - _cosine(before, x)) * real).sum())
    return jnp.stack(found), real.sum()


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """(b, t): of vectors (b, t, d)."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.sqrt(jnp.square(x).sum(-1) * jnp.square(y).sum(-1))
    return (x * y).sum(-1) / jnp.maximum(norms, 1e-30)
