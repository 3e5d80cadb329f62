"""Each objective trains a small model of its kind, through the one cross-entropy and the one step.

The causal one does so in most tests of training.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import data, losses
from lmx.models import transformer
from lmx.models.config import Config
from lmx.train import adamw, make_train_step, start
from lmx.train.feed import place_batch

VOCAB, MASK, PAD, FIRST_SENTINEL = 288, 257, 258, 287
LENGTH = 25  # of the encoder's rows and the decoder's
ENCODER_DECODER = dict(architecture="encoder_decoder", position="relative", activation="relu", num_encoder_layers=1)
ENCODER = dict(architecture="encoder", position="learned", max_length=64, activation="gelu", norm="layernorm")


@functools.cache
def step():
    return make_train_step(losses.cross_entropy, adamw(1e-2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    text = "one two three four five six seven eight nine ten " * 12
    documents = [data.Document(text[i:], "", "d") for i in range(40)]
    return data.build_cache(documents, data.byte_tokenizer(), tmp_path_factory.mktemp("cache"))


def made(**changes):
    config = Config(VOCAB, num_layers=1, hidden_size=32, num_heads=2, intermediate_size=64, remat="none", **changes)
    return transformer.init(config, jax.random.key(0))


def share_left(model, batches, steps):
    """The mean loss of the last five steps by that of the first five."""
    state, seen = start(model, adamw(1e-2)), []
    for number in range(steps):
        state, metrics = step()(state, place_batch(batches.at(number)))
        seen.append(float(metrics["loss"]))
    assert np.isfinite(seen).all()
    return np.mean(seen[-5:]) / np.mean(seen[:5])


def total(state, batches):
    """(steps, targets, the sum of their losses) of one epoch, the state as it was in every step."""
    sums = np.zeros(3)
    for number in range(batches.steps_per_epoch):
        _, metrics = step()(jax.tree.map(jnp.copy, state), place_batch(batches.at(number)))
        weight = float(metrics["weight"])
        sums += (1, weight, weight * float(metrics["loss"]))
    return sums


def pairs(count=200):
    """A letter some times over, and its capital as often: what comes is to be read off the encoder."""
    draws = np.random.default_rng(0)
    texts = [chr(97 + draws.integers(8)) * draws.integers(3, 9) for _ in range(count)]
    return data.encode_pairs([data.Pair(text, text.upper()) for text in texts], data.byte_tokenizer(), start_id=PAD)


def test_masked(cache):
    objective = data.masked(data.byte_tokenizer(), mask_id=MASK, vocab_size=VOCAB)
    assert share_left(made(**ENCODER), data.Batches(cache, 8, 48, objective=objective), 60) < 0.7


@pytest.mark.slow
def test_spans(cache):
    half = dict(density=0.5, mean_span=2.0)  # the targets are then as long as the inputs: one program for these tests
    objective = data.span_corruption(data.byte_tokenizer(), vocab_size=VOCAB, pad_id=PAD, **half)
    batches = data.Batches(cache, 8, LENGTH, objective=objective)
    assert batches.at(0)["tokens"].shape == batches.at(0)["encoder_tokens"].shape == (8, LENGTH)
    assert batches.at(0)["targets"][0, 0] == FIRST_SENTINEL
    assert share_left(made(**ENCODER_DECODER), batches, 60) < 0.6


@pytest.mark.slow
def test_pairs():
    assert share_left(made(**ENCODER_DECODER), data.ExampleBatches(pairs(), 8, LENGTH, pad_id=PAD), 60) < 0.2


def test_a_packed_row_costs_what_its_pairs_cost_alone():
    """Neither the decoder's nor the encoder's segments see each other, and the decoder sees its own encoder's."""
    state, examples = start(made(**ENCODER_DECODER), adamw(1e-2)), pairs(48)
    packed, alone = (
        total(state, data.ExampleBatches(examples, 8, LENGTH, pad_id=PAD, packed=packed)) for packed in (True, False)
    )
    assert packed[0] < alone[0] == 6 and packed[1] == alone[1]
    assert packed[2] == pytest.approx(alone[2], rel=1e-5)


@pytest.mark.slow
def test_only_what_the_assistant_says_is_learnt():
    """The questions are noise and the answers are not: a loss on both could not fall so far."""
    draws = np.random.default_rng(0)
    examples = data.gather(
        data.Example([256, *draws.integers(0, 256, 12), *b"yes, it is"], [False] * 13 + [True] * 10) for _ in range(64)
    )
    assert share_left(made(), data.ExampleBatches(examples, 8, 46, pad_id=PAD, packed=True), 60) < 0.1
