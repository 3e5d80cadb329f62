"""Masked tokens and removed spans: nothing is lost, the numbers are the papers', and every draw can be had again."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import AddedToken, models

from lmx.core.errors import ConfigError, DataError
from lmx.data import (
    Batches,
    Document,
    Masked,
    SpanCorruption,
    Tokenizer,
    build_cache,
    masked,
    span_corruption,
    special_tokens,
)
from lmx.data.spans import collapse, draw_removed
from lmx.data.stepwise import generator

EOS = 256
MASKED = Masked(vocab_size=260, mask_id=257, special_ids=(EOS, 258, 259))
SPANS = SpanCorruption(tuple(range(399, 259, -1)), pad_id=257, eos_id=258)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    from lmx.data import byte_tokenizer

    text = "The quick brown fox jumps over the lazy dog, and nobody minds. " * 40
    documents = [Document(text[: 700 + 91 * i], "", "d") for i in range(20)]
    return build_cache(documents, byte_tokenizer(), tmp_path_factory.mktemp("cache"))


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def tokenizer(*special, words=("a", "b", "c")):
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    backend.add_special_tokens([AddedToken(name) for name in special])
    return Tokenizer(backend, "</s>")


def reassemble(inputs, targets, sentinels):
    """The text that inputs and targets came from, by their definition, a token at a time."""
    removed, current = {}, None
    for token in targets:
        if token in sentinels:
            current = removed.setdefault(token, [])
        else:
            current.append(token)
    return [whole for token in inputs for whole in (removed[token] if token in sentinels else [token])]


@settings(deadline=None, max_examples=200)
@given(
    st.integers(2, 300), st.floats(0.01, 0.99), st.floats(1, 20), st.integers(0, 2**32 - 1), st.integers(0, 10**6)
)
def test_inputs_and_targets_reassemble_to_the_text(length, density, mean_span, seed, step):
    options = SpanCorruption(tuple(range(1000, 700, -1)), 0, 1, density, mean_span)
    text = np.random.default_rng(length).integers(2, 50, length).astype(np.int32)
    removed = draw_removed(generator(seed, step, 0), length, options)
    inputs, targets = (collapse(text, gone, options.sentinel_ids).tolist() for gone in (removed, ~removed))
    assert reassemble(inputs, targets, set(options.sentinel_ids)) == text.tolist()
    counts = options.counts(length)
    assert (len(inputs) + 1, len(targets) + 1) == (counts.inputs, counts.targets)
    assert not removed[0] and removed[-1] and removed.sum() == counts.removed
    assert np.sum(np.diff(removed.astype(int)) == 1) == counts.spans
    used = [token for token in inputs if token >= 700]
    assert used == list(options.sentinel_ids[: counts.spans]) == [token for token in targets if token >= 700]


def paper_lengths(inputs_length, density=0.15, mean_span=3.0):
    """(stretch, targets) by the paper's code, with its own rounding and its own loop."""

    def lengths(tokens):
        noise = int(round(tokens * density))
        noise_spans = int(round(noise / mean_span))
        return tokens - noise + noise_spans + 1, noise + noise_spans + 1

    tokens = inputs_length
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, lengths(tokens)[1]


def test_the_lengths_are_those_of_the_paper():
    assert (SPANS.stretch(512), SPANS.counts(SPANS.stretch(512)).targets) == (568, 114)
    many = SpanCorruption(tuple(range(1000, 2000)), 0, 1)
    for length in (16, 64, 100, 127, 512, 1024, 2048):
        assert (many.stretch(length), many.counts(many.stretch(length)).targets) == paper_lengths(length), length


