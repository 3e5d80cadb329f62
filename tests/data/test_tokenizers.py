"""Tokenizers lose nothing, repeat themselves, and never see a special token in a text."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors

from lmx.core.errors import DataError, FolderError
from lmx.data import Tokenizer, byte_tokenizer, check_fits, load_tokenizer, train_bpe

CODE = (
    "def f(x):\n    if x:\n        return 12345 + x  # naïve\n\n\nclass A:\n    def g(self):\n        pass\n"
)
BYTES = byte_tokenizer()
BPE = train_bpe([CODE] * 3 + ["The quick brown fox's tail. " * 20], 400)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(ANY_TEXT)
def test_bytes_round_trip(text):
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text


@settings(deadline=None)
@given(ANY_TEXT | st.text(" \n\t\rax1'é<|>"))
def test_bpe_round_trip(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.eos_id not in ids


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_special_token_written_in_a_text_is_text(tokenizer, tmp_path):
    text = "before <|endoftext|> after"
    tokenizer.save(tmp_path)
    for one in (tokenizer, load_tokenizer(tmp_path)):
        ids = one.encode(text)
        assert one.eos_id not in ids and one.encode_batch([text]) == [ids]
        assert one.decode([*ids, one.eos_id]) == text


def test_training_repeats_and_merges_indentation():
    again = train_bpe([CODE] * 3 + ["The quick brown fox's tail. " * 20], 400)
    assert again.fingerprint == BPE.fingerprint != BYTES.fingerprint
    assert BPE.vocab_size <= 400 and BPE.eos_id == 0
    pieces = [BPE.decode([i]) for i in BPE.encode("\n        return 123")]
    assert pieces == ["\n", "       ", " return", " ", "12", "3"]


def test_training_needs_room_for_the_bytes():
    with pytest.raises(DataError, match="vocab_size 100 has no room for 256 bytes.*at least 257"):
        train_bpe(["text"], 100)


def test_batch_equals_one_by_one():
    texts = [CODE, "", "x" * 1000, "née"]
    assert BPE.encode_batch(texts) == [BPE.encode(text) for text in texts]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    for where in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = load_tokenizer(where)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.eos_id, loaded.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
        assert loaded.encode(CODE) == tokenizer.encode(CODE)


def test_other_tokens_may_end_what_is_generated(tmp_path):
    Tokenizer(BYTES.backend, eos_ids=[65, 256]).save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_ids == (65, 256) and loaded.eos_id == 256
    assert load_tokenizer(tmp_path, "<|endoftext|>").eos_ids == (256,)
    BYTES.save(tmp_path)  # what is there already is the model's
    assert load_tokenizer(tmp_path).eos_ids == (65, 256)
    BYTES.save(tmp_path / "plain")
    assert load_tokenizer(tmp_path / "plain").eos_ids == (256,)
    assert not (tmp_path / "plain" / "generation_config.json").exists()


def foreign(folder, *special, config=None):
    """Somebody else's tokenizer: words, with truncation on and special tokens added after the vocabulary."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "stop": 3}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(name) for name in special])
    backend.enable_truncation(2)
    backend.enable_padding(length=2)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_foreign_tokenizer_neither_truncates_nor_pads_and_counts_added_tokens(tmp_path):
    loaded = load_tokenizer(foreign(tmp_path, "<pad>", "</s>"))
    assert loaded.encode("a b a b") == [1, 2, 1, 2] and loaded.encode_batch(["a"]) == [[1]]
    assert (loaded.vocab_size, loaded.eos_id) == (6, 5)


