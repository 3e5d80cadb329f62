"""The tests' own language model, p(token | the two tokens before it), with a state that has to be kept right.

And the exact distribution that sampling options stand for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from scipy import special

STEPS = []  # one item per trace of `step`: counts compilations


@struct.dataclass
class Trigram:
    """table (v, v, v) logits [token before last, last]; a row that has just begun has token 0 before it.

    The state remembers every token fed, so that rewinding has something to undo.
    """

    table: jax.Array
    max_length: int | None = struct.field(pytree_node=False, default=None)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[0]

    def features(self, tokens: jax.Array, **_: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1], tokens

    def readout(self) -> Trigram:
        return self

    def logits(self, features: Any) -> jax.Array:
        return self.table[features[0], features[1]]

    def log_probs(self, features: Any) -> jax.Array:
        return jax.nn.log_softmax(self.logits(features))

    def score(self, tokens: jax.Array, **_: Any) -> jax.Array:
        log_probs = self.log_probs(self.features(tokens))[:, :-1]
        return jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]

    def start(self, batch: int, length: int) -> dict[str, jax.Array]:
        return {"fed": jnp.zeros((batch, length + 1), jnp.int32), "length": jnp.zeros((batch,), jnp.int32)}

    def step(self, state: dict[str, jax.Array], tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        STEPS.append(tokens.shape)
        places = state["length"][:, None] + jnp.arange(tokens.shape[1])  # (b, q)
        fed = jax.vmap(lambda row, at, new: row.at[at + 1].set(new))(state["fed"], places, tokens)
        before = jnp.take_along_axis(fed, places, axis=1)
        return self.log_probs((before, tokens)), {"fed": fed, "length": state["length"] + tokens.shape[1]}

    def rewind(self, state: dict[str, jax.Array], lengths: jax.Array) -> dict[str, jax.Array]:
        return {**state, "length": jnp.minimum(lengths, state["length"]).astype(jnp.int32)}


@pytest.fixture
def trigram():
    """Makes random models: trigram(seed, vocab_size, max_length)."""

    def make(seed: int = 0, vocab_size: int = 11, max_length: int | None = None) -> Trigram:
        return Trigram(jax.random.normal(jax.random.key(seed), (vocab_size,) * 3) * 1.5, max_length)

    return make


@pytest.fixture
def steps() -> list:
    """One item for every time that a trigram model's `step` was traced."""
    return STEPS


@pytest.fixture
def exact():
    """The distribution one row of log-probabilities is sampled from under the options of `Sampling`."""
    return _exact


def _exact(log_probs, seen, temperature, top_k=None, top_p=None, min_p=None, repetition_penalty=None):
    """One row's distribution in float64, written from the definitions."""
    x = np.asarray(log_probs, np.float64)
    if repetition_penalty is not None:
        x = special.log_softmax(np.where(seen, x * repetition_penalty, x))
    p = special.softmax(x / temperature)
    if top_k is not None:
        p = np.where(p >= np.sort(p)[-top_k], p, 0) / p[p >= np.sort(p)[-top_k]].sum()
    if top_p is not None:
        kept, mass = np.zeros(p.size), 0.0
        for token in np.argsort(-p, kind="stable"):
            kept[token], mass = p[token], mass + p[token]
            if mass >= top_p:
                break
        p = kept / mass
    if min_p is not None:
        p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()
