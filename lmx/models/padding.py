"""Rows of unlike length as one array, of few different lengths: each length is compiled once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def padded_length(length: int, least: int = 8) -> int:
    """The next multiple of `least`, a power of two, and beyond 8 of them of a quarter of the power of two below: 8, 16,
    ..., 64, 80, 96, 112, 128, 160.

    From there on less than a fifth of a row is padding, and up to 64 times `least` there are 20 lengths.
    """
    step = max(least, 1 << max(0, (length - 1).bit_length() - 3))
    return max(1, -(-length // step)) * step


def pad(rows: Sequence[Sequence[int]], length: int, count: int | None = None) -> np.ndarray:
    """Rows as int32 (count, length), by default as many as there are, with zeros on the right and below."""
    padded = np.zeros((len(rows) if count is None else count, length), np.int32)
    for place, row in zip(padded, rows, strict=False):
        place[: len(row)] = row
    return padded
