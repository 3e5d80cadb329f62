"""What a language model is to everything above it: a frozen pytree with the methods of `LanguageModel`.

Transformers, n-grams, mixtures and products all have these methods, so that losses, evaluation and decoding
take any of them. Here too: what every member can do with them, such as scoring long text without ever
holding the (b, t, v) array.

Shapes: `b` batch, `t` position, `q` new positions of a step, `v` vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array


class Readout(Protocol):
    """The part of a model that turns features into a distribution over the vocabulary: a small pytree."""

    def logits(self, features: Any) -> Array:
        """Features with leaves (b, t, ...) to float32 logits (b, t, v), up to a constant per position."""


@runtime_checkable
class LanguageModel(Protocol):
    """A distribution over token sequences, as a frozen pytree whose methods are pure and can be jitted.

    A model that reads at most so many tokens also has an attribute `max_length: int`; none, or None, is no
    limit. One that can be arranged better for many steps has `for_steps(rows)`, which gives the model so arranged for
    steps of so many rows; decoding calls it once, on every part of a model that has it.
    """

    @property
    def vocab_size(self) -> int:
        """The number of tokens, `v`; ids are 0 to v - 1."""

    def features(
        self, tokens: Array, *, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Any:
        """What is known at every position of tokens (b, t) before the head: leaves (b, t, ...).

        `segment_ids` (b, t): positions see only their own segment; 0 is padding. `positions` (b, t): the
        place of each token in its segment; counted from 0 where it is not given.
        """

    def readout(self) -> Readout:
        """The head alone, `.logits(features) -> (b, t, v)`: what a loss needs to go through it in chunks."""

    def log_probs(self, features: Any) -> Array:
        """Features to normalised log-probabilities (b, t, v) in float32 of the next token."""

    def score(
        self, tokens: Array, *, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Array:
        """(b, t) to (b, t - 1) float32: [:, i] is log p(tokens[:, i + 1] | tokens[:, :i + 1])."""

    def start(self, batch: int, length: int) -> Any:
        """The state before any token, room for `length` positions: leaves batch-first, of fixed shape."""

    def step(self, state: Any, tokens: Array) -> tuple[Array, Any]:
        """Feed tokens (b, q): log-probabilities (b, q, v), normalised, float32, and the new state.

        Position j of the result predicts the token after tokens[:, j].
        """

    def rewind(self, state: Any, lengths: Array) -> Any:
        """The state as if only the first lengths[i] (b,) tokens of row i had been fed.

        Raises NotImplementedError in a model that cannot.
        """


def take_token(values: Array, tokens: Array) -> Array:
    """values (..., v) at tokens (...): a masked sum instead of a gather, so that `v` may be sharded."""
    ids = jnp.arange(values.shape[-1], dtype=tokens.dtype)
    return jnp.sum(jnp.where(ids == tokens[..., None], values, 0), axis=-1, dtype=values.dtype)


def target_log_probs(model: LanguageModel, features: Any, targets: Array, chunk: int = 128) -> Array:
    """log p(targets (b, t)) at features with leaves (b, t, ...): (b, t) float32, also when differentiated.

    `chunk` positions at a time: at no time more than (b, chunk, v) logits exist; the backward pass computes
    them again. Any chunk gives the same numbers up to rounding.
    """
    readout, (b, t) = model.readout(), targets.shape
    chunk = max(1, min(chunk, t))

    @jax.checkpoint
    def score(piece: tuple[Any, Array]) -> Array:
        logits = readout.logits(piece[0])  # (b, chunk, v)
        return take_token(logits, piece[1]) - jax.nn.logsumexp(logits, axis=-1)

    chunks = jax.tree.map(lambda leaf: split_chunks(leaf, chunk), (features, targets))
    scores = jax.lax.map(score, chunks)  # (chunks, b, chunk)
    return jnp.moveaxis(scores, 0, 1).reshape(b, -(-t // chunk) * chunk)[:, :t]


def score_in_chunks(
    model: LanguageModel,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    positions: Array | None = None,
    chunk: int = 128,
) -> Array:
    """`model.score` by `target_log_probs`: tokens (b, t) to (b, t - 1) float32."""
    features = model.features(tokens, segment_ids=segment_ids, positions=positions)
    known = jax.tree.map(lambda leaf: leaf[:, :-1], features)
    return target_log_probs(model, known, tokens[:, 1:], chunk)


def split_chunks(leaf: Array, chunk: int) -> Array:
    """(b, t, ...) to (chunks, b, chunk, ...), zeros behind the last position."""
    b, t, *rest = leaf.shape
    padded = jnp.pad(leaf, [(0, 0), (0, -t % chunk)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(padded.reshape(b, -(-t // chunk), chunk, *rest), 1, 0)
