"""Drafts for speculative decoding: what guesses the next few tokens of every row, cheaply.

A draft is any pytree with the methods of `Draft`. Two are here: `ModelDraft`, a smaller language model over the same
vocabulary, and `PromptLookup`, which copies what followed the last time the row's newest tokens occurred in it. A
guess may be as bad as it likes: `lmx.decode.speculative` keeps the target's distribution exactly, as long as the
draft states truthfully what distribution each of its tokens was drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.errors import ConfigError
from lmx.decode.rows import place_rows, prefill, rowwise
from lmx.decode.sampling import Sampling, choose, distribution, sample
from lmx.models.protocol import LanguageModel, take_token


class Proposal(NamedTuple):
    """Tokens that a draft proposes; `k` is its num_tokens."""

    tokens: Array  # (b, k) int32
    log_probs: Array | None  # (b, k, v): what each was drawn from; None: the draft would propose nothing else
    count: Array  # (b,) int32: how many of a row are meant, 0 to k; the others are never taken


@runtime_checkable
class Draft(Protocol):
    """What proposes tokens. `num_tokens`, at most so many a round, is static."""

    num_tokens: int

    def start(self, tokens: Array, lengths: Array, room: int) -> Any:
        """The state after prompts (b, t) of lengths (b,); `room`: the most positions that a row will ever have."""

    def propose(
        self, state: Any, text: Array, lengths: Array, sampling: Sampling, key: Array | None
    ) -> tuple[Proposal, Any]:
        """What may follow the first lengths (b,) tokens of text (b, s), and a state of unchanged structure.

        The text so far begins with that of the round before, whose proposals may have been dropped in part.
        """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelDraft:
    """A smaller language model that proposes by the same sampling options as the target.

    A round costs it num_tokens + 1 steps: the last proposal is read as well, since it may be accepted.
    """

    model: LanguageModel
    num_tokens: int = field(default=4, metadata=dict(static=True))

    def start(self, tokens: Array, lengths: Array, room: int) -> Any:
        state, _, real = prefill(self.model, tokens, lengths, room)
        return self.model.rewind(state, real - 1)

    def propose(
        self, state: Any, text: Array, lengths: Array, sampling: Sampling, key: Array | None
    ) -> tuple[Proposal, Any]:
        state = self.model.rewind(state, lengths - 1)
        keys = None if key is None else jax.random.split(key, self.num_tokens)
        seen = seen_tokens(text, lengths, self.model.vocab_size, sampling)

        def step(carry: tuple, key: Array | None) -> tuple[tuple, tuple[Array, Array | None]]:
            state, token, seen = carry
            log_probs, state = self.model.step(state, token[:, None])
            log_probs = place_rows(log_probs[:, 0])  # (b, v)
            final = None if sampling.greedy else distribution(log_probs, sampling, seen)
            token = place_rows(choose(None, log_probs, sampling, seen) if sampling.greedy else sample(key, final))
            if seen is not None:
                seen = seen | (jnp.arange(seen.shape[1]) == token[:, None])
            return (state, token, seen), (token, final)

        begin = (state, take_token(text, lengths - 1), seen)
        (state, token, _), (tokens, log_probs) = jax.lax.scan(step, begin, keys, length=self.num_tokens)
        _, state = self.model.step(state, token[:, None])
        log_probs = None if log_probs is None else jnp.swapaxes(log_probs, 0, 1)
        return Proposal(jnp.swapaxes(tokens, 0, 1), log_probs, jnp.full_like(lengths, self.num_tokens)), state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed the latest earlier occurrence of the row's newest tokens, in prompt or answer (Saxena
    2023, "Prompt lookup decoding"): of the newest max_ngram tokens, else of one fewer, and so on to one.

    Costs next to nothing, and pays where a text repeats its source: summaries, edits, code. Where nothing recurs it
    proposes nothing.
    """

    num_tokens: int = field(default=8, metadata=dict(static=True))
    max_ngram: int = field(default=3, metadata=dict(static=True))

    def __post_init__(self) -> None:
        if isinstance(self.max_ngram, bool) or not hasattr(self.max_ngram, "__index__") or self.max_ngram < 1:
            raise ConfigError(f"max_ngram is {self.max_ngram!r}; it must be a whole number, 1 or above")

    def start(self, tokens: Array, lengths: Array, room: int) -> tuple[()]:
        return ()

    def propose(
        self, state: tuple[()], text: Array, lengths: Array, sampling: Sampling, key: Array | None
    ) -> tuple[Proposal, tuple[()]]:
        shape = (text.shape[0], self.num_tokens)
        like = (jax.ShapeDtypeStruct(shape, jnp.int32), lengths)
        tokens, count = rowwise(jax.vmap(self._look), like, text, lengths)
        return Proposal(tokens, None, count), state

    def _look(self, row: Array, n: Array) -> tuple[Array, Array]:
        """What followed in one row (s,) of n known tokens: ((k,) tokens, how many of them are known)."""
        places, begin = jnp.arange(row.size), n
        for size in range(1, self.max_ngram + 1):  # a longer match takes the place of a shorter one
            same = (places + size < n) & (n > size)
            for j in range(size):
                same = same & (jnp.roll(row, -j) == row[n - size + j])
            latest = jnp.max(jnp.where(same, places, -1))
            begin = jnp.where(latest >= 0, latest + size, begin)
        tokens = row[jnp.clip(begin + jnp.arange(self.num_tokens), 0, row.size - 1)]
        return tokens, jnp.clip(n - begin, 0, self.num_tokens).astype(jnp.int32)


def seen_tokens(text: Array, lengths: Array, vocab_size: int, sampling: Sampling) -> Array | None:
    """Which tokens (b, v) the first lengths (b,) of text (b, s) hold, for the repetition penalty; None without one."""
    if sampling.repetition_penalty is None:
        return None
    mark = lambda row, n: jnp.zeros((vocab_size,), bool).at[row].max(jnp.arange(row.size) < n)  # noqa: E731
    return rowwise(jax.vmap(mark), jax.ShapeDtypeStruct((text.shape[0], vocab_size), bool), text, lengths)
