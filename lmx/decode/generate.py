"""Tokens from any language model: a prefill, then one compiled loop (`generate`) or step (`stream`).

Read `begin` and `advance`: all else is checking what was given and gathering what comes out. The prompts but
for their last tokens are fed in one step; then every round feeds one token a row and chooses the next, so
that no log-probabilities are computed that nobody asks for, and rows of unlike length differ in nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.decode import stopping
from lmx.decode.drafts import seen_tokens
from lmx.decode.request import Request, check, given
from lmx.decode.rows import for_steps, place_rows, prefill
from lmx.decode.sampling import Sampling, choose
from lmx.models.protocol import LanguageModel, take_token


class Generated(NamedTuple):
    """What `generate` returns; `n` is max_new_tokens."""

    tokens: Array  # (b, n) int32: the new tokens, `pad_id` after the end of a row
    lengths: Array  # (b,) int32: new tokens of each row, the end-of-sequence token or stop sequence included
    log_probs: Array  # (b, n) float32: log-probability under the model, before any filter; 0 after the end


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """Where decoding stands: the carry of the loop."""

    state: Any  # the model's, rows first; has seen everything but `tokens`
    tokens: Array  # (b,) int32: the newest token of each row, to be fed next
    log_probs: Array  # (b,) float32: theirs under the model
    count: Array  # () int32: how many were chosen
    ended: Array  # (b,) bool
    recent: Array | None  # (b, s) int32: the newest new tokens, if there is anything to stop at
    seen: Array | None  # (b, v) bool: tokens of the prompt and since, if repetition is penalised


def begin(
    model: LanguageModel, tokens: Array, lengths: Array | None, request: Request, length: int
) -> Progress:
    """Prefill: feed the prompts (b, t) but for their last tokens, into a state with room for `length`."""
    b = tokens.shape[0]
    state, last, real = prefill(model, tokens, lengths, length)
    return Progress(
        state=state,
        tokens=last,
        log_probs=place_rows(jnp.zeros((b,), jnp.float32)),
        count=jnp.zeros((), jnp.int32),
        ended=place_rows(jnp.zeros((b,), bool)),
        recent=None if request.endings is None else place_rows(stopping.newest(b, request.endings)),
        seen=seen_tokens(place_rows(tokens), real, model.vocab_size, request.sampling),
    )


def advance(model: LanguageModel, progress: Progress, request: Request) -> Progress:
    """One more token for every row; rows that have ended get `pad_id`."""
    log_probs, state = model.step(progress.state, progress.tokens[:, None])
    log_probs = place_rows(log_probs[:, 0])  # (b, v)
    key = None if request.key is None else jax.random.fold_in(request.key, progress.count)
    tokens = choose(key, log_probs, request.sampling, progress.seen)
    tokens = jnp.where(progress.ended, request.pad_id, tokens)  # (b,)
    ended, recent, seen = progress.ended, progress.recent, progress.seen
    if recent is not None:
        recent = stopping.push(recent, tokens)
        ended = ended | stopping.ends(recent, request.endings)
    if seen is not None:
        seen = seen | (jnp.arange(seen.shape[1]) == tokens[:, None])
    chosen = jnp.where(progress.ended, 0.0, take_token(log_probs, tokens))
    return Progress(state, tokens, chosen, progress.count + 1, ended, recent, seen)


def generate(
    model: LanguageModel,
    tokens: Array,
    *,
    max_new_tokens: int,
    lengths: Array | None = None,
    encoder_tokens: Array | None = None,
    encoder_segment_ids: Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    pad_id: int = 0,
    key: Array | None = None,
) -> Generated:
    """Continue prompts: tokens (b, t) to `max_new_tokens` new tokens a row, fewer where a row ends.

    Args:
      model: any language model (`lmx.models.protocol`).
      tokens: (b, t) prompts; of unlike length, padded on the right with any token, which is never seen.
      lengths: (b,) of the prompts, if they are of unlike length.
      encoder_tokens, encoder_segment_ids: (b, s), for an encoder-decoder: the source of each row, padding in segment 0.
        The prompts are then what the decoder begins with, its start token (b, 1). Other functions of `lmx.decode` take
        `model.given(encoder_tokens, encoder_segment_ids)`.
      temperature: 0 takes the most probable token (greedy), else tokens are drawn with `key`.
      top_k, top_p, min_p, repetition_penalty: see `lmx.decode.sampling`; None leaves one out.
      eos_id: the token that ends a row, or several of them.
      stop: token sequences that end a row as soon as its new tokens end with one.
      pad_id: what stands after the end of a row.

    The result is a function of the arguments, `key` included. The loop ends when every row has. May be called
    under `jit`; then values (prompt lengths, ids) are not checked. New values of temperature, top_p, min_p,
    penalty, key or prompt compile nothing new, new shapes and other options do.

    Raises ConfigError for options that cannot be, a prompt with no token, a prompt with max_new_tokens beyond
    the model's `max_length`, an encoder-decoder without a source or another model with one; DataError for token ids
    outside the vocabulary.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    request = Request(sampling, stopping.endings(eos_id, stop), pad_id, key)
    model = given(model, encoder_tokens, encoder_segment_ids)
    tokens, lengths = check(model, tokens, lengths, max_new_tokens, request)
    return _generate(model, tokens, lengths, request, int(max_new_tokens))


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _generate(
    model: LanguageModel, tokens: Array, lengths: Array | None, request: Request, max_new_tokens: int
) -> Generated:
    model = for_steps(model, tokens.shape[0])
    progress = begin(model, tokens, lengths, request, tokens.shape[1] + max_new_tokens)
    b = tokens.shape[0]
    nothing = Generated(
        tokens=place_rows(jnp.full((b, max_new_tokens), request.pad_id, jnp.int32)),
        lengths=place_rows(jnp.zeros((b,), jnp.int32)),
        log_probs=place_rows(jnp.zeros((b, max_new_tokens), jnp.float32)),
    )

    def unfinished(carry: tuple[Progress, Generated]) -> Array:
        return (carry[0].count < max_new_tokens) & ~carry[0].ended.all()

    def step(carry: tuple[Progress, Generated]) -> tuple[Progress, Generated]:
        old, made = carry
        new = advance(model, old, request)
        return new, Generated(
            tokens=made.tokens.at[:, old.count].set(new.tokens),
            lengths=made.lengths + ~old.ended,
            log_probs=made.log_probs.at[:, old.count].set(new.log_probs),
        )

    return jax.lax.while_loop(unfinished, step, (progress, nothing))[1]


