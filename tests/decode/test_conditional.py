"""An encoder-decoder given its source is decoded like any model: greedy, beams, drafts, each row by its own source."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import ConfigError, DataError
from lmx.decode import PromptLookup, beam_search, generate, score_continuations, speculate, stream
from lmx.models.config import Config
from lmx.models.transformer import Model, init

SOURCES = np.random.default_rng(0).integers(1, 40, (3, 7))
REAL = (np.arange(7) < np.array([[7], [4], [5]])).astype(np.int32)
BEGIN = np.zeros((3, 1), int)
NEW = 6


@functools.cache
def model():
    shape = dict(vocab_size=40, hidden_size=32, num_heads=4, intermediate_size=48, initializer_range=0.3)
    config = Config(architecture="encoder_decoder", num_layers=2, num_encoder_layers=2, **shape)
    return init(config, jax.random.key(0))


@pytest.fixture(scope="module")
def given():
    return model().given(jnp.asarray(SOURCES), jnp.asarray(REAL))


@pytest.fixture(scope="module")
def greedy(given):
    """By full passes without a cache."""
    forward = jax.jit(lambda m, tokens: m.logits(tokens))
    text = np.zeros((3, 1 + NEW), np.int32)
    for at in range(1, 1 + NEW):
        text[:, at] = np.asarray(forward(given, jnp.asarray(text))[:, at - 1]).argmax(-1)
    return text[:, 1:]


def test_greedy_and_drafted_tokens_are_those_of_full_passes(given, greedy):
    assert len({tuple(row) for row in greedy.tolist()}) > 1  # the source matters
    np.testing.assert_array_equal(generate(given, BEGIN, max_new_tokens=NEW).tokens, greedy)
    made = speculate(given, BEGIN, draft=PromptLookup(3), max_new_tokens=NEW)
    np.testing.assert_array_equal(made.tokens, greedy)


@pytest.mark.slow
def test_beams_share_the_source_of_their_row(given, greedy):
    options = dict(max_new_tokens=NEW, num_return_sequences=3, eos_id=5)
    got = beam_search(given, BEGIN, num_beams=3, **options)
    for row in range(3):
        alone = model().given(jnp.asarray(SOURCES[row : row + 1]), jnp.asarray(REAL[row : row + 1]))
        single = beam_search(alone, BEGIN[:1], num_beams=3, **options)
        np.testing.assert_array_equal(got.sequences[row], single.sequences[0])
        np.testing.assert_allclose(got.scores[row], single.scores[0], atol=1e-5)
    best = beam_search(given, BEGIN, num_beams=1, max_new_tokens=NEW)
    np.testing.assert_array_equal(best.sequences[:, 0], greedy)
    np.testing.assert_allclose(
        given.score(np.concatenate([BEGIN, best.sequences[:, 0]], axis=1)).sum(1) / NEW, best.scores[:, 0], atol=1e-5
    )


def test_the_source_may_be_given_to_the_call(greedy):
    source = dict(encoder_tokens=SOURCES, encoder_segment_ids=REAL)
    np.testing.assert_array_equal(generate(model(), BEGIN, max_new_tokens=NEW, **source).tokens, greedy)
    columns = list(stream(model(), BEGIN, max_new_tokens=3, **source))
    np.testing.assert_array_equal(np.stack(columns, 1), greedy[:, :3])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(encoder_tokens=None, encoder_segment_ids=None), ConfigError, "reads a source first: give it as encoder_"),
        (dict(encoder_tokens=None), ConfigError, "encoder_segment_ids say which of encoder_tokens are padding"),
        (dict(encoder_tokens=SOURCES[:, :4]), ConfigError, r"the shape \(3, 7\) and encoder_tokens \(3, 4\)"),
        (dict(encoder_tokens=SOURCES[0]), ConfigError, r"of shape \(7,\); they must be token ids \(b, s\)"),
        (dict(encoder_tokens=SOURCES / 2), ConfigError, "encoder_tokens are float64"),
        (dict(encoder_tokens=SOURCES + 9), DataError, "encoder_tokens has the token id"),
        (dict(encoder_tokens=SOURCES[:2], encoder_segment_ids=None), ConfigError, "3 rows .* and 2 sources"),
    ],
)
def test_sources_that_are_none(change, error, message):
    source = dict(encoder_tokens=SOURCES, encoder_segment_ids=REAL)
    with pytest.raises(error, match=message):
        generate(model(), BEGIN, max_new_tokens=2, **(source | change))


def test_other_models_take_no_source(given):
    shape = dict(vocab_size=40, hidden_size=32, num_heads=4, intermediate_size=48, num_layers=1)
    decoder = Model(Config(**shape), None)
    for other, kind in ((decoder, "decoder"), (given, "Conditional")):
        with pytest.raises(ConfigError, match=f"are for an encoder-decoder, and this model is '{kind}': leave them"):
            generate(other, BEGIN, max_new_tokens=2, encoder_tokens=SOURCES)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ConfigError, match="use model.given"):
        beam_search(model(), BEGIN, max_new_tokens=2, num_beams=2)
    shape = dict(vocab_size=40, hidden_size=32, num_heads=4, intermediate_size=48, num_layers=1)
    encoder = init(Config(architecture="encoder", **shape), jax.random.key(0))
    calls = [
        lambda m: generate(m, BEGIN, max_new_tokens=2),
        lambda m: beam_search(m, BEGIN, max_new_tokens=2, num_beams=2),
        lambda m: speculate(m, BEGIN, draft=PromptLookup(2), max_new_tokens=2),
        lambda m: score_continuations(m, [[1]], [[2]]),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="this model is an encoder"):
            call(encoder)
