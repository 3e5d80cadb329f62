"""The unigram model: tokens drawn one by one from one distribution. The reference that any model must beat.

It has the whole protocol of `lmx.models.protocol`, so it is scored, sampled from and mixed like any other
model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.errors import ConfigError, DataError
from lmx.core.nodes import node
from lmx.core.sharding import out_sharding, place

SLICE = 1 << 22  # tokens counted at a time: a memory-mapped stream is never in memory whole


@node
class UnigramReadout:
    """The head of a `Unigram`: the same logits at every position."""

    log_probabilities: Array  # (v,)

    def logits(self, features: Array) -> Array:
        """features (b, t, 0) to (b, t, v)."""
        v = self.log_probabilities.shape[0]
        logits = jnp.broadcast_to(self.log_probabilities.astype(jnp.float32), (*features.shape[:2], v))
        return place(logits, "batch", "sequence", "vocab")


@node
class Unigram:
    """p(token), whatever came before it.

    `log_probabilities` (v,) are normalised again wherever they are read, so the model stays a distribution
    when it is trained by gradient.
    """

    log_probabilities: Array  # (v,)

    @property
    def vocab_size(self) -> int:
        return self.log_probabilities.shape[0]

    def features(
        self, tokens: Array, *, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Array:
        """Nothing is known at a position: (b, t, 0)."""
        return place(jnp.zeros((*tokens.shape, 0), jnp.float32), "batch", "sequence", None)

    def readout(self) -> UnigramReadout:
        return UnigramReadout(self.log_probabilities)

    def log_probs(self, features: Array) -> Array:
        return jax.nn.log_softmax(self.readout().logits(features), axis=-1)

    def score(
        self, tokens: Array, *, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Array:
        log_probabilities = jax.nn.log_softmax(self.log_probabilities.astype(jnp.float32))
        targets = tokens[:, 1:]  # (b, t - 1)
        return log_probabilities.at[targets].get(
            out_sharding=out_sharding(targets.shape, "batch", "sequence")
        )

    def start(self, batch: int, length: int) -> tuple[()]:
        """There is nothing to remember: a state without leaves."""
        return ()

    def step(self, state: tuple[()], tokens: Array) -> tuple[Array, tuple[()]]:
        return self.log_probs(self.features(tokens)), state

    def rewind(self, state: tuple[()], lengths: Array) -> tuple[()]:
        return state


def fit(tokens: np.ndarray, vocab_size: int, *, smoothing: float = 1.0) -> Unigram:
    """The unigram model of a token stream: an integer array of any shape, memory-mapped or not.

    Raises DataError for an id outside 0 to vocab_size - 1; `smoothing` is that of `from_counts`.
    """
    flat = np.asarray(tokens).reshape(-1)
    if not np.issubdtype(flat.dtype, np.integer):
        raise DataError(f"the token stream holds {flat.dtype}; token ids are integers")
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, flat.size, SLICE):
        piece = flat[first : first + SLICE]
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise DataError(
                f"token id {wrong} does not fit a vocabulary of {vocab_size}: ids are 0 to {vocab_size - 1}"
            )
        counts += np.bincount(piece, minlength=vocab_size)
    return from_counts(counts, smoothing=smoothing)


def from_counts(counts: np.ndarray, *, smoothing: float = 1.0) -> Unigram:
    """The unigram model of counts (v,): p(token) = (count + smoothing) / (all counts + smoothing * v).

    `smoothing` 1 is Laplace's rule; 0 is maximum likelihood, under which a token never seen has
    log-probability -inf. Raises ConfigError for a negative smoothing, DataError for counts that give no
    distribution.
    """
    if not smoothing >= 0:
        raise ConfigError(f"smoothing is {smoothing}; it is added to every count and must be 0 or above")
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or (counts < 0).any():
        raise DataError(
            f"counts must be one number, 0 or above, per token; got an array of shape {counts.shape}"
        )
    mass = counts + smoothing
    if not mass.sum() > 0:
        raise DataError("there are no tokens to count, and smoothing is 0: give tokens, or smoothing above 0")
    with np.errstate(divide="ignore"):
        return Unigram(jnp.asarray(np.log(mass / mass.sum()), jnp.float32))
