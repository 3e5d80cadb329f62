"""Beam search: the exact best where the beam holds everything, rows each on its own, meshes, what is refused.

Token for token against transformers: tests/models/test_hugging_face_decoding.py.
"""

import itertools

import jax
import numpy as np
import pytest

from lmx.core import specs
from lmx.core.errors import ConfigError, DataError
from lmx.core.sharding import use_mesh
from lmx.decode import generate
from lmx.decode.beam import beam_search
from lmx.models.presets import preset
from lmx.models.transformer import init

PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 2, 0, 0, 0], [5, 0, 0, 0, 0]])
LENGTHS = np.array([5, 2, 1])


def test_a_beam_that_holds_everything_finds_the_best_of_all(trigram):
    model = trigram(2, vocab_size=6)
    got = beam_search(model, PROMPTS, lengths=LENGTHS, max_new_tokens=3, num_beams=36, num_return_sequences=5)
    every = np.array(list(itertools.product(range(6), repeat=3)))
    for row, n in enumerate(LENGTHS):
        texts = np.concatenate([np.tile(PROMPTS[row, :n], (216, 1)), every], axis=1)
        scores = np.asarray(model.score(texts))[:, -3:].sum(1) / 3
        best = np.argsort(-scores)[:5]
        np.testing.assert_array_equal(got.sequences[row], every[best])
        np.testing.assert_allclose(got.scores[row], scores[best], atol=1e-5)


def test_one_beam_is_greedy_search(trigram):
    options = dict(lengths=LENGTHS, max_new_tokens=9, eos_id=4, pad_id=7)
    wanted, got = generate(trigram(), PROMPTS, **options), beam_search(trigram(), PROMPTS, num_beams=1, **options)
    np.testing.assert_array_equal(got.sequences[:, 0], wanted.tokens)
    np.testing.assert_array_equal(got.lengths[:, 0], wanted.lengths)
    np.testing.assert_allclose(got.scores[:, 0], wanted.log_probs.sum(1) / wanted.lengths, atol=1e-5)


@pytest.mark.slow
def test_a_ragged_batch_is_its_rows_alone_and_scores_are_the_models(trigram, steps):
    model, options = trigram(), dict(max_new_tokens=7, num_beams=3, num_return_sequences=3, eos_id=[4, 6], pad_id=9)
    padded = np.where(np.arange(5) < LENGTHS[:, None], PROMPTS, 8)
    got = beam_search(model, padded, lengths=LENGTHS, length_penalty=0.6, **options)
    for row, n in enumerate(LENGTHS):
        alone = beam_search(model, PROMPTS[row : row + 1, :n], length_penalty=0.6, **options)
        for name in got._fields:
            np.testing.assert_allclose(getattr(got, name)[row], getattr(alone, name)[0], atol=1e-5)
        for sequence, length, score in zip(*(getattr(got, name)[row] for name in got._fields), strict=True):
            text = np.zeros((1, 12), int)  # one shape
            text[0, : n + length] = [*PROMPTS[row, :n], *sequence[:length]]
            total = float(model.score(text)[0, n - 1 : n + length - 1].sum())
            assert float(score) == pytest.approx(total / int(length) ** 0.6, abs=1e-5)
            assert int(length) == 7 or int(sequence[length - 1]) in (4, 6)
            assert (np.asarray(sequence[length:]) == 9).all()
    assert (np.diff(got.scores, axis=1) <= 0).all() and got.lengths.min() < 7
    traced = len(steps)
    beam_search(trigram(5), padded, lengths=LENGTHS - (LENGTHS > 2), length_penalty=2.0, **options)
    assert len(steps) == traced  # new numbers compile nothing new


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_beams, mesh, explicit",  # the rows of all beams divide by the devices, or those of the prompts, or both
    [(2, "fsdp=8", True), (3, "fsdp=4,tensor=2", True), (3, "fsdp=4,tensor=2", False)],
)
def test_on_a_mesh_as_on_one_device(num_beams, mesh, explicit):
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    shape = dict(num_layers=1, hidden_size=32, vocab_size=60, initializer_range=0.3)
    model = init(preset("llama-tiny", **shape), jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, 60, (4, 9))
    options = dict(lengths=np.array([9, 4, 1, 3]), max_new_tokens=6, num_beams=num_beams, eos_id=37)
    plain = beam_search(model, tokens, **options)
    with use_mesh(mesh, explicit=explicit):
        sharded = beam_search(jax.device_put(model, specs.shardings(model.specs())), tokens, **options)
    np.testing.assert_array_equal(sharded.sequences, plain.sequences)
    np.testing.assert_allclose(sharded.scores, plain.scores, atol=1e-4)


def test_inside_somebody_elses_jit(trigram):
    options = dict(max_new_tokens=4, num_beams=2, eos_id=4)
    inside = jax.jit(lambda m, t, n, p: beam_search(m, t, lengths=n, length_penalty=p, **options).sequences)
    wanted = beam_search(trigram(), PROMPTS, lengths=LENGTHS, length_penalty=0.5, **options).sequences
    np.testing.assert_array_equal(inside(trigram(), PROMPTS, LENGTHS, 0.5), wanted)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(num_beams=0), ConfigError, "num_beams is 0; it must be a whole number, 1 or above"),
        (dict(num_return_sequences=3), ConfigError, "more hypotheses than .* keeps; raise num_beams from 2 to 3"),
        (dict(early_stopping="always"), ConfigError, "early_stopping is 'always'; it must be True, False or 'never'"),
        (dict(length_penalty=float("nan")), ConfigError, "length_penalty is nan"),
        (dict(max_new_tokens=0), ConfigError, "max_new_tokens is 0"),
        (dict(eos_id=11), DataError, "eos_id or stop has the token id 11"),
        (dict(lengths=np.array([5, 0, 1])), ConfigError, "prompt of row 1 is empty"),
    ],
)
def test_errors(trigram, change, error, message):
    with pytest.raises(error, match=message):
        beam_search(trigram(), PROMPTS, **(dict(max_new_tokens=3, num_beams=2) | change))