def test_texts_within_the_special_tokens_that_a_tokenizer_puts_around_them(tmp_path):
    """The post-processor's, as the library itself encodes and truncates with them."""
    path = foreign(tmp_path, "[CLS]", "[SEP]") / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
    )
    library.no_padding()
    library.save(str(path))
    loaded, texts = load_tokenizer(tmp_path), ["a b a b", "", "b"]
    for limit in (None, 3, 4, 100):
        library.enable_truncation(limit) if limit else library.no_truncation()
        wanted = [encoding.ids for encoding in library.encode_batch(texts)]
        assert loaded.encode_framed(texts, limit) == wanted
    assert loaded.encode_framed(["a b a b"], 4) == [[4, 1, 2, 5]] and loaded.encode("a") == [1]
    assert BPE.encode_framed([CODE]) == [BPE.encode(CODE)]  # it puts none
    with pytest.raises(DataError, match="max_length 2 leaves no room beside 2 special tokens"):
        loaded.encode_framed(["a"], 2)


@pytest.mark.parametrize(
    ("special", "config", "eos_token", "found"),
    [
        (["</s>", "<|endoftext|>"], None, None, "<|endoftext|>"),
        (["</s>", "<|end_of_text|>"], None, None, "</s>"),
        (["[SEP]"], {}, None, "[SEP]"),
        (["<eos>", "<x>"], {"eos_token": "<x>"}, None, "<x>"),
        (["<eos>", "<x>"], {"eos_token": {"content": "<x>"}}, None, "<x>"),
        (["<eos>", "<x>"], {"eos_token": "<x>"}, "stop", "stop"),
    ],
)
def test_the_end_of_text_of_a_foreign_tokenizer(tmp_path, special, config, eos_token, found):
    loaded = load_tokenizer(foreign(tmp_path, *special, config=config), eos_token)
    assert loaded.eos_token == found
    loaded.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").eos_id == loaded.eos_id


def test_an_unknown_end_of_text_says_how_to_name_it(tmp_path):
    with pytest.raises(
        DataError, match=r"which token ends a text is unknown.*eos_token=.*special tokens here: <x>"
    ):
        load_tokenizer(foreign(tmp_path, "<x>"))
    with pytest.raises(DataError, match=r"no token 'stp' to end a text with; did you mean 'stop'"):
        load_tokenizer(tmp_path, "stp")


def test_bad_folders(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "spiece.model").write_text("x")
    with pytest.raises(FolderError, match=r"has no tokenizer.json \(it holds: spiece.model\)"):
        load_tokenizer(tmp_path / "model")
    with pytest.raises(FolderError, match="there is no tokenizer .*modle'; did you mean 'model'"):
        load_tokenizer(tmp_path / "modle")
    (tmp_path / "model" / "tokenizer.json").write_text("{ broken")
    with pytest.raises(
        DataError, match="tokenizer.json' is not a tokenizer that the tokenizers library reads"
    ):
        load_tokenizer(tmp_path / "model")
    BYTES.save(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="tokenizer_config.json' is not a JSON object"):
        load_tokenizer(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="cannot write a tokenizer to .*file"):
        BYTES.save(tmp_path / "file")


def test_a_tokenizer_larger_than_the_embedding():
    check_fits(BYTES, 257)
    check_fits(BYTES, 50_000)
    with pytest.raises(DataError, match="the tokenizer has 257 tokens, the model's embedding only 256 rows"):
        check_fits(BYTES, 256)


def test_importing_the_data_room_does_not_import_jax():
    program = "import sys, lmx.data; print('jax' in sys.modules, 'grain' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_no_warning_and_no_deadlock_after_a_fork():
    program = (
        "import multiprocessing as m\n"
        "from lmx.data import byte_tokenizer\n"
        "t = byte_tokenizer()\n"
        "t.encode_batch(['abc'] * 100)\n"
        "p = m.get_context('fork').Process(target=t.encode_batch, args=(['abc'] * 100,))\n"
        "p.start(); p.join(60); print(p.exitcode)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_gpt2_vocabulary_from_files(real_data, tmp_path):
    """GPT-2's own vocabulary, put into a tokenizer.json, gives the ids that are known for it."""
    import gzip

    folder = real_data / "tokenizers" / "gpt2"
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
    backend = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.eos_id) == (50257, 50256)
    assert loaded.encode("Hello world") == [15496, 995]
    assert loaded.decode(loaded.encode(CODE)) == CODE
