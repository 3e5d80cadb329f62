"""Pairs and conversations: read, encoded, and in batches that hold each of them once an epoch, padded or packed."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from lmx.core.errors import ConfigError, DataError, FolderError
from lmx.data import (
    Example,
    ExampleBatches,
    Pair,
    Tokenizer,
    encode_conversations,
    encode_pairs,
    gather,
    open_examples,
    read_conversations,
    read_json_pairs,
    read_pairs,
    save_examples,
)

PAD = 99


def words(*special):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(name) for name in special])
    return Tokenizer(backend)


def some(lengths, encoder_lengths=None, seed=0):
    """Examples of random tokens, about half of them learnt."""
    draws = np.random.default_rng(seed)
    encoder_lengths = encoder_lengths or [None] * len(lengths)
    return gather(
        Example(
            draws.integers(1, 90, n + 1),
            [False, *(draws.random(n - 1) < 0.5), True],
            None if m is None else draws.integers(1, 90, m),
        )
        for n, m in zip(lengths, encoder_lengths, strict=True)
    )


def contents(batch):
    """Every example found in a batch: (inputs, targets, weights, encoder tokens), by its segment's number."""
    found = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            assert batch["positions"][row, here].tolist() == list(range(here.sum()))
            given = ()
            if "encoder_tokens" in batch:
                there = batch["encoder_segment_ids"][row] == segment
                given = tuple(batch["encoder_tokens"][row, there].tolist())
            found.append((*(tuple(batch[n][row, here].tolist()) for n in ("tokens", "targets", "weights")), given))
    for name, segments in [("tokens", ""), ("targets", ""), ("encoder_tokens", "encoder_")][: 2 + bool(given)]:
        assert (batch[name][batch[f"{segments}segment_ids"] == 0] == PAD).all()
    assert (batch["weights"][batch["segment_ids"] == 0] == 0).all()
    return found


def expected(examples):
    rows = []
    for index in range(len(examples)):
        tokens, learnt, given = examples[index]
        given = () if given is None else tuple(given.tolist())
        rows.append((tuple(tokens[:-1].tolist()), tuple(tokens[1:].tolist()), tuple(learnt[1:].astype(float)), given))
    return rows


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=4, max_size=60),
    st.sampled_from([1, 2, 4]), st.integers(0, 99), st.booleans(), st.sampled_from(["packed", "padded", "buckets"]),
)  # fmt: skip
def test_each_example_comes_once_an_epoch(sizes, batch_size, seed, encoder, how):
    examples = some([n for n, _ in sizes], [m for _, m in sizes] if encoder else None)
    lengths = (6, 12, 24) if how == "buckets" else 64 if how == "packed" else 24
    if how == "packed" and len(sizes) < 60:
        batch_size = 1
    batches = ExampleBatches(examples, batch_size, lengths, seed, pad_id=PAD, packed=how == "packed")
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        made = [batches.at(step) for step in steps]
        assert sorted(found for batch in made for found in contents(batch)) == sorted(expected(examples))
        assert all(batch["tokens"].shape[1] in np.atleast_1d(lengths) for batch in made)
    for count in {1, batch_size}:
        shares = [batches.at(1, index, count) for index in range(count)]
        for name, whole in batches.at(1).items():
            assert np.array_equal(whole, np.concatenate([share[name] for share in shares]))


@pytest.mark.parametrize("packed", [False, True])
def test_each_example_comes_once_in_an_evaluation_whatever_the_number_of_rows(packed):
    examples = some([3, 9, 20, 24, 5, 7], [4, 4, 24, 1, 8, 2])
    batches = list(ExampleBatches(examples, 1, (30,), pad_id=PAD, packed=packed).each(4))
    assert sorted(found for batch in batches for found in contents(batch)) == sorted(expected(examples))
    assert all(batch["tokens"].shape == (4, 30) for batch in batches)


@pytest.mark.parametrize("given", [None, [4, 1, 6]])
def test_examples_go_to_a_file_and_back(given, tmp_path):
    examples = some([3, 9, 20], given)
    save_examples(examples, tmp_path / "some.safetensors")
    again = open_examples(tmp_path / "some.safetensors")
    assert again.fingerprint == examples.fingerprint and expected(again) == expected(examples)
    assert again.encoder_tokens is None if given is None else again.encoder_tokens.dtype == np.int32
    with pytest.raises(FolderError, match="other.safetensors is missing"):
        open_examples(tmp_path / "other.safetensors")


