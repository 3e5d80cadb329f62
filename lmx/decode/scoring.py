"""Scores of given texts: how probable a language model finds continuations, and whole texts of any length.

    score_continuations(model, contexts, continuations)    what multiple-choice benchmarks need
    score_rolling(model, texts, prefix_id=..., max_length=...)    perplexity of texts longer than the model reads

Token ids go in and sums of log-probabilities (nats) come out, in the order given. Texts are sorted by length, cut
into batches of one size, and padded to few lengths, so that few programs are compiled; the vocabulary is computed
at the continuations alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.errors import ConfigError, DataError
from lmx.core.sharding import place
from lmx.decode.rows import place_rows
from lmx.models.padding import pad, padded_length
from lmx.models.protocol import LanguageModel, split_chunks, take_token

log = logging.getLogger("lmx")
SHORTEST = 32  # texts are padded to this many tokens at least,
FEWEST = 8  # and continuations to this many
CHUNK = 64  # positions whose vocabulary is computed at a time


class Scores(NamedTuple):
    """What `score_continuations` returns; `n` pairs, in the order given. All numpy."""

    log_probs: np.ndarray  # (n,) float64: log p(continuation | context), summed over its tokens
    greedy: np.ndarray  # (n,) bool: whether every token of it is the most probable one at its place
    tokens: np.ndarray  # (n,) int: tokens of the continuation
    truncated: np.ndarray  # (n,) int: tokens of the context left out, from the left, for want of room


class RollingScores(NamedTuple):
    """What `score_rolling` returns; `n` texts, in the order given. All numpy."""

    log_probs: np.ndarray  # (n,) float64: log p(text), summed over its tokens
    tokens: np.ndarray  # (n,) int


def score_continuations(
    model: LanguageModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Scores:
    """log p(continuation | context) of each pair of token sequences.

    contexts:   at least one token each; where there is none, the end-of-sequence (or begin-of-sequence) token.
    max_length: the most tokens that the model is given at once (the last token of a continuation is predicted, not
                read); by default the model's own. A longer pair loses tokens of its context, from the left, which
                `truncated` counts and one warning reports; its continuation stays whole.

    Raises DataError for an empty context or continuation, a continuation that does not fit max_length (naming the
    pair), or a token id outside the vocabulary; ConfigError for lists of unlike length, a size below 1 or a
    model that gives no next token, such as an encoder.
    """
    limit = _limit(model, max_length, batch_size)
    jax.eval_shape(lambda m: m.score(jnp.zeros((batch_size, 2), jnp.int32)), model)  # or it says why it cannot
    if len(contexts) != len(continuations):
        raise ConfigError(
            f"there are {len(contexts)} contexts and {len(continuations)} continuations; give one context to each"
        )
    texts, counts, truncated = [], np.zeros(len(contexts), int), np.zeros(len(contexts), int)
    for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        texts.append(_joined(i, context, continuation, limit, model.vocab_size))
        counts[i] = len(continuation)
        truncated[i] = len(context) + len(continuation) - texts[-1].size
    if truncated.any():
        log.warning(
            "%d of %d contexts were cut from the left to fit %s tokens; the longest lost %d",
            (truncated > 0).sum(), len(truncated), limit, truncated.max(),
        )  # fmt: skip
    log_probs, greedy = np.zeros(len(texts)), np.zeros(len(texts), bool)
    for rows, batch in _batches(texts, counts, batch_size, limit):
        sums, same = _score(model, **batch)
        log_probs[rows], greedy[rows] = np.asarray(sums)[: len(rows)], np.asarray(same)[: len(rows)]
    return Scores(log_probs, greedy, counts, truncated)


def score_rolling(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    *,
    prefix_id: int,
    max_length: int | None = None,
    context: int = 1,
    batch_size: int = 32,
) -> RollingScores:
    """log p(text) of token sequences of any length, in windows of at most `max_length` tokens.

    Every token is predicted exactly once: the first from `prefix_id` (the end- or begin-of-sequence token), the
    others from all that their window holds before them, at least `context` tokens. As in lm-evaluation-harness the
    last window reaches back as far as it has room. An empty text has log-probability 0.

    Raises ConfigError where there is no max_length, or one with no room for the context; else as score_continuations.
    """
    limit = _limit(model, max_length, batch_size)
    if limit is None:
        raise ConfigError("this model reads texts of any length: give max_length=, the window to score them in")
    if not 1 <= context <= limit:
        raise ConfigError(f"context is {context}; with windows of {limit} tokens it must be 1 to {limit}")
    owners, heads, tails = [], [], []
    for i, text in enumerate(texts):
        for head, tail in _windows([prefix_id, *text], limit, context):
            owners.append(i)
            heads.append(head)
            tails.append(tail)
    scores = score_continuations(model, heads, tails, batch_size=batch_size, max_length=limit)
    log_probs = np.bincount(np.array(owners, int), scores.log_probs, minlength=len(texts))
    return RollingScores(log_probs, np.array([len(text) for text in texts], int))


def _windows(text: list[int], limit: int, context: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens to predict) pairs that cover text[1:] once; a pair reads at most `limit` tokens."""
    done = 1
    while done < len(text):
        room = limit if done == 1 else limit - context + 1
        end = min(done + room, len(text))
        yield text[max(0, end - limit - 1) : done], text[done:end]
        done = end


