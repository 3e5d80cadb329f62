"""The unigram model has the whole protocol and the counts' distribution; scoring in chunks equals scoring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import ConfigError, DataError
from lmx.models.protocol import LanguageModel, score_in_chunks, take_token
from lmx.models.unigram import Unigram, fit, from_counts

COUNTS = np.array([5, 0, 2, 3])
TOKENS = np.array([[0, 2, 3, 1, 0], [3, 3, 0, 2, 2]])


def test_it_is_a_language_model():
    assert isinstance(from_counts(COUNTS), LanguageModel)
    assert from_counts(COUNTS).vocab_size == 4


@pytest.mark.parametrize("smoothing", [1.0, 0.5])
def test_smoothing_is_added_to_every_count(smoothing):
    expected = (COUNTS + smoothing) / (COUNTS.sum() + 4 * smoothing)
    model = from_counts(COUNTS, smoothing=smoothing)
    np.testing.assert_allclose(np.exp(model.log_probabilities), expected, rtol=1e-6)


def test_fit_counts_a_stream_of_any_shape_and_integer_dtype():
    counted = from_counts(np.bincount(TOKENS.ravel(), minlength=6))
    for dtype in (np.uint16, np.int32):
        fitted = fit(TOKENS.astype(dtype), 6)
        np.testing.assert_array_equal(fitted.log_probabilities, counted.log_probabilities)


def test_without_smoothing_an_unseen_token_is_impossible():
    scores = from_counts(COUNTS, smoothing=0).score(jnp.asarray(TOKENS))
    assert scores[0, 2] == -np.inf and np.isfinite(scores[1]).all()


def test_score_step_and_log_probs_agree():
    model, tokens = from_counts(COUNTS), jnp.asarray(TOKENS)
    expected = np.log((COUNTS + 1) / 14)
    np.testing.assert_allclose(model.score(tokens), expected[TOKENS[:, 1:]], rtol=1e-6)
    state = model.start(2, 5)
    stepped, state = jax.jit(lambda m, s, t: m.step(s, t))(model, state, tokens)
    np.testing.assert_allclose(stepped, np.broadcast_to(expected, (2, 5, 4)), rtol=1e-6)
    assert model.rewind(state, jnp.array([1, 2])) == state
    np.testing.assert_array_equal(stepped, model.log_probs(model.features(tokens)))


def test_log_probabilities_moved_by_a_gradient_are_normalised_again():
    model = Unigram(jnp.array([1.0, 2.0, 3.0]))
    total = jnp.exp(model.log_probs(model.features(jnp.zeros((1, 2), int)))).sum(-1)
    np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_score_in_chunks_equals_score_with_its_gradient(chunk):
    model, tokens = Unigram(jnp.array([0.1, -1.0, 0.7, 2.0])), jnp.asarray(TOKENS)
    plain = jax.value_and_grad(lambda m: m.score(tokens).sum())(model)
    chunked = jax.value_and_grad(lambda m: score_in_chunks(m, tokens, chunk=chunk).sum())(model)
    np.testing.assert_allclose(score_in_chunks(model, tokens, chunk=chunk), model.score(tokens), rtol=1e-6)
    np.testing.assert_allclose(chunked[1].log_probabilities, plain[1].log_probabilities, rtol=1e-5, atol=1e-6)


def test_one_token_has_no_score():
    model = from_counts(COUNTS)
    assert (
        score_in_chunks(model, jnp.zeros((2, 1), int)).shape
        == model.score(jnp.zeros((2, 1), int)).shape
        == (2, 0)
    )


def test_scoring_in_chunks_never_holds_the_vocabulary_for_all_positions():
    model = Unigram(jnp.zeros(1000))
    made = jax.jit(jax.grad(lambda m, t: score_in_chunks(m, t, chunk=8).sum())).lower(
        model, jnp.zeros((2, 65), int)
    )
    assert "2x8x1000" in made.as_text() and "2x64x1000" not in made.as_text()


def test_take_token_is_a_gather():
    values = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    picked = take_token(jnp.asarray(values), jnp.asarray(TOKENS))
    np.testing.assert_array_equal(picked, np.take_along_axis(values, TOKENS[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_counts(COUNTS, smoothing=-1), ConfigError, "smoothing is -1; .* 0 or above"),
        (lambda: from_counts(np.zeros(3), smoothing=0), DataError, "no tokens to count"),
        (lambda: from_counts(TOKENS), DataError, r"one number.*shape \(2, 5\)"),
        (lambda: fit(TOKENS, 3), DataError, "token id 3 does not fit a vocabulary of 3: ids are 0 to 2"),
        (lambda: fit(-TOKENS, 4), DataError, "token id -3"),
        (lambda: fit(TOKENS / 2, 4), DataError, "float64; token ids are integers"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
