"""One vector a text: `embed_sentences` for tokens, `encode_texts` for strings and a tokenizer.

What the vectors of a text's tokens become when they are pooled. Encoders are made for it (Reimers and Gurevych 2019,
"Sentence-BERT"); of a decoder the last vector is the one that has seen the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core.errors import ConfigError, DataError, nearest
from lmx.models.padding import pad, padded_length
from lmx.nn import heads

TINY = 1e-12  # a shorter vector is not made any longer


def embed_sentences(
    model: Any,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    pool: str = "mean",
    normalise: bool = True,
) -> jax.Array:
    """(b, t) -> (b, d) float32: one vector for each row of tokens.

    model: anything with `features`. segment_ids (b, t): 0 is padding, which neither is attended to nor counts in the
    pool; a row of padding alone gives zeros. pool: "mean", "max", "first" or "last" of the vectors of the tokens.
    normalise: to length 1. Raises ConfigError for another pool, or if t exceeds the model's learned positions.
    """
    if pool not in heads.POOLS:
        raise ConfigError(f"pool {pool!r} is none of {', '.join(heads.POOLS)}{nearest(pool, heads.POOLS)}")
    features = model.features(tokens, segment_ids=segment_ids).astype(jnp.float32)
    vectors = heads.pool(features, pool, segment_ids)
    if not normalise:
        return vectors
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.square(vectors).sum(-1, keepdims=True), TINY**2))


_embed = jax.jit(embed_sentences, static_argnames=("pool", "normalise"))


def encode_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    pool: str = "mean",
    normalise: bool = True,
    max_length: int | None = None,
) -> np.ndarray:
    """(n, d) float32: the embedding of each of n texts, in their order; arguments as in `embed_sentences`.

    tokenizer: of `lmx.load_tokenizer`; its own special tokens go around every text. Texts longer than max_length tokens
    (by default the model's learned positions, if it has such) are cut at their end.
    Texts of about one length run together, padded to one of few lengths (`padded_length`), in one of few numbers of
    rows: at most three shapes a length are compiled, and smaller ones for few texts.

    Raises ConfigError or DataError for no texts, something else than texts, or a tokenizer that does not fit the model.
    """
    if isinstance(texts, str) or not len(texts) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"texts must be a list of strings, at least one; got {texts!r:.80}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive whole number, not {batch_size!r}")
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"this tokenizer does not fit the model: it has {tokenizer.vocab_size} tokens, the model's vocabulary "
            f"{model.vocab_size}; load the tokenizer that the model was trained with"
        )
    longest = getattr(model, "max_length", None)
    limit = longest if max_length is None else max_length if longest is None else min(max_length, longest)
    ids = tokenizer.encode_framed(texts, limit)
    batches = _batches([len(row) for row in ids], batch_size, limit)
    padded = (_inputs([ids[i] for i in batch], shape) for batch, shape in batches)
    parts = [_embed(model, *inputs, pool=pool, normalise=normalise) for inputs in padded]
    vectors = np.empty((len(ids), parts[0].shape[-1]), np.float32)
    for (batch, _), part in zip(batches, parts, strict=True):  # all batches are under way before the first is fetched
        vectors[batch] = np.asarray(part)[: len(batch)]
    return vectors


def _batches(lengths: Sequence[int], batch_size: int, limit: int | None) -> list[tuple[list[int], tuple[int, int]]]:
    """Which texts run together, the longest first (so that what does not fit fails at once), and at which shape (b, t).

    t is the `padded_length` of the batch's longest text, at most `limit`; b is batch_size, or a half or a quarter of
    it where so many rows hold all the texts of that padded length: shorter texts fill the rows up. Of the last batch b
    is no more than the next power of two of the texts that are left.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    padded = [padded_length(lengths[i]) for i in order]
    batches, begin = [], 0
    while begin < len(order):
        t, rest = padded[begin], len(order) - begin
        alike = padded[begin : begin + batch_size].count(t)
        b = next(b for b in (-(-batch_size // 4), -(-batch_size // 2), batch_size) if alike <= b)
        b = min(b, 1 << (rest - 1).bit_length())  # the last may be few
        batches.append((order[begin : begin + b], (b, t if limit is None else min(t, limit))))
        begin += b
    return batches


def _inputs(rows: Sequence[Sequence[int]], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as (tokens, segment_ids), each of `shape`, filled up with padding on the right and below."""
    b, t = shape
    return pad(rows, t, b), pad([[1] * len(row) for row in rows], t, b)
