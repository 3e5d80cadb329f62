"""Generation from a model whose every step can be recomputed from the text so far; stream equals generate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmx.core.errors import ConfigError, DataError
from lmx.core.sharding import use_mesh
from lmx.decode import generate, stream
from lmx.decode.sampling import Sampling, choose
from lmx.models.protocol import LanguageModel
from lmx.models.unigram import from_counts

PROMPTS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 0, 0, 0, 0]])
LENGTHS = np.array([5, 3, 1])
KEY = jax.random.key(11)
OPTIONS = [
    dict(),
    dict(repetition_penalty=1.8),
    dict(temperature=0.8, key=KEY),
    dict(
        temperature=1.2, top_k=6, top_p=0.9, min_p=0.05, repetition_penalty=1.2, eos_id=4, pad_id=7, key=KEY
    ),
]


def next_log_probs(model, prompt):
    """(v,) from a full pass over one row, no state involved."""
    return model.log_probs(model.features(jnp.asarray(prompt)[None]))[0, -1]


def continued(model, prompt, n):
    """Greedy, recomputed from scratch for every token: tokens and their log-probabilities."""
    text, scores = list(prompt), []
    for _ in range(n):
        log_probs = next_log_probs(model, text)
        text.append(int(log_probs.argmax()))
        scores.append(float(log_probs.max()))
    return text[len(prompt) :], scores


def test_the_test_model_is_a_language_model(trigram):
    assert isinstance(trigram(), LanguageModel)


@pytest.mark.slow
def test_greedy_is_the_argmax_of_full_passes_also_in_a_ragged_batch(trigram):
    model = trigram()
    made = generate(model, PROMPTS, lengths=LENGTHS, max_new_tokens=9)
    for row in range(3):
        tokens, scores = continued(model, PROMPTS[row, : LENGTHS[row]], 9)
        assert made.tokens[row].tolist() == tokens
        np.testing.assert_allclose(made.log_probs[row], scores, atol=1e-5)
    np.testing.assert_array_equal(made.lengths, 9)
    assert made.tokens.dtype == made.lengths.dtype == jnp.int32 and made.log_probs.dtype == jnp.float32


def test_without_lengths_rows_are_whole(trigram):
    model = trigram()
    made = generate(model, PROMPTS, max_new_tokens=4)
    assert made.tokens[1].tolist() == continued(model, PROMPTS[1], 4)[0]
    alone = generate(model, [[5]], max_new_tokens=4)
    assert alone.tokens[0].tolist() == continued(model, [5], 4)[0]


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_ragged_rows_are_what_each_row_is_alone(options, trigram):
    together = generate(trigram(), PROMPTS, lengths=LENGTHS, max_new_tokens=8, **options)
    for row, length in enumerate(LENGTHS):
        alone = generate(trigram(), PROMPTS[row : row + 1, :length], max_new_tokens=8, **options)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])


def test_padding_is_never_seen(trigram):
    model, other = trigram(), np.where(PROMPTS == 0, 8, PROMPTS)
    for options in OPTIONS:
        first, second = (
            generate(model, p, lengths=LENGTHS, max_new_tokens=8, **options) for p in (PROMPTS, other)
        )
        np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize("options", OPTIONS)
def test_stream_yields_the_tokens_of_generate(options, trigram):
    arguments = dict(lengths=LENGTHS, max_new_tokens=12, stop=((1, 2), (9,)), **options)
    made = generate(trigram(), PROMPTS, **arguments)
    streamed = np.stack(list(stream(trigram(), PROMPTS, **arguments)), axis=1)
    np.testing.assert_array_equal(streamed, made.tokens[:, : streamed.shape[1]])
    assert streamed.shape[1] == made.lengths.max()


def test_the_key_decides(trigram):
    draw = lambda key: generate(trigram(), PROMPTS, max_new_tokens=20, temperature=1.0, key=key).tokens  # noqa: E731
    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert (draw(KEY) != draw(jax.random.key(12))).any()


def test_generated_tokens_pass_a_chi_square_test():
    counts = np.array([5, 1, 9, 30, 2, 14])
    model = from_counts(counts, smoothing=0)
    made = generate(model, np.zeros((200, 1), int), max_new_tokens=100, temperature=1.0, key=KEY)
    drawn = np.bincount(np.ravel(made.tokens), minlength=6)
    assert stats.chisquare(drawn, 20_000 * counts / counts.sum()).pvalue > 1e-3
    np.testing.assert_allclose(made.log_probs, np.log(counts / counts.sum())[made.tokens], rtol=1e-5)


def test_pairs_of_generated_tokens_pass_a_chi_square_test(trigram, exact):
    """The second token's distribution given the first, through the state and the filters."""
    model, b = trigram(vocab_size=4), 20_000
    made = generate(model, np.full((b, 1), 2), max_new_tokens=2, temperature=0.9, top_p=0.95, key=KEY).tokens
    tails = jax.vmap(lambda first: model.table[2, first])(jnp.arange(4))
    first = exact(next_log_probs(model, [2]), None, temperature=0.9, top_p=0.95)
    second = np.stack([exact(jax.nn.log_softmax(row), None, temperature=0.9, top_p=0.95) for row in tails])
    expected = (first[:, None] * second).ravel()
    drawn = np.bincount(np.asarray(made[:, 0] * 4 + made[:, 1]), minlength=16)
    assert drawn[expected == 0].sum() == 0
    assert stats.chisquare(drawn[expected > 0], b * expected[expected > 0]).pvalue > 1e-3


