"""When a row of generated tokens ends: at one of its end-of-sequence tokens, or at one of several token sequences.

Both are rows of one table, compared with the newest tokens of every row after each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.errors import ConfigError

ANY = -1  # in the table of endings: matches every token
NONE = -2  # in the newest tokens: no token yet, matches no ending


def endings(eos_id: int | Sequence[int] | None, stop: Sequence[Sequence[int]]) -> np.ndarray | None:
    """The table (n, s) of what ends a row: each of `eos_id` and every sequence of `stop`, aligned right after ANY.

    None if nothing does. Raises ConfigError for an empty sequence, or what is no token id.
    """
    ids = () if eos_id is None else (eos_id,) if np.ndim(eos_id) == 0 else eos_id
    sequences = [*([i] for i in ids), *stop]
    for sequence in sequences:
        ids = np.asarray(sequence)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
            raise ConfigError(
                f"eos_id={eos_id!r}, stop={stop!r}: eos_id must be a token id, several or None, and stop "
                "sequences of one or more token ids, such as stop=((13, 13),). Stop strings belong to generate_text"
            )
    if not sequences:
        return None
    table = np.full((len(sequences), max(map(len, sequences))), ANY, np.int32)
    for row, ids in zip(table, sequences, strict=True):
        row[-len(ids) :] = ids
    return table


def newest(batch: int, table: Array) -> Array:
    """The newest tokens (b, s) of every row before there are any: the longest ending's width."""
    return jnp.full((batch, table.shape[1]), NONE, jnp.int32)


def push(recent: Array, tokens: Array) -> Array:
    """The newest tokens (b, s) after tokens (b,)."""
    return jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)


def ends(recent: Array, table: Array) -> Array:
    """Whether the newest tokens (b, s) end with any of the endings (n, s): (b,) bool."""
    same = (recent[:, None] == table) | (table == ANY)  # (b, n, s)
    return same.all(axis=-1).any(axis=-1)