def test_a_bucket_is_no_longer_than_its_examples_need():
    examples = some([3] * 40 + [9] * 40 + [20] * 8)
    batches = ExampleBatches(examples, 8, (4, 10, 24), pad_id=PAD)
    lengths = [batches.at(step)["tokens"].shape[1] for step in range(batches.steps_per_epoch)]
    assert sorted(lengths) == [4] * 5 + [10] * 5 + [24]


def test_packed_rows_are_nearly_full():
    sizes = np.random.default_rng(0).integers(5, 60, 2000).tolist()
    packed = ExampleBatches(some(sizes), 10, 128, packed=True)
    assert packed.steps_per_epoch * 10 * 128 < sum(sizes) * 1.05


def test_batches_repeat_resume_and_are_checked():
    def make(seed=1, **options):
        return ExampleBatches(examples, 4, (8, 32), seed, **options)

    examples = some(list(range(1, 31)))
    iterator = make().iterate(5)
    for step in range(5, 9):
        for name, whole in next(iterator).items():
            assert np.array_equal(whole, make().at(step)[name])
    iterator.close()
    assert not np.array_equal(make().at(0)["tokens"], make(2).at(0)["tokens"])
    state = json.loads(json.dumps(make().state(7)))
    make().check(state)
    for other, message in [
        (make(2), r"seed \(was 1, is 2\), order"),
        (make(pad_id=5), r"examples \(was 'pad 0, padded, refuse', is 'pad 5"),
        (ExampleBatches(examples, 4, 32, 1), r"length \(was \[8, 32\], is \[32\]\)"),
        (ExampleBatches(some(list(range(1, 31)), seed=1), 4, (8, 32), 1), "fingerprint"),
    ]:
        with pytest.raises(DataError, match=message):
            other.check(state)


def test_examples_that_are_too_long():
    examples = some([4, 30, 5], [4, 4, 31])
    with pytest.raises(DataError, match=r"2 of 3 examples exceed .* row of 16 \(the first is number 1, .*31\)"):
        ExampleBatches(examples, 1, 16)
    dropped = ExampleBatches(examples, 1, 16, too_long="drop")
    assert (dropped.num_dropped, dropped.steps_per_epoch) == (2, 1)
    cut = ExampleBatches(examples, 3, 16, pad_id=PAD, too_long="cut")
    found = {tuple(e[1][:4]): e for e in contents(cut.at(0))}
    for inputs, targets, weights, encoder in expected(examples):
        assert found[targets[:4]] == (inputs[:16], targets[:16], weights[:16], encoder[:16])


def test_pairs_become_what_the_decoder_writes():
    tokenizer = words("</s>", "<pad>", "<s>")
    pairs = [Pair("a b c", "c b"), Pair("b", "a"), Pair("a a", "c c c c")]
    examples = encode_pairs(pairs, tokenizer)
    batch = ExampleBatches(examples, 3, 6, pad_id=5).at(0)
    order = np.argsort(batch["weights"].sum(1))
    assert batch["encoder_tokens"][order].tolist() == [[1, 4, 5, 5, 5, 5], [0, 1, 2, 4, 5, 5], [0, 0, 4, 5, 5, 5]]
    assert batch["targets"][order].tolist() == [[0, 4, 5, 5, 5, 5], [2, 1, 4, 5, 5, 5], [2, 2, 2, 2, 4, 5]]
    assert batch["tokens"][order].tolist() == [[5, 0, 5, 5, 5, 5], [5, 2, 1, 5, 5, 5], [5, 2, 2, 2, 2, 5]]
    assert batch["weights"].sum() == 10 and batch["encoder_segment_ids"].sum() == 9
    bart = encode_pairs(pairs, tokenizer, start_id=4, source_start_id=6)
    assert bart[0].tokens.tolist() == [4, 2, 1, 4] and bart[0].encoder_tokens.tolist() == [6, 0, 1, 2, 4]


