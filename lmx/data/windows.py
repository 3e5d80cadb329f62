"""Windows: fixed-length stretches of a packed stream, gathered into batches without a loop over tokens.

A batch is a dict of (b, t) arrays: `tokens`, `targets` (the next tokens), `weights` (1 where a target
counts), `segment_ids` (1, 2, ... for the documents in the window, 0 for padding), `positions` (from 0 in each
document).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lmx.core.errors import DataError
from lmx.data.packing import Batch, TokenCache


def num_rows(cache: TokenCache, length: int) -> int:
    """How many windows of `length` it takes to cover every target once; the last may be padded."""
    return -(-(cache.num_tokens - 1) // length)


def rows(cache: TokenCache, indices: np.ndarray, length: int) -> Batch:
    """The batch of which row i is stream[indices[i] * length : indices[i] * length + length + 1].

    `tokens`, `targets`, `segment_ids` and `positions` are (b, t) int32, `weights` (b, t) float32. Positions
    past the end of the stream hold eos, weigh 0 and have segment 0. A row that begins inside a document
    starts at position 0.
    """
    batch, _ = windows(cache, np.asarray(indices, np.int64) * length, length)
    return batch


def windows(cache: TokenCache, starts: np.ndarray, length: int) -> tuple[Batch, np.ndarray]:
    """The windows that begin at `starts` (b,), as a batch, and the document (b, t) of each position."""
    column = np.arange(length)
    places = starts[:, None] + np.arange(length + 1)  # (b, t + 1)
    end = cache.num_tokens - 1
    stream = cache.tokens[np.minimum(places, end)].astype(np.int32)
    inside = places[:, :-1] < end  # (b, t): there is a target

    # Only documents that start within a window are looked at: their starts are marked, and counted along it.
    first = np.searchsorted(cache.documents, starts, side="right")  # (b,) first to start after column 0
    last = np.searchsorted(cache.documents, starts + length, side="left")
    counts = np.maximum(last - first, 0)
    row = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.zeros((len(starts), length), np.int32)
    begins[row, cache.documents[first[row] + nth] - starts[row]] = 1
    segments = np.cumsum(begins, axis=1, dtype=np.int32) + 1
    since = np.maximum.accumulate(begins * column, axis=1)

    batch = {
        "tokens": np.where(inside, stream[:, :-1], np.int32(cache.eos_id)),
        "targets": np.where(inside, stream[:, 1:], np.int32(cache.eos_id)),
        "weights": inside.astype(np.float32),
        "segment_ids": np.where(inside, segments, np.int32(0)),
        "positions": np.where(inside, column - since, 0).astype(np.int32),
    }
    return batch, first[:, None] + segments - 2


def evaluation_rows(cache: TokenCache, length: int, overlap: int = 0, *, batch_size: int) -> Iterator[Batch]:
    """Batches in which every target of the stream weighs 1 exactly once.

    Each window begins `length - overlap` after the last one, and its first `overlap` positions weigh 0: they
    are context for the rest (the first window has none). `domains` (b, t) int32 holds the index into
    `cache.domains` of each target's document; an end of text counts for the document it ends. The last batch
    is filled up with windows of weight 0, so that one compiled shape does. Raises DataError unless 0 <=
    overlap < length.
    """
    if not 0 <= overlap < length:
        raise DataError(
            f"overlap {overlap} must be at least 0 and less than the length {length} of a window."
        )
    stride = length - overlap
    beyond = max(0, cache.num_tokens - 1 - length)  # targets that the first window does not hold
    count = 1 + -(-beyond // stride)
    for begin in range(0, count, batch_size):
        index = np.arange(begin, begin + batch_size)
        starts = np.where(index < count, index * stride, cache.num_tokens)  # past the end: weight 0
        batch, document = windows(cache, starts, length)
        batch["weights"][index > 0, :overlap] = 0
        batch["domains"] = cache.document_domains[document].astype(np.int32)
        yield batch
