"""An encoder-decoder that has read its source, which makes it a language model like any other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmx.core.errors import ConfigError
from lmx.core.nodes import node
from lmx.models import cache
from lmx.models.cache import DecodeState
from lmx.models.protocol import score_in_chunks
from lmx.nn.heads import Readout


@node
class Conditional:
    """An encoder-decoder that has read its source: a language model of the target. Made by `Model.given`."""

    model: Any  # the encoder-decoder
    memory: Any  # (b, s, d)
    segment_ids: Any = None  # (b, s): 0 is padding

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_length(self) -> int | None:
        return self.model.max_length

    @property
    def stretch(self) -> tuple[str, int] | None:
        return self.model.stretch

    def features(self, tokens, *, segment_ids=None, positions=None) -> jax.Array:
        """(b, t) -> (b, t, d): each row given the source of its own row, whatever its segments."""
        real = None if self.segment_ids is None else self.segment_ids != 0
        if real is not None:
            real = jnp.broadcast_to(real[:, None, :], (*tokens.shape, real.shape[1]))
        given = {"memory": self.memory, "memory_mask": real}
        return self.model.run_tower("decoder", tokens, segment_ids, positions, None, **given)

    def readout(self) -> Readout:
        return self.model.readout()

    def logits(self, tokens, *, segment_ids=None, positions=None) -> jax.Array:
        """(b, t) -> (b, t, v) float32."""
        return self.readout().logits(self.features(tokens, segment_ids=segment_ids, positions=positions))

    def log_probs(self, features: jax.Array) -> jax.Array:
        """(b, t, d) -> (b, t, v) float32, normalised."""
        return self.model.log_probs(features)

    def score(self, tokens, *, segment_ids=None, positions=None) -> jax.Array:
        """(b, t) -> (b, t-1) float32: log p(tokens[:, i+1] | tokens[:, :i+1], source)."""
        self.model.require_vocabulary()
        return score_in_chunks(self, tokens, segment_ids=segment_ids, positions=positions)

    def start(self, batch: int, length: int) -> DecodeState:
        """An empty state for as many rows as there are sources. Raises ConfigError for other numbers, or as `Model`."""
        self.model.require_vocabulary()
        if batch != self.memory.shape[0]:
            raise ConfigError(f"{batch} rows are to be decoded and {self.memory.shape[0]} sources were given")
        state = self.model.start_decoder(batch, length)
        return cache.remember(self.model.config, self.model.params.decoder, state, self.memory, self.segment_ids)

    def step(self, state: DecodeState, tokens: jax.Array) -> tuple[jax.Array, DecodeState]:
        """Feed tokens (b, q): (log-probabilities (b, q, v) of the token after each, the new state)."""
        return self.model.step(state, tokens)

    def rewind(self, state: DecodeState, lengths: jax.Array) -> DecodeState:
        """The state as if only the first lengths (b,) tokens of each row had been fed."""
        return self.model.rewind(state, lengths)