def stream(
    model: LanguageModel,
    tokens: Array,
    *,
    max_new_tokens: int,
    lengths: Array | None = None,
    encoder_tokens: Array | None = None,
    encoder_segment_ids: Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    pad_id: int = 0,
    key: Array | None = None,
    **sampling: Any,
) -> Iterator[np.ndarray]:
    """`generate`, a token at a time: yields (b,) int32, the next token of every row, until all have ended.

    The same arguments (`sampling`: temperature, top_k, top_p, min_p, repetition_penalty), the same tokens,
    the same errors, raised by the call itself. Not for use under `jit`.
    """
    request = Request(Sampling(**sampling), stopping.endings(eos_id, stop), pad_id, key)
    model = given(model, encoder_tokens, encoder_segment_ids)
    tokens, lengths = check(model, tokens, lengths, max_new_tokens, request)

    def pieces() -> Iterator[np.ndarray]:
        whole = _for_steps(model, tokens.shape[0])  # once: a step that did it would copy every weight
        progress = _begin(whole, tokens, lengths, request, tokens.shape[1] + int(max_new_tokens))
        for _ in range(max_new_tokens):
            progress = _advance(whole, progress, request)
            yield np.asarray(progress.tokens)
            if np.asarray(progress.ended).all():
                return

    return pieces()


_for_steps = jax.jit(for_steps, static_argnames="rows")
_begin = jax.jit(begin, static_argnames="length")
_advance = jax.jit(advance, donate_argnames="progress")
