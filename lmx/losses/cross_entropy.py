"""Cross-entropy of any language model, in chunks of positions, its gradient computed in the forward pass.

The (b, t, v) logits are never held whole. While a chunk's logits are there its gradient is taken too, so the backward
pass only scales what the forward pass left: the head is multiplied three times and not four, and no logits are kept.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lmx.core import sharding
from lmx.core.errors import ConfigError
from lmx.models.protocol import LanguageModel, split_chunks, take_token

Metrics = dict[str, tuple[jax.Array, jax.Array]]
# Logits of a chunk on one device, about: 16 MB of float32 on a CPU, to stay in its cache; 256 MB on accelerators, for
# on a mesh every chunk's share of the head's gradient is summed over the devices.
CHUNK_LOGITS, ON_CPU = 1 << 26, 1 << 22

# What of a batch is the model's to read, beside its tokens: the last three where it has types or an encoder.
GIVEN = ("segment_ids", "positions", "types", "encoder_tokens", "encoder_segment_ids")


def targets_of(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(targets, weights), each (b, t), of a batch.

    Without "targets" they are "tokens" shifted by one; the last position, and those where the next token belongs to
    another segment, then weigh nothing. Without "weights" every target weighs 1, and 0 in padding (segment 0).
    """
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    weights = batch.get("weights")
    if weights is None:
        weights = jnp.ones_like(tokens) if segments is None else segments != 0
    weights = weights.astype(jnp.float32)
    if "targets" in batch:
        return batch["targets"], weights
    targets = jnp.roll(tokens, -1, axis=1)
    inside = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    inside = inside[None] if segments is None else inside & (jnp.roll(segments, -1, axis=1) == segments)
    return targets, weights * inside


def cross_entropy(
    model: LanguageModel,
    batch: dict[str, jax.Array],
    key: jax.Array | None = None,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(sum, weight, metrics) of -log p(target) over a batch.

    batch:  "tokens" (b, t) and optionally "targets" and "weights" (`targets_of`), "segment_ids", "positions", "types",
            and for an encoder-decoder "encoder_tokens", "encoder_segment_ids" (`Model.features`).
    z_loss: adds z_loss * log(Z)^2 a token, which keeps the normaliser near 1 (Chowdhery et al. 2022, section 5).
    chunk:  positions of every row taken at a time; by default about 4 million logits a device, 64 on accelerators.
    metrics: "loss" (cross-entropy alone, nats a token) and "accuracy"; "z_loss" where it is used. The sum and the
    weight can be differentiated with respect to the model, the metrics cannot.
    Raises ConfigError for a negative z_loss.
    """
    if z_loss < 0:
        raise ConfigError(f"z_loss must be 0 (off) or a small positive number such as 1e-4, not {z_loss}")
    targets, weights = targets_of(batch)
    features = model.features(batch["tokens"], **{name: batch[name] for name in GIVEN if name in batch})
    if chunk is None:
        b, t = targets.shape
        devices = jax.sharding.get_abstract_mesh().size if sharding.mesh_kind() else 1
        logits = ON_CPU if sharding.platform() == "cpu" else CHUNK_LOGITS
        chunk = min(t, max(16, logits * devices // (b * model.vocab_size)))
    readout = _gathered(model.readout(), targets)
    total, (nll, square, correct) = _summed(z_loss, chunk, readout, features, targets, weights)
    weight = weights.sum()
    metrics = {"loss": (nll, weight), "accuracy": (correct, weight)}
    if z_loss:
        metrics["z_loss"] = (z_loss * square, weight)
    return total, weight, metrics


def _gathered(readout: Any, targets: jax.Array) -> Any:
    """The readout, whole along the mesh axes that split the batch, so that no chunk gathers it anew."""
    if sharding.mesh_kind() is not AxisType.Explicit:
        return readout
    busy = {axis for entry in sharding.entries(targets) for axis in entry}

    def gather(leaf: jax.Array) -> jax.Array:
        kept = [tuple(axis for axis in entry if axis not in busy) or None for entry in sharding.entries(leaf)]
        return jax.reshard(leaf, jax.P(*kept))

    return jax.tree.map(gather, readout)


def _terms(z_loss, logits, targets, weights):
    """The sums of one chunk, and the pieces that its gradient needs."""
    top = logits.max(-1)
    log_z = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))  # (b, c)
    picked = take_token(logits, targets)
    each = jnp.where(weights != 0, weights * (log_z - picked), 0.0)  # what weighs nothing may be impossible
    nll, square = each.sum(), (weights * jnp.square(log_z)).sum()
    correct = (weights * (picked >= top)).sum()
    return nll + z_loss * square, (nll, square, correct), log_z


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(z_loss: float, chunk: int, readout: Any, features: Any, targets: jax.Array, weights: jax.Array):
    """(total, (nll, square of log Z, correct)) summed over all positions; no gradient is computed."""

    def step(sums, piece):
        f, y, w = piece
        total, parts, _ = _terms(z_loss, readout.logits(f), y, w)
        return jax.tree.map(jnp.add, sums, (total, parts)), None

    pieces = jax.tree.map(lambda leaf: split_chunks(leaf, chunk), (features, targets, weights))
    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(step, (zero, (zero, zero, zero)), pieces)
    return sums


def _summed_forward(z_loss, chunk, readout, features, targets, weights):
    def step(carry, piece):
        sums, d_readout = carry
        f, y, w = piece
        logits, pull = jax.vjp(lambda r, f: r.logits(f), readout, f)
        total, parts, log_z = _terms(z_loss, logits, y, w)
        chosen = jnp.arange(logits.shape[-1], dtype=y.dtype) == y[..., None]
        slope = 1.0 + 2.0 * z_loss * log_z if z_loss else jnp.ones_like(log_z)
        d_logits = w[..., None] * (slope[..., None] * jnp.exp(logits - log_z[..., None]) - chosen)
        d_r, d_f = _inexact(pull(d_logits))
        d_readout = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_readout, d_r)
        return (jax.tree.map(jnp.add, sums, (total, parts)), d_readout), d_f

    pieces = jax.tree.map(lambda leaf: split_chunks(leaf, chunk), (features, targets, weights))
    zero = jnp.zeros((), jnp.float32)
    start = jax.tree.map(lambda x: sharding.zeros_like(x, jnp.float32), _inexact(readout))
    (sums, d_readout), d_features = jax.lax.scan(step, ((zero, (zero, zero, zero)), start), pieces)
    d_features = jax.tree.map(_join, d_features, _inexact(features))
    return sums, (readout, d_readout, d_features)


def _inexact(tree: Any) -> Any:
    """None in place of leaves that have no gradient, such as the tokens that an n-gram model's features are."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _join(pieces: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `split_chunks`: (chunks, b, chunk, ...) to (b, t, ...)."""
    n, b, chunk, *rest = pieces.shape
    return jnp.moveaxis(pieces, 0, 1).reshape(b, n * chunk, *rest)[:, : like.shape[1]]


def _summed_backward(z_loss, chunk, saved, cotangent):
    readout, d_readout, d_features = saved
    g = cotangent[0]
    scale = lambda d, like: (g * d).astype(like.dtype)  # noqa: E731
    d_features = jax.tree.map(lambda d: (g * d).astype(d.dtype), d_features)
    return jax.tree.map(scale, d_readout, _inexact(readout)), d_features, None, None


_summed.defvjp(_summed_forward, _summed_backward)
