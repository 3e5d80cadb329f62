"""A language model so small that its loss and gradients can be written out by hand."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import struct

from lmx.core import sharding, weights
from lmx.nn.heads import Head, Readout


@struct.dataclass
class Bigram:
    """Logits of the next token: rows[token] times the head (d, v), or times the rows (v, d) themselves where tied."""

    rows: Any
    head: Any
    dtype: str = struct.field(pytree_node=False, default="float32")

    @property
    def vocab_size(self) -> int:
        return self.rows.shape[0]

    def features(self, tokens: jax.Array, **_: Any) -> jax.Array:
        return sharding.place(weights.take(tokens, self.rows).astype(self.dtype), "batch", "sequence", None)

    def readout(self) -> Readout:
        return Readout(Head(out=self.head), self.rows if self.head is None else None)


@pytest.fixture
def bigram():
    """bigram(v, d, tied): a random model with logits of size about 1.5."""

    def make(v: int, d: int, tied: bool, seed: int = 0) -> Bigram:
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(v, d)).astype(np.float32)
        return Bigram(rows, None if tied else rng.normal(size=(d, v)).astype(np.float32) / 2)

    return make