def _limit(model: LanguageModel, max_length: Any, batch_size: Any) -> int | None:
    for name, value in dict(max_length=max_length, batch_size=batch_size).items():
        unfit = isinstance(value, bool) or not hasattr(value, "__index__") or value < 1
        if value is not None and unfit or value is None and name == "batch_size":
            raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or above")
    own = getattr(model, "max_length", None)
    if max_length is not None and own is not None and max_length > own:
        raise ConfigError(f"max_length is {max_length}, and this model reads at most {own} tokens")
    return own if max_length is None else int(max_length)


def _joined(i: int, context: Any, continuation: Any, limit: int | None, vocab_size: int) -> np.ndarray:
    """One pair as it is given to the model, without what there is no room for, and with its last token."""
    if not len(context) or not len(continuation):
        what = "continuation" if len(context) else "context"
        hint = "" if len(context) else ": where nothing stands before, give the end- or begin-of-sequence token"
        raise DataError(f"pair {i} has an empty {what}{hint}")
    text = np.asarray([*context, *continuation])
    whole = np.issubdtype(text.dtype, np.integer)
    if not whole or text.min() < 0 or text.max() >= vocab_size:
        wrong = text.dtype if not whole else text.min() if text.min() < 0 else text.max()
        raise DataError(f"pair {i} holds {wrong}; token ids of this model are 0 to {vocab_size - 1}")
    if limit is not None and len(continuation) > limit:
        raise DataError(
            f"the continuation of pair {i} has {len(continuation)} tokens, and the model reads at most {limit}: "
            "shorten it, or score it in windows with score_rolling"
        )
    return text if limit is None else text[-(limit + 1) :]


def _batches(
    texts: list[np.ndarray], counts: np.ndarray, batch_size: int, limit: int | None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(the indices of the texts, arguments of `_score`), the longest first: what does not fit fails at once."""
    order = sorted(range(len(texts)), key=lambda i: (-texts[i].size, -counts[i]))
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        length = padded_length(max(texts[i].size for i in rows) - 1, SHORTEST)
        length = length if limit is None else min(length, limit)
        width = min(length, padded_length(max(int(counts[i]) for i in rows), FEWEST))
        first, size = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
        for row, i in enumerate(rows):
            first[row], size[row] = texts[i].size - 1 - counts[i], counts[i]
        tokens = pad([texts[i][:-1] for i in rows], length, batch_size)
        targets = pad([texts[i][-counts[i] :] for i in rows], width, batch_size)
        yield rows, dict(tokens=tokens, targets=targets, first=first, size=size)


@jax.jit
def _score(model: LanguageModel, tokens: Array, targets: Array, first: Array, size: Array) -> tuple[Array, Array]:
    """(sums (b,), whether all are the argmax (b,)) of the first size (b,) of targets (b, m), which the model
    predicts at places first (b,) and after of tokens (b, t)."""
    tokens, targets, first, size = (place_rows(x) for x in (tokens, targets, first, size))
    m = targets.shape[1]
    places = jnp.minimum(first[:, None] + jnp.arange(m), tokens.shape[1] - 1)
    pick = jax.vmap(lambda row, at: row[at])
    features = jax.tree.map(lambda leaf: pick(leaf, places), model.features(tokens))  # (b, m, ...)
    readout, chunk = model.readout(), min(m, CHUNK)

    def score(piece: tuple[Any, Array]) -> tuple[Array, Array]:
        logits = place(readout.logits(piece[0]), "batch", None, "vocab")
        chosen = take_token(logits, piece[1])
        return chosen - jax.nn.logsumexp(logits, axis=-1), piece[1] == jnp.argmax(logits, axis=-1)

    pieces = jax.tree.map(lambda leaf: split_chunks(leaf, chunk), (features, targets))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(targets.shape[0], -1)[:, :m]  # noqa: E731
    log_probs, best = (join(x) for x in jax.lax.map(score, pieces))
    real = jnp.arange(m) < size[:, None]
    sums = jnp.sum(jnp.where(real, log_probs, 0.0), axis=1)
    return place(sums, None), place((best | ~real).all(axis=1), None)