def test_removed_spans_are_drawn_uniformly():
    """A removed span's length has the law of a uniform cut of n into s: C(n - k - 1, s - 2) / C(n - 1, s - 1)."""
    counts = SPANS.counts(100)  # 15 tokens in 5 spans
    assert (counts.removed, counts.spans) == (15, 5)
    masks = [draw_removed(generator(7, step, 0), 100, SPANS) for step in range(4000)]
    assert all(mask.sum() == 15 for mask in masks)
    starts = [np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]))) for mask in masks]
    for which, items in ((0, counts.removed), (4, counts.removed)):
        seen = np.array([ends[2 * which + 1] - ends[2 * which] for ends in starts])
        most = items - counts.spans + 1
        law = np.array([math.comb(items - k - 1, counts.spans - 2) for k in range(1, most + 1)])
        law = law / math.comb(items - 1, counts.spans - 1)
        observed, expected = np.bincount(seen, minlength=most + 1)[1:], law * len(masks)
        observed, expected = (np.append(x[:8], x[8:].sum()) for x in (observed, expected))  # no cell below five
        assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_batches_of_spans(cache):
    batches = Batches(cache, 6, 32, seed=1, objective=SPANS)
    plain = Batches(cache, 6, SPANS.stretch(32), seed=1)
    _, targets_length = paper_lengths(32)
    short = 0
    for step in range(plain.rows_per_epoch // 6 + 2):
        batch, text = batches.at(step), plain.at(step)
        assert batch["encoder_tokens"].shape == batch["encoder_segment_ids"].shape == (6, 32)
        assert all(batch[name].shape == (6, targets_length) for name in batch if "encoder" not in name)
        assert {a.dtype.name for n, a in batch.items() if n != "weights"} == {"int32"}
        for row in range(6):
            whole = text["tokens"][row, text["weights"][row] != 0].tolist()
            inputs = batch["encoder_tokens"][row, batch["encoder_segment_ids"][row] != 0].tolist()
            targets = batch["targets"][row, batch["weights"][row] != 0].tolist()
            assert inputs[-1] == targets[-1] == SPANS.eos_id
            assert reassemble(inputs[:-1], targets[:-1], set(SPANS.sentinel_ids)) == whole
            assert batch["tokens"][row].tolist() == [257, *batch["targets"][row, :-1].tolist()]
            full = len(whole) == SPANS.stretch(32)
            assert (len(inputs), len(targets)) == (32, targets_length) if full else len(inputs) < 32
            short += not full
        assert np.array_equal(batch["weights"], batch["segment_ids"])
    assert short  # the end of the stream was among them


def test_a_row_of_next_to_nothing_weighs_nothing():
    raw = {"tokens": np.array([[5, 0, 0], [6, 7, 0]]), "weights": np.array([[1, 0, 0], [1, 1, 0]])}
    batch = SPANS.apply(raw, 5, seed=0, step=0, rows=[0, 1])
    assert batch["weights"].sum(1).tolist() == [0, 3] and batch["encoder_segment_ids"].sum(1).tolist() == [0, 3]
    assert batch["encoder_tokens"][1, :3].tolist() == [6, 399, 258]
    assert batch["targets"][1, :3].tolist() == [399, 7, 258]


def within(count, trials, share):
    """Whether a count lies within the bounds that a binomial leaves once in a million times."""
    low, high = stats.binom.interval(1 - 1e-6, trials, share)
    return low <= count <= high


def test_the_shares_of_masked_tokens(cache):
    batches = Batches(cache, 16, 128, seed=5, objective=MASKED)
    plain = Batches(cache, 16, 128, seed=5)
    chosen, ordinary, became, drawn = 0, 0, dict.fromkeys(("mask", "kept", "other"), 0), []
    for step in range(40):
        batch, text = batches.at(step), plain.at(step)["tokens"]
        where = batch["weights"] != 0
        assert np.array_equal(batch["targets"], text) and not np.isin(text[where], [EOS, 257]).any()
        assert np.array_equal(batch["tokens"][~where], text[~where])
        assert np.array_equal(batch["segment_ids"], plain.at(step)["segment_ids"])
        chosen, ordinary = chosen + where.sum(), ordinary + ((text != EOS) & (batch["segment_ids"] != 0)).sum()
        new, old = batch["tokens"][where], text[where]
        became["mask"] += (new == 257).sum()
        became["kept"] += (new == old).sum()
        drawn += new[(new != 257) & (new != old)].tolist()
    assert ordinary > 50_000 and within(chosen, ordinary, 0.15)
    assert within(became["mask"], chosen, 0.8)
    assert within(became["kept"], chosen, 0.1 + 0.1 / 256)  # one draw in 256 is the token that was there
    assert set(drawn) <= set(range(256)) and within(sum(token < 128 for token in drawn), len(drawn), 0.5)


def test_a_first_token_stands_before_every_row_and_is_never_masked(cache):
    always = Masked(260, 257, (EOS,), probability=1.0, masked=1.0, random=0.0, first_id=258)
    batch = Batches(cache, 8, 64, objective=always).at(0)
    text = Batches(cache, 8, 63).at(0)
    assert (batch["targets"][:, 0] == 258).all() and (batch["tokens"][:, 0] == 258).all()
    assert np.array_equal(batch["targets"][:, 1:], text["tokens"]) and (batch["weights"][:, 0] == 0).all()
    assert np.array_equal(batch["segment_ids"][:, 1:], text["segment_ids"])
    assert batch["positions"][0, :4].tolist() == [0, 1, 2, 3]
    later = batch["segment_ids"][:, 1:] > 1
    assert np.array_equal(batch["positions"][:, 1:][later], text["positions"][later])
    maskable = (text["tokens"] != EOS) & (text["segment_ids"] != 0)
    assert np.array_equal(batch["weights"][:, 1:] != 0, maskable) and (batch["tokens"][:, 1:][maskable] == 257).all()


@pytest.mark.parametrize("objective", [MASKED, SPANS], ids=["masked", "spans"])
def test_processes_and_resumed_runs_draw_the_same(cache, objective):
    def make(seed=3):
        return Batches(cache, 6, 48, seed, objective)

    whole = make().at(11)
    for count in (1, 2, 3, 6):
        shares = [make().at(11, index, count) for index in range(count)]
        assert same(whole, {name: np.concatenate([share[name] for share in shares]) for name in whole})
    iterator = make().iterate(10)
    next(iterator)
    assert same(next(iterator), whole)
    iterator.close()
    assert not same(whole, make(4).at(11)) and not same(whole, make().at(12))
    state = json.loads(json.dumps(make().state(11)))
    make().check(state)
    with pytest.raises(DataError, match=r"objective \(was {'name': '(Masked|SpanCorruption)'.*is None"):
        Batches(cache, 6, 48, 3).check(state)
    with pytest.raises(DataError, match="objective|fingerprint"):
        make().check(Batches(cache, 6, 48, 3).state(11))


@pytest.mark.parametrize("objective", [MASKED, SPANS], ids=["masked", "spans"])
def test_a_row_is_corrupted_anew_in_every_epoch(cache, objective):
    batches = Batches(cache, 1, 64, objective=objective)
    plain = Batches(cache, 1, objective.stretch(64))
    epoch, made = plain.rows_per_epoch, ({}, {})
    for step in range(2 * epoch):
        batch = batches.at(step)
        made[step // epoch][plain.at(step)["tokens"].tobytes()] = batch.get("encoder_tokens", batch["tokens"]).tobytes()
    assert made[0].keys() == made[1].keys()
    assert sum(made[0][row] == made[1][row] for row in made[0]) < epoch / 10


def test_special_tokens_are_found_by_name():
    made = masked(tokenizer("</s>", "[PAD]", "[MASK]", "[CLS]"), probability=0.3)
    assert (made.vocab_size, made.mask_id, made.special_ids, made.probability) == (7, 5, (3, 4, 5, 6), 0.3)
    assert made.ordinary.tolist() == [0, 1, 2]
    beyond = masked(tokenizer("</s>"), mask_id=6, vocab_size=10)
    assert beyond.mask_id == 6 and beyond.ordinary.tolist() == [0, 1, 2]
    named = span_corruption(tokenizer("</s>", "<pad>", "<extra_id_1>", "<extra_id_0>"))
    assert (named.sentinel_ids, named.pad_id, named.eos_id) == ((6, 5), 4, 3)
    free = span_corruption(tokenizer("</s>", "<pad>"), vocab_size=9, mean_span=2.0)
    assert (free.sentinel_ids, free.mean_span) == ((8, 7, 6, 5), 2.0)


def test_special_tokens_can_be_added():
    before = tokenizer("</s>", "<pad>")
    after = special_tokens.add(before, ("<mask>", "<pad>"))
    assert (before.vocab_size, after.vocab_size, after.eos_id) == (5, 6, 3)
    assert special_tokens.mask_id(after) == 5 and special_tokens.pad_id(after) == 4
    assert after.encode("a <mask>", special=True) == [0, 5]


def test_what_a_template_puts_before_a_text():
    made = tokenizer("</s>", "[CLS]")
    assert special_tokens.first_id(made) is None
    made.backend.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 3)])
    assert special_tokens.first_id(made) is None
    made.backend.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A </s>", special_tokens=[("</s>", 3), ("[CLS]", 4)]
    )
    assert special_tokens.first_id(made) == 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: masked(tokenizer("</s>")), DataError, r"no mask token: none of .*special tokens: </s>.*mask_id="),
        (lambda: masked(tokenizer("</s>"), mask_id=-1), DataError, "must be at least 0, not -1"),
        (lambda: masked(tokenizer("</s>"), mask_id=9, vocab_size=5), ConfigError, r"0 to 4, \[9\] are not among"),
        (lambda: span_corruption(tokenizer("</s>", "<pad>")), DataError, "no sentinels .*sentinel_ids=.*vocab_size="),
        (lambda: span_corruption(tokenizer("</s>"), sentinel_ids=[9]), DataError, "no padding token.*pad_id="),
        (lambda: Masked(9, 8, probability=0.0), ConfigError, "probability must lie above 0"),
        (lambda: Masked(9, 8, masked=0.9, random=0.2), ConfigError, r"masked \(0.9\) and random \(0.2\) are shares"),
        (lambda: Masked(2, 1, (0,)), ConfigError, "all 2 tokens are special"),
        (lambda: Masked(9, 8).stretch(1), ConfigError, "at least 2 tokens, not 1"),
        (lambda: SpanCorruption((5,), 0, 1, density=1.0), ConfigError, r"density \(1.0\) must lie between"),
        (lambda: SpanCorruption((5,), 0, 1, mean_span=0.5), ConfigError, r"mean_span \(0.5\) be at least 1"),
        (lambda: SpanCorruption((5, 5), 0, 1), ConfigError, "sentinel_ids must be distinct"),
        (lambda: SpanCorruption((5,), -1, 1), ConfigError, "must be at least 0"),
        (lambda: SpanCorruption((5, 6), 0, 1).stretch(128), ConfigError, "7 removed spans, there are only 2 sentinels"),
        (lambda: SpanCorruption((5, 6), 0, 1).stretch(2), ConfigError, "at least 3 tokens, not 2"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_too_little_text_for_a_stretch():
    cache = SimpleNamespace(num_tokens=100, tokenizer_fingerprint="x")
    with pytest.raises(DataError, match="has 99 tokens, one batch needs 2 x 68 = 136"):
        Batches([cache], 2, 62, objective=SPANS)