def test_log_probs_are_the_models_own_whatever_was_filtered(trigram):
    model = trigram()
    made = generate(
        model, PROMPTS, max_new_tokens=6, temperature=1.5, top_k=3, repetition_penalty=1.4, key=KEY
    )
    whole = jnp.concatenate([PROMPTS, made.tokens], axis=1)
    np.testing.assert_allclose(made.log_probs, model.score(whole)[:, -6:], atol=1e-5)


def test_the_penalty_falls_on_the_prompt_and_on_what_was_generated(trigram):
    model, prompt = trigram(), [3, 1, 4]
    made = generate(model, [prompt], max_new_tokens=7, repetition_penalty=2.5).tokens[0].tolist()
    text = list(prompt)
    for token in made:
        seen = np.isin(np.arange(11), text)[None]
        expected = choose(None, next_log_probs(model, text)[None], Sampling(repetition_penalty=2.5), seen)
        assert token == int(expected[0])
        text.append(token)


def test_a_row_ends_at_eos_and_the_others_go_on(trigram):
    model = trigram()
    free = np.asarray(generate(model, PROMPTS, max_new_tokens=10).tokens)
    eos = int(free[0, 2])
    made = generate(model, PROMPTS, max_new_tokens=10, eos_id=eos, pad_id=10)
    for row in range(3):
        at = np.flatnonzero(free[row] == eos)
        n = at[0] + 1 if at.size else 10
        assert made.lengths[row] == n
        np.testing.assert_array_equal(made.tokens[row], [*free[row, :n], *[10] * (10 - n)])
        assert (made.log_probs[row, :n] < 0).all() and (made.log_probs[row, n:] == 0).all()


def test_a_row_ends_at_a_stop_sequence_made_of_several_tokens(trigram):
    model = trigram()
    free = np.asarray(generate(model, PROMPTS[:1], max_new_tokens=10).tokens)[0]
    sequence = tuple(int(t) for t in free[3:6])
    first = next(n for n in range(3, 11) if tuple(free[n - 3 : n]) == sequence)
    made = generate(model, PROMPTS[:1], max_new_tokens=10, stop=[(10, 10, 10, 10), sequence])
    assert made.lengths[0] == first and made.tokens[0, :first].tolist() == free[:first].tolist()


def test_a_stop_sequence_does_not_reach_into_the_prompt(trigram):
    model = trigram()
    first, second = (int(t) for t in generate(model, [[3, 1]], max_new_tokens=2).tokens[0])
    assert generate(model, [[3, 1]], max_new_tokens=2, stop=[(1, first)]).lengths[0] == 2
    assert generate(model, [[3, 1]], max_new_tokens=4, stop=[(first, second)]).lengths[0] == 2


def test_new_numbers_compile_nothing_new(trigram, steps):
    model, other = trigram(vocab_size=13), trigram(1, vocab_size=13)

    def call(model, heat, p, penalty, lengths, pad):
        numbers = dict(temperature=heat, top_p=p, repetition_penalty=penalty, pad_id=pad)
        key, stop = jax.random.key(pad), ((2, pad),)
        generate(model, PROMPTS, lengths=lengths, max_new_tokens=3, eos_id=1, stop=stop, key=key, **numbers)

    call(model, 0.7, 0.9, 1.2, LENGTHS, 0)
    traced = len(steps)
    call(other, 2, 1, 1, LENGTHS - (LENGTHS > 2), 5)
    assert len(steps) == traced
    list(stream(model, PROMPTS, max_new_tokens=9))
    traced = len(steps)
    list(stream(other, PROMPTS, max_new_tokens=9))
    assert len(steps) == traced