def test_pairs_from_two_files_and_from_one(tmp_path):
    (tmp_path / "a.de").write_bytes("eins\u2028x\r\nzwei\n\n vier\n".encode())
    (tmp_path / "b.en.gz").write_bytes(gzip.compress(b"one\ntwo\nthree\nfour\n"))
    pairs = read_pairs(tmp_path / "a.de", tmp_path / "b.en.gz")
    assert pairs == [("eins\u2028x", "one"), ("zwei", "two"), (" vier", "four")]
    rows = [{"de": "eins", "en": "one"}, {"de": " ", "en": "two"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_json_pairs(tmp_path / "c.jsonl", "de", "en") == [("eins", "one")]
    (tmp_path / "blank").write_text("\n \n\n\n")
    (tmp_path / "short").write_text("one\ntwo")
    for call, error, message in [
        (lambda: read_pairs(tmp_path / "a.de", tmp_path / "short"), DataError, "a.de' has 4 lines and .*short' 2"),
        (lambda: read_pairs(tmp_path / "a.de", tmp_path / "blank"), DataError, "no pairs in .*every one has a blank"),
        (lambda: read_pairs(tmp_path / "a.d", tmp_path / "short"), FolderError, "no file .*a.d'; did you mean 'a.de'"),
        (lambda: read_json_pairs(tmp_path / "c.jsonl"), DataError, r"line 1: .*'source' \(keys found: 'de', 'en'\)"),
        (lambda: encode_pairs(pairs, words("</s>")), DataError, "the tokenizer has no padding token"),
        (lambda: encode_pairs([], words("</s>")), DataError, "no pairs to encode"),
    ]:
        with pytest.raises(error, match=message):
            call()


TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
TURN = "{% if add_generation_prompt %}assistant {% endif %}"


def test_conversations_teach_what_the_assistant_says(tmp_path):
    pytest.importorskip("jinja2")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}, {"role": "user", "content": "a"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": talk}) + "\n\n" + json.dumps({"messages": talk[:1]}) + "\n")
    tokenizer = words("</s>")  # user and assistant are unknown words: 3
    examples = encode_conversations(read_conversations(path), tokenizer, TEMPLATE + TURN)
    assert len(examples) == 1
    batch = ExampleBatches(examples, 1, 10, pad_id=4).at(0)
    assert batch["tokens"][0].tolist() == [3, 0, 4, 3, 1, 2, 4, 3, 0, 4]
    assert batch["targets"][0].tolist() == [0, 4, 3, 1, 2, 4, 3, 0, 4, 4]
    assert batch["weights"][0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]  # what it says, and the </s> that ends it
    assert batch["segment_ids"].sum() == 9
    with pytest.raises(DataError, match="no conversation has an assistant's turn"):
        encode_conversations([talk[:1]], tokenizer, TEMPLATE)
    with pytest.raises(DataError, match="conversation 1: .*got a set"):
        encode_conversations([talk, [{"role": "user", "content": {1}}]], tokenizer, TEMPLATE + TURN)


def test_files_that_hold_no_conversations(tmp_path):
    path = tmp_path / "chat.jsonl"
    for row, message in [
        ({"turns": []}, r"line 1: there is no list of messages under 'messages' \(keys found: 'turns'\)"),
        ({"messages": [{"role": "user"}]}, "line 1: message 0 needs a role and a content, it is"),
        (None, "has no conversations"),
    ]:
        path.write_text("" if row is None else json.dumps(row))
        with pytest.raises(DataError, match=message):
            read_conversations(path)
    with pytest.raises(FolderError, match="did you mean 'chat.jsonl'"):
        read_conversations(tmp_path / "chats.jsonl")


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "there are no examples"),
        ([([1, 2], [0])], "example 0 has 2 tokens and 1 marks"),
        ([([1, 2], [0, 1]), ([1, 2], [1, 0])], "example 1 has no token to learn after its first"),
        ([([1, 2], [0, 1], [3]), ([1, 2], [0, 1])], "example 1 and those before it differ"),
        ([([1, 2], [0, 1]), ([1, 2], [0, 1], [3])], "example 1 and those before it differ"),
        ([([1, 2], [0, 1], [])], "example 0 gives the encoder no tokens"),
    ],
)
def test_examples_that_are_none(examples, message):
    with pytest.raises(DataError, match=message):
        gather(Example(*example) for example in examples)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: ExampleBatches(e, 4, ()), ConfigError, "length 0 must be at least 1"),
        (lambda e: ExampleBatches(e, 4, (8, 4)), ConfigError, "lengths must increase, .* not 8, 4"),
        (lambda e: ExampleBatches(e, 4, (4, 8), packed=True), ConfigError, "packed rows have one length, not 2"),
        (lambda e: ExampleBatches(e, 4, 8, too_long="skip"), ConfigError, "too_long must be .* not 'skip'"),
        (lambda e: ExampleBatches(e, 9, 8), DataError, "8 examples make 8 rows, one batch needs 9"),
        (lambda e: ExampleBatches(e, 4, 8).at(0, 0, 3), DataError, "4 rows does not divide among 3 processes"),
    ],
)
def test_numbers_out_of_range(call, error, message):
    with pytest.raises(error, match=message):
        call(some([3] * 8))
