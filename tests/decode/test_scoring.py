"""Scores of continuations and of long texts, against one full pass a text."""

import itertools
import logging

import jax
import numpy as np
import pytest

from lmx.core import specs
from lmx.core.errors import ConfigError, DataError
from lmx.core.sharding import use_mesh
from lmx.decode import generate
from lmx.decode.scoring import score_continuations, score_rolling
from lmx.models.presets import preset
from lmx.models.transformer import init

RNG = np.random.default_rng(0)


def ragged(sizes, vocab=11):
    return [RNG.integers(0, vocab, n).tolist() for n in sizes]


CONTEXTS = ragged([3, 40, 1, 17, 9, 60, 5])
CONTINUATIONS = ragged([4, 2, 9, 1, 70, 12, 1])


def by_hand(model, context, continuation):
    """The sum from one pass over one text, in a shape of its own kind: padded on the right to 160."""
    text = np.zeros((1, 160), int)
    text[0, : len(context) + len(continuation)] = [*context, *continuation]
    scores = np.asarray(model.score(text))[0]
    return scores[len(context) - 1 : len(context) + len(continuation) - 1].sum()


def test_sums_in_the_order_given_and_few_compilations(trigram):
    model = trigram()
    got = score_continuations(model, CONTEXTS, CONTINUATIONS, batch_size=3)
    wanted = [by_hand(model, *pair) for pair in zip(CONTEXTS, CONTINUATIONS, strict=True)]
    np.testing.assert_allclose(got.log_probs, wanted, rtol=1e-5)
    assert got.tokens.tolist() == [len(c) for c in CONTINUATIONS] and not got.truncated.any()
    single = score_continuations(model, CONTEXTS[2:3], CONTINUATIONS[2:3])
    np.testing.assert_allclose(single.log_probs, got.log_probs[2:3], rtol=1e-6)
    nothing = score_continuations(model, [], [])
    assert nothing.log_probs.shape == (0,)


def test_greedy_says_whether_generate_would_have_written_it(trigram):
    model, prompts = trigram(), [[3, 1], [4], [2, 2, 2]]
    written = [np.asarray(generate(model, [p], max_new_tokens=5).tokens)[0].tolist() for p in prompts]
    changed = [[*w[:-1], (w[-1] + 1) % 11] for w in written]
    assert score_continuations(model, prompts, written).greedy.all()
    assert not score_continuations(model, prompts, changed).greedy.any()


def test_what_does_not_fit_is_cut_from_the_left_and_reported(trigram, caplog):
    model = trigram(max_length=24)
    with caplog.at_level(logging.WARNING, "lmx"):
        got = score_continuations(model, [CONTEXTS[1], CONTEXTS[0]], [CONTINUATIONS[0], CONTINUATIONS[1]])
    assert got.truncated.tolist() == [40 + 4 - 25, 0]
    assert "1 of 2 contexts were cut from the left to fit 24 tokens; the longest lost 19" in caplog.text
    np.testing.assert_allclose(got.log_probs[0], by_hand(model, CONTEXTS[1][19:], CONTINUATIONS[0]), rtol=1e-5)
    shorter = score_continuations(model, [CONTEXTS[1]], [CONTINUATIONS[0]], max_length=6)
    assert shorter.truncated.tolist() == [40 + 4 - 7]


@pytest.mark.parametrize("length, limit, context", list(itertools.product([1, 7, 8, 9, 30], [8], [1, 3, 8])))
def test_rolling_windows_predict_each_token_once(length, limit, context):
    from lmx.decode.scoring import _windows

    text = list(range(100, 101 + length))
    windows = list(_windows(text, limit, context))
    assert [t for _, tail in windows for t in tail] == text[1:]
    for head, tail in windows:
        assert len(head) + len(tail) <= limit + 1 and len(head) >= min(context, tail[0] - 100)
        assert [*head, *tail] == list(range(head[0], tail[-1] + 1))
    assert len(windows[-1][0]) + len(windows[-1][1]) == min(limit, length) + 1  # reaches back as far as it can


def test_rolling_scores_sum_the_windows(trigram):
    model, texts = trigram(), [*ragged([5, 41, 8]), []]
    got = score_rolling(model, texts, prefix_id=10, max_length=8, context=4)
    assert got.tokens.tolist() == [5, 41, 8, 0] and got.log_probs[3] == 0
    for i, text in enumerate(texts[:3]):  # two tokens before decide all in this model: windows change nothing
        np.testing.assert_allclose(got.log_probs[i], by_hand(model, [10], text), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [True, False])
def test_on_a_mesh_as_on_one_device(explicit):
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    model = init(preset("llama-tiny", num_layers=1, hidden_size=32, vocab_size=60), jax.random.key(0))
    plain = score_continuations(model, CONTEXTS[:3], CONTINUATIONS[:3], batch_size=4)
    with use_mesh("fsdp=4,tensor=2", explicit=explicit):
        split = jax.device_put(model, specs.shardings(model.specs()))
        sharded = score_continuations(split, CONTEXTS[:3], CONTINUATIONS[:3], batch_size=4)
    np.testing.assert_allclose(sharded.log_probs, plain.log_probs, rtol=1e-5)
    np.testing.assert_array_equal(sharded.greedy, plain.greedy)


@pytest.mark.parametrize(
    "contexts, continuations, options, error, message",
    [
        ([[1]], [[2], [3]], {}, ConfigError, "1 contexts and 2 continuations"),
        ([[1], []], [[2], [3]], {}, DataError, "pair 1 has an empty context: where nothing stands before"),
        ([[1]], [[]], {}, DataError, "pair 0 has an empty continuation"),
        ([[1]], [[11]], {}, DataError, "pair 0 holds 11; token ids of this model are 0 to 10"),
        ([[1]], [[2] * 9], dict(max_length=8), DataError, "pair 0 has 9 tokens, and the model reads at most 8"),
        ([[1]], [[2]], dict(max_length=99), ConfigError, "max_length is 99, and this model reads at most 24"),
        ([[1]], [[2]], dict(batch_size=0), ConfigError, "batch_size is 0; it must be a whole number"),
    ],
)
def test_errors(trigram, contexts, continuations, options, error, message):
    with pytest.raises(error, match=message):
        score_continuations(trigram(max_length=24), contexts, continuations, **options)


def test_errors_of_rolling(trigram):
    with pytest.raises(ConfigError, match="give max_length=, the window"):
        score_rolling(trigram(), [[1]], prefix_id=0)
    with pytest.raises(ConfigError, match="context is 9; with windows of 8 tokens it must be 1 to 8"):
        score_rolling(trigram(), [[1]], prefix_id=0, max_length=8, context=9)
