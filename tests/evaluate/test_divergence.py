"""The mean divergence from the original against scipy's entropies."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from scipy.stats import entropy

from lmx.core.errors import ConfigError, DataError
from lmx.evaluate import mean_kl
from lmx.models.unigram import Unigram

P, Q = np.array([0.5, 0.25, 0.125, 0.125]), np.array([0.1, 0.2, 0.3, 0.4])
ORIGINAL, MODEL = (Unigram(jnp.asarray(np.log(p), jnp.float32)) for p in (P, Q))


def batch(weights) -> dict[str, np.ndarray]:
    weights = np.asarray(weights, np.float32)
    tokens = np.zeros(weights.shape, np.int32)
    rest = {"segment_ids": tokens + 1, "positions": tokens, "domains": tokens}
    return rest | {"tokens": tokens, "targets": tokens, "weights": weights}


def test_equals_scipy():
    """KL(original || model), and not the other way round, whatever the weights and the batches."""
    batches = [batch([[1, 0, 2]]), batch([[0, 0, 0]]), batch([[1, 1, 1], [0.5, 0, 0]])]
    np.testing.assert_allclose(mean_kl(MODEL, ORIGINAL, (b for b in batches)), entropy(P, Q), rtol=1e-6)
    np.testing.assert_allclose(mean_kl(ORIGINAL, MODEL, batches), entropy(Q, P), rtol=1e-6)
    assert abs(mean_kl(MODEL, MODEL, batches)) < 1e-7


def test_weights_weigh():
    """A token of weight 3 counts three times: the original knows its second token, and nothing of any other."""

    @struct.dataclass
    class Bigram(Unigram):
        def features(self, tokens, **_):
            return tokens[..., None]

        def readout(self):
            return self

        def logits(self, features):
            return jnp.where(features == 1, jnp.log(jnp.asarray(P, jnp.float32)), 0.0)

    original = Bigram(jnp.zeros(4))
    one = batch([[1, 3]]) | {"tokens": np.array([[0, 1]], np.int32)}
    wanted = (entropy(np.full(4, 0.25), Q) + 3 * entropy(P, Q)) / 4
    np.testing.assert_allclose(mean_kl(MODEL, original, [one]), wanted, rtol=1e-6)


def test_place_is_applied():
    seen = []
    mean_kl(MODEL, ORIGINAL, [batch([[1.0]])], place=lambda b: seen.append(b) or b)
    assert len(seen) == 1


@pytest.mark.parametrize("batches", [[], [batch([[0.0, 0.0]])]])
def test_nothing_to_compare_on(batches):
    with pytest.raises(DataError, match="no positions to compare on"):
        mean_kl(MODEL, ORIGINAL, batches)


def test_vocabularies_of_unlike_size():
    with pytest.raises(ConfigError, match="4 tokens and the teacher's 7"):
        mean_kl(MODEL, Unigram(jnp.zeros(7)), [batch([[1.0]])])
