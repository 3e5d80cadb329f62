"""Filters against Hugging Face's and against float64; draws against the exact distribution; bad options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from lmx.core.errors import ConfigError
from lmx.decode import sampling
from lmx.decode.sampling import Sampling, choose, distribution
from lmx.models.unigram import from_counts

OPTIONS = {
    "plain": dict(temperature=1.0),
    "temperature": dict(temperature=0.6),
    "top_k": dict(temperature=1.0, top_k=4),
    "top_p": dict(temperature=1.0, top_p=0.8),
    "min_p": dict(temperature=1.0, min_p=0.2),
    "repetition_penalty": dict(temperature=1.0, repetition_penalty=1.7),
    "all": dict(temperature=1.4, top_k=9, top_p=0.9, min_p=0.15, repetition_penalty=1.3),
}


def rows(v, b=3, seed=0):
    logits = np.random.default_rng(seed).normal(size=(b, v)) * 2
    return special.log_softmax(logits, axis=-1).astype(np.float32)


def some_seen(v, b=3):
    return np.random.default_rng(7).random((b, v)) < 0.4


@pytest.mark.parametrize("name", OPTIONS)
def test_the_distribution_is_the_exact_one(name, exact):
    log_probs, seen = rows(50), some_seen(50)
    ours = np.exp(distribution(jnp.asarray(log_probs), Sampling(**OPTIONS[name]), jnp.asarray(seen)))
    expected = [exact(row, s, **OPTIONS[name]) for row, s in zip(log_probs, seen, strict=True)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)  # float32 log-probabilities of size 10


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_pass_a_chi_square_test(name, exact):
    draws, v = 20_000, 12
    model = from_counts(np.array([50, 3, 1, 17, 17, 9, 0, 30, 4, 4, 2, 12]))
    seen = some_seen(v, b=1)
    log_probs, _ = model.step(model.start(1, 1), jnp.zeros((1, 1), jnp.int32))
    many = jnp.broadcast_to(log_probs[0], (draws, v))
    tokens = choose(jax.random.key(3), many, Sampling(**OPTIONS[name]), jnp.asarray(seen))
    expected = exact(log_probs[0, 0], seen[0], **OPTIONS[name])
    counts = np.bincount(tokens, minlength=v)
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], draws * expected[expected > 0]).pvalue > 1e-3


def test_filters_equal_hugging_face():
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    hf = pytest.importorskip(
        "transformers.generation.logits_process", reason="the oracle extra is not installed"
    )
    log_probs, ids = rows(200), np.random.default_rng(5).integers(0, 200, (3, 12))
    seen = np.zeros((3, 200), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    pairs = [
        (sampling.temperature(log_probs, 0.7), hf.TemperatureLogitsWarper(0.7)),
        (sampling.top_k(log_probs, 5), hf.TopKLogitsWarper(5)),
        (sampling.top_p(log_probs, 0.7), hf.TopPLogitsWarper(0.7)),
        (sampling.min_p(log_probs, 0.1), hf.MinPLogitsWarper(0.1)),
        (sampling.repetition_penalty(log_probs, seen, 1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)),
    ]
    for ours, process in pairs:
        theirs = process(torch.tensor(ids), torch.tensor(log_probs)).log_softmax(-1).numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6, err_msg=type(process).__name__)


def test_greedy_is_the_argmax_whatever_is_filtered():
    log_probs = jnp.asarray(rows(20))
    for options in ({}, dict(top_k=3, top_p=0.1, min_p=0.9)):
        np.testing.assert_array_equal(choose(None, log_probs, Sampling(**options)), log_probs.argmax(-1))


def test_the_best_token_is_the_argmax_the_lowest_id_among_equals():
    x = rows(1001)
    x[0, [3, 700]], x[1, :] = 1.0, -np.inf
    x[2, 1000] = 2.0
    np.testing.assert_array_equal(sampling.best(jnp.asarray(x)), np.argmax(x, axis=-1))
    assert sampling.best(jnp.asarray(x)).dtype == jnp.int32
    assert sampling.best(jnp.asarray(x).at[0, 5].set(jnp.nan))[0] == 0, "an id there is, whatever the model gave"


def test_greedy_obeys_the_penalty():
    log_probs = jnp.log(jnp.array([[0.5, 0.4, 0.1]]))
    seen = jnp.array([[True, False, False]])
    assert choose(None, log_probs, Sampling(repetition_penalty=2.0), seen)[0] == 1


def test_a_penalty_counts_from_normalised_log_probabilities():
    log_probs, seen = rows(30), some_seen(30)
    shifted = sampling.repetition_penalty(log_probs + 5.0, seen, 1.5)
    np.testing.assert_allclose(shifted, sampling.repetition_penalty(log_probs, seen, 1.5), atol=1e-5)
    more = np.exp(sampling.repetition_penalty(log_probs, seen, 3.0))
    assert (np.where(seen, more, 0).sum(-1) < np.where(seen, np.exp(log_probs), 0).sum(-1)).all()


def test_the_nucleus_is_the_smallest_also_among_equals():
    kept = sampling.top_p(jnp.zeros((1, 10)), 0.45) > -jnp.inf
    np.testing.assert_array_equal(kept[0], [True] * 5 + [False] * 5)


def test_ends_of_the_ranges():
    log_probs = jnp.asarray(rows(5000))
    same = lambda ours: np.testing.assert_allclose(ours, log_probs, rtol=1e-5)  # noqa: E731
    same(sampling.top_k(log_probs, 10**9))
    same(sampling.top_p(log_probs, 1.0))
    same(sampling.min_p(log_probs, 0.0))
    for one in (
        sampling.top_p(log_probs, 1e-9),
        sampling.top_k(log_probs, 1),
        sampling.temperature(log_probs, 1e-45),
    ):
        np.testing.assert_array_equal((jnp.exp(one) > 0).sum(-1), 1)
        np.testing.assert_array_equal(one.argmax(-1), log_probs.argmax(-1))


def test_options_are_hashable_equal_and_do_not_retrace():
    assert Sampling(1, top_k=np.int64(3)) == Sampling(1.0, top_k=3)
    assert hash(Sampling(1, top_k=np.int64(3))) == hash(Sampling(1.0, top_k=3))
    traces = []

    @jax.jit
    def filtered(log_probs, options):
        traces.append(options)
        return distribution(log_probs, options, log_probs > -1)

    for values in ((0.5, 0.9, 0.1, 1.2), (2, 1, 0, 3), (np.float32(0.7), 0.3, 1, 1)):
        heat, p, floor, penalty = values
        options = Sampling(heat, 5, p, floor, penalty)
        inside = filtered(jnp.asarray(rows(20)), options)
        outside = distribution(jnp.asarray(rows(20)), options, rows(20) > -1)
        np.testing.assert_allclose(np.exp(inside), np.exp(outside), atol=1e-6)
    assert len(traces) == 1
    filtered(jnp.asarray(rows(20)), Sampling(0.0, 5, 0.9, 0.1, 1.2))
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1), "temperature is -1; it must be 0"),
        (dict(temperature=None), "temperature is None"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature="hot"), "temperature is 'hot'"),
        (dict(top_k=0), "top_k is 0; it must be a whole number, 1 or above; None leaves it out"),
        (dict(top_k=2.5), "top_k is 2.5"),
        (dict(top_p=0), "top_p is 0; it must be above 0 and at most 1"),
        (dict(top_p=90), "top_p is 90"),
        (dict(min_p=1.5), "min_p is 1.5; it must be 0 to 1"),
        (dict(repetition_penalty=0), "repetition_penalty is 0; it must be above 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