def test_inside_somebody_elses_jit(trigram):
    model = trigram()
    inside = jax.jit(
        lambda m, t, n, heat, key: (
            generate(m, t, lengths=n, max_new_tokens=5, temperature=heat, key=key).tokens
        )
    )
    outside = generate(model, PROMPTS, lengths=LENGTHS, max_new_tokens=5, temperature=0.7, key=KEY).tokens
    np.testing.assert_array_equal(inside(model, PROMPTS, LENGTHS, 0.7, KEY), outside)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [True, False])
def test_on_a_mesh_as_on_one_device(explicit):
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    model, prompts = from_counts(np.arange(1, 17)), np.tile(PROMPTS[:2], (2, 1))
    for options in OPTIONS:
        arguments = dict(lengths=np.tile(LENGTHS[:2], 2), max_new_tokens=6, stop=((3, 1),), **options)
        plain = generate(model, prompts, **arguments)
        with use_mesh("fsdp=4,tensor=2", explicit=explicit):
            sharded = generate(model, prompts, **arguments)
            streamed = np.stack(list(stream(model, prompts, **arguments)), axis=1)
        np.testing.assert_array_equal(sharded.tokens, plain.tokens)
        np.testing.assert_allclose(sharded.log_probs, plain.log_probs, atol=1e-6)
        np.testing.assert_array_equal(streamed, plain.tokens[:, : streamed.shape[1]])


def test_columns_of_padding_need_no_room(trigram):
    model, tokens = trigram(max_length=8), np.zeros((1, 32), int)
    tokens[0, :3] = [3, 1, 4]
    made = generate(model, tokens, lengths=np.array([3]), max_new_tokens=5)
    assert made.tokens[0].tolist() == continued(model, [3, 1, 4], 5)[0]


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        (PROMPTS[:, :0], {}, ConfigError, "prompt of row 0 is empty .* give it the end-of-sequence"),
        (PROMPTS, dict(lengths=np.array([5, 0, 1])), ConfigError, "prompt of row 1 is empty"),
        (
            PROMPTS,
            dict(lengths=np.array([5, 6, 1])),
            ConfigError,
            r"length of row 1 is 6, .*\(3, 5\): at most 5",
        ),
        (PROMPTS, dict(lengths=np.array([5, 6])), ConfigError, "lengths is int64 of shape .* each of 3 rows"),
        (PROMPTS, dict(lengths=np.array([5.0, 3, 1])), ConfigError, "lengths is float64"),
        (PROMPTS[:0], {}, ConfigError, "no rows to continue"),
        (PROMPTS[0], {}, ConfigError, r"shape \(5,\); it must be token ids of shape \(batch, length\)"),
        (PROMPTS / 2, {}, ConfigError, "the prompt is float64"),
        (
            PROMPTS + 9,
            {},
            DataError,
            "the prompt has the token id 18, .* of 11 tokens is 0 to 10",
        ),
        (PROMPTS - 1, {}, DataError, "token id -1"),
        (PROMPTS, dict(pad_id=11), DataError, "pad_id has the token id 11"),
        (
            PROMPTS,
            dict(max_new_tokens=0),
            ConfigError,
            "max_new_tokens is 0; it must be a whole number, 1 or above",
        ),
        (PROMPTS, dict(max_new_tokens=1.5), ConfigError, "max_new_tokens is 1.5"),
        (PROMPTS, dict(temperature=0.7), ConfigError, "temperature 0.7 draws .* key=jax.random.key"),
        (
            PROMPTS,
            dict(stop=("end",)),
            ConfigError,
            "stop=\\('end',\\): .* Stop strings belong to generate_text",
        ),
        (PROMPTS, dict(stop=((),)), ConfigError, r"stop=\(\(\),\)"),
        (PROMPTS, dict(stop=(13,)), ConfigError, r"stop=\(13,\)"),
        (PROMPTS, dict(eos_id=-1), ConfigError, "eos_id=-1, .* a token id, several or None"),
        (PROMPTS, dict(eos_id=[1, -1]), ConfigError, r"eos_id=\[1, -1\], .* a token id, several or None"),
        (PROMPTS, dict(eos_id=[[1, 2]]), ConfigError, "a token id, several or None"),
        (PROMPTS, dict(eos_id=[3, 11]), DataError, "eos_id or stop has the token id 11"),
        (PROMPTS, dict(stop=((3, 11),)), DataError, "eos_id or stop has the token id 11"),
        (PROMPTS, dict(top_p=2.0), ConfigError, "top_p is 2.0"),
        (
            PROMPTS,
            dict(max_new_tokens=8),
            ConfigError,
            "5 tokens with max_new_tokens=8 makes 13, .* at most 12.* lower",
        ),
    ],
)
def test_errors(call, tokens, options, error, message, trigram):
    with pytest.raises(error, match=message):
        call(trigram(max_length=12), tokens, **(dict(max_new_tokens=2) | options))
