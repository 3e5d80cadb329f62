"""Cross-entropy of any language model, in chunks of positions (`chunks.py`)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core.errors import ConfigError
from lmx.losses import chunks
from lmx.models.protocol import LanguageModel, take_token

Metrics = dict[str, tuple[jax.Array, jax.Array]]

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


def features_of(model: LanguageModel, batch: dict[str, jax.Array]) -> Any:
    """The model's features, leaves (b, t, ...), of all that it reads in a batch."""
    return model.features(batch["tokens"], **{name: batch[name] for name in GIVEN if name in batch})


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
    features = features_of(model, batch)
    chunk = chunks.default(*targets.shape, model.vocab_size) if chunk is None else chunk
    terms, readout = functools.partial(_terms, z_loss), chunks.gathered(model.readout(), features)
    total, nll, square, correct = chunks.summed(terms, chunk, readout, features, None, (targets, weights))
    weight = weights.sum()
    metrics = {"loss": (nll, weight), "accuracy": (correct, weight)}
    if z_loss:
        metrics["z_loss"] = (z_loss * square, weight)
    return total, weight, metrics


def _terms(z_loss, logits, _, piece):
    """The sums (total, nll, square of log Z, correct) of one chunk, and the total's gradient of its logits."""
    targets, weights = piece
    top = logits.max(-1)
    log_z = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))  # (b, c)
    picked = take_token(logits, targets)
    each = jnp.where(weights != 0, weights * (log_z - picked), 0.0)  # what weighs nothing may be impossible
    nll, square = each.sum(), (weights * jnp.square(log_z)).sum()
    correct = (weights * (picked >= top)).sum()
    chosen = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    slope = 1.0 + 2.0 * z_loss * log_z if z_loss else jnp.ones_like(log_z)
    d_logits = weights[..., None] * (slope[..., None] * jnp.exp(logits - log_z[..., None]) - chosen)
    return (nll + z_loss * square, nll, square, correct), d_logits
