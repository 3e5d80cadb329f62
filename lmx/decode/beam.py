"""Beam search: the most probable continuations instead of one drawn at random.

Every step extends the `num_beams` running hypotheses of a row by every token, keeps the best candidates, moves those
that ended into a table of finished hypotheses ordered by score, and goes on with the best that did not. A score is
the sum of log-probabilities over (new tokens ** length_penalty) (Wu et al. 2016, section 7, in the form of Hugging
Face). Rows never see each other: a row in a ragged batch gives what it gives alone.

Scores of places that are still empty are `EMPTY`, in float32 far below any other; sums with it are what make ties
and cut-offs equal to those of transformers 5, the reference for this file.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.errors import ConfigError
from lmx.decode import stopping
from lmx.decode.request import Request, check
from lmx.decode.rows import for_steps, place_rows, prefill, rowwise, take_rows
from lmx.decode.sampling import Sampling
from lmx.models.protocol import LanguageModel

EMPTY = -1e9


class Beams(NamedTuple):
    """What `beam_search` returns, best first; `r` is num_return_sequences, `n` max_new_tokens."""

    sequences: Array  # (b, r, n) int32: the new tokens, `pad_id` after the end of each
    lengths: Array  # (b, r) int32: new tokens of each, the end-of-sequence token included
    scores: Array  # (b, r) float32: sum of log-probabilities / lengths ** length_penalty


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Options:
    """How to search; a pytree, so that another length penalty compiles nothing new."""

    length_penalty: float | Array
    eos_ids: Array | None  # (e,)
    pad_id: int | Array
    num_beams: int = field(metadata=dict(static=True))
    early_stopping: bool | str = field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """The running and the finished hypotheses of every row, each kind best first: what the loop carries."""

    running: Array  # (b, k, n) int32
    running_scores: Array  # (b, k): sums of log-probabilities
    sequences: Array  # (b, k, n) int32: the finished ones
    lengths: Array  # (b, k) int32
    scores: Array  # (b, k): with the length penalty; EMPTY where there is none yet
    finished: Array  # (b, k) bool: whether there is one
    improvable: Array  # (b,) bool: whether a running one may still displace a finished one
    count: Array  # () int32: new tokens so far
    open: Array  # () bool: whether any candidate of the last step goes on


def beam_search(
    model: LanguageModel,
    tokens: Array,
    *,
    max_new_tokens: int,
    num_beams: int,
    lengths: Array | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
) -> Beams:
    """The best continuations of prompts (b, t) that a search of width `num_beams` finds: token for token, with the
    same scores, those of transformers' `generate(num_beams=..., do_sample=False)`.

    Args:
      model: any language model (`lmx.models.protocol`); must `rewind` if `lengths` are given.
      tokens: (b, t) prompts; of unlike length, padded on the right with any token, which is never seen.
      lengths: (b,) of the prompts, if they are of unlike length.
      num_beams: hypotheses kept a row; 1 is greedy search.
      length_penalty: above 0 favors long hypotheses, below 0 short ones, 0 the plain sum of log-probabilities.
      early_stopping: True ends a row as soon as it has num_beams finished hypotheses; False, once its best running
        one, at its present length, scores below the worst finished one; "never", once no running one can do better
        at any length up to max_new_tokens (for a penalty above 0; else as False).
      num_return_sequences: how many a row, the best first; at most num_beams.
      eos_id: the token that ends a hypothesis, or several of them; None ends them at max_new_tokens alone.

    A step costs one step of the model on b * num_beams rows and one copy of their state; the prompts are fed once a
    row. May be called under `jit`; a new length penalty or prompt compiles nothing new.

    Raises ConfigError and DataError as `lmx.decode.generate` does, and for options of the search that cannot be.
    """
    _check_options(num_beams, num_return_sequences, early_stopping, length_penalty)
    endings = stopping.endings(eos_id, ())
    tokens, lengths = check(model, tokens, lengths, max_new_tokens, Request(Sampling(), endings, pad_id, None))
    eos_ids = None if endings is None else endings[:, 0]
    options = Options(length_penalty, eos_ids, pad_id, int(num_beams), early_stopping)
    return _search(model, tokens, lengths, options, int(max_new_tokens), int(num_return_sequences))


def _check_options(num_beams: Any, num_return_sequences: Any, early_stopping: Any, length_penalty: Any) -> None:
    for name, value in dict(num_beams=num_beams, num_return_sequences=num_return_sequences).items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or above")
    if num_return_sequences > num_beams:
        raise ConfigError(
            f"num_return_sequences={num_return_sequences} asks for more hypotheses than the search keeps; raise "
            f"num_beams from {num_beams} to {num_return_sequences}"
        )
    if early_stopping not in (True, False, "never"):
        raise ConfigError(f"early_stopping is {early_stopping!r}; it must be True, False or 'never'")
    if not isinstance(length_penalty, jax.core.Tracer) and not np.isfinite(length_penalty):
        raise ConfigError(f"length_penalty is {length_penalty}; it must be finite: 1 is usual, 0 is no penalty")


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "returned"))
def _search(
    model: LanguageModel, tokens: Array, lengths: Array | None, options: Options, max_new_tokens: int, returned: int
) -> Beams:
    (b, t), k = tokens.shape, options.num_beams
    model = for_steps(model, b * k)
    state, last, _ = prefill(model, tokens, lengths, t + max_new_tokens)
    same = place_rows(jnp.zeros((b, k), jnp.int32))
    state, last = take_rows((state, last), same)  # every beam begins as a copy of its row

    def unfinished(carry: tuple[Any, Array, Hypotheses]) -> Array:
        h = carry[2]
        enough = h.finished.all() if options.early_stopping is True else False
        return h.improvable.any() & ~jnp.asarray(enough) & h.open

    def step(carry: tuple[Any, Array, Hypotheses]) -> tuple[Any, Array, Hypotheses]:
        state, last, old = carry
        before = state
        log_probs, state = model.step(state, last[:, None])
        like = (old, last, same)
        new, last, parents = rowwise(_extend, like, place_rows(log_probs[:, 0]), old, options)
        return take_rows(state, parents, before), last, new

    begun = _nothing(b, k, max_new_tokens, options.pad_id)
    best = jax.lax.while_loop(unfinished, step, (state, last, begun))[2]
    return Beams(best.sequences[:, :returned], best.lengths[:, :returned], best.scores[:, :returned])


def _nothing(b: int, k: int, n: int, pad_id: int | Array) -> Hypotheses:
    """No finished hypothesis, and one running one a row: the copies of it must not count."""
    tokens = place_rows(jnp.full((b, k, n), pad_id, jnp.int32))
    empty = place_rows(jnp.full((b, k), EMPTY, jnp.float32))
    return Hypotheses(
        running=tokens,
        running_scores=place_rows(jnp.broadcast_to(jnp.where(jnp.arange(k) == 0, 0.0, EMPTY), (b, k))),
        sequences=tokens,
        lengths=place_rows(jnp.zeros((b, k), jnp.int32)),
        scores=empty,
        finished=place_rows(jnp.zeros((b, k), bool)),
        improvable=place_rows(jnp.ones((b,), bool)),
        count=jnp.zeros((), jnp.int32),
        open=jnp.ones((), bool),
    )


def _extend(log_probs: Array, old: Hypotheses, options: Options) -> tuple[Hypotheses, Array, Array]:
    """One step: log_probs (b * k, v) of the next token to (hypotheses, newest tokens (b * k,), parents (b, k)).

    A parent is the running hypothesis, 0 to k - 1, that a new running one extends.
    """
    (b, k, n), v = old.running.shape, log_probs.shape[-1]
    ends = 1 if options.eos_ids is None else options.eos_ids.shape[0]
    kept = min((1 + ends) * k, k * v)  # so many that k of them go on, even if every ending takes its share
    each = min(kept, v)  # of one beam: the best of all are among the best of each
    values, ids = jax.lax.top_k(log_probs, each)
    values = values.reshape(b, k, each) + old.running_scores[..., None]
    sums, at = jax.lax.top_k(values.reshape(b, k * each), kept)  # (b, kept)
    parents, chosen = at // each, jnp.take_along_axis(ids.reshape(b, k * each), at, axis=1)
    sequences = _take(old.running, parents).at[:, :, old.count].set(chosen)
    length = old.count + 1
    ended = jnp.broadcast_to(length >= n, chosen.shape)
    if options.eos_ids is not None:
        ended = ended | (chosen[..., None] == options.eos_ids).any(-1)
    running_scores, best = jax.lax.top_k(sums + EMPTY * ended, k)
    finished = _finish(old, sequences, sums, ended, options)
    new = Hypotheses(
        running=_take(sequences, best),
        running_scores=running_scores,
        **finished,
        improvable=old.improvable & _improvable(running_scores[:, 0], finished, length, n, options),
        count=length,
        open=~ended.all(),
    )
    return new, _take(chosen, best).reshape(b * k), _take(parents, best)


def _finish(old: Hypotheses, sequences: Array, sums: Array, ended: Array, options: Options) -> dict[str, Array]:
    """The k best of the finished hypotheses so far and the candidates (b, kept, n) that have just ended.

    Of the candidates only the first k may finish: the others stand by to keep the search going.
    """
    k, length = options.num_beams, old.count + 1
    just = ended & (jnp.arange(ended.shape[1]) < k)
    scores = sums / _penalty(length, options)
    closed = ~old.improvable[:, None]
    if options.early_stopping is True:
        scores = scores + EMPTY * old.finished.all(axis=1, keepdims=True)
    scores = (scores + EMPTY * closed) + EMPTY * ~just
    lengths = jnp.broadcast_to(length, just.shape)
    merged = [
        jnp.concatenate(pair, axis=1)
        for pair in (
            (old.sequences, sequences), (old.lengths, lengths), (old.scores, scores), (old.finished, just)
        )
    ]  # fmt: skip
    best = jax.lax.top_k(merged[2], k)[1]
    names = ("sequences", "lengths", "scores", "finished")
    return {name: _take(value, best) for name, value in zip(names, merged, strict=True)}


def _improvable(best: Array, finished: dict[str, Array], length: Array, n: int, options: Options) -> Array:
    """Whether the best running sum (b,) could still displace the worst finished hypothesis of its row: (b,) bool."""
    reach = length
    if options.early_stopping == "never":
        reach = jnp.where(jnp.asarray(options.length_penalty) > 0, n, length)
    possible = best / _penalty(reach, options)
    worst = jnp.where(finished["finished"], finished["scores"].min(axis=1, keepdims=True), EMPTY)
    return (possible[:, None] > worst).any(axis=1)


def _penalty(length: Array, options: Options) -> Array:
    return jnp.asarray(length, jnp.float32) ** options.length_penalty


def _take(values: Array, at: Array) -> Array:
    """values (b, m, ...) at (b, k) to (b, k, ...)."""
    return jax.vmap(lambda rows, at: rows[at])(values, at)
