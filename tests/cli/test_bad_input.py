"""What a user may get wrong: each is told in one message, exits with 2, and leaves no folder behind."""

from __future__ import annotations

import json
import re
import shutil

import jax
import pytest

import lmx as library
from lmx.core.errors import ConfigError
from lmx.data import byte_tokenizer, train_bpe


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("missing.txt", None, r"there is no file or folder '.*missing.txt'"),
        ("empty.txt", b"", r"no text in '.*empty.txt': 1 file\(s\) with nothing but blanks"),
        ("image.txt", b"GIF8\0\0", r"image.txt' is a binary file, not text: byte 4 is zero"),
        ("latin.txt", b"caf\xe9 au lait", r"latin.txt' is not UTF-8: byte 3 is 0xe9 .*iconv"),
        ("short.txt", b"hello\n", r"are too little text: nothing is left for the \w+ split. Give more text"),
        ("table.csv", b"a,b\n", r"cannot tell what is in '.*table.csv': expected a name that ends in .txt"),
    ],
)
def test_text_that_cannot_be_learned(name, content, wanted, refused, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert re.search(wanted, refused("--data", tmp_path / name))


def test_a_folder_without_text(refused, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "photos' gives no text files: none found that ends in .txt" in refused("--data", tmp_path / "photos")


def test_a_missing_path_names_what_is_near(refused, text):
    assert "did you mean 'prose'" in refused("--data", text / "prosa")


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("--preset qick", "no preset 'qick', there are quick, small; did you mean 'quick'?"),
        ("--model lama-tiny", "did you mean 'llama-tiny'?"),
        ("--optimizer adam", "no optimizer 'adam', there are adamw, adafactor, muon; did you mean 'adamw'?"),
        ("--schedule cosin", "no schedule 'cosin', there are cosine, wsd; did you mean 'cosine'?"),
        ("--tokenizer byt", "no tokenizer 'byt', there are bpe, byte, and folders with a tokenizer.json; did you"),
        ("--objective mask", "no objective 'mask', there are causal, masked, spans, pairs, chat; did you mean"),
        ("--objective chat", "'chat' needs a chat template, and the tokenizer 'byte' has none: give --init or"),
        ("--objective pairs", "'pairs' learns from --data FILE.jsonl with the keys source and target, or from two"),
        ("--remat dost", "remat 'dost' is none of none, dots, full; did you mean 'dots'?"),
        ("--compute-dtype float12", "compute_dtype 'float12' is not a dtype; try float32 or bfloat16"),
        ("--init llama-tiny", "'llama-tiny' is a preset, a shape without weights"),
        ("--model gpt2-tiny --length 512", "rows of 512 tokens exceed the 256 learned positions of gpt2-tiny; give"),
        ("--mesh fsdp=3", "describes 3 devices, but there are 8 (cpu); the sizes must multiply to 8, e.g. fsdp=8"),
        ("--mesh fdsp=8", "no axis 'fdsp', the axes are data, fsdp, tensor, expert; did you mean 'fsdp'?"),
        ("--steps 0", "steps must be at least 1, not 0"),
        ("--learning-rate -1", "learning_rate must be 0 or above, and finite, not -1.0"),
        ("--ema-decay 1", "ema_decay must lie between 0 and 1, such as 0.999, not 1.0"),
        ("--seed -1", "seed must be at least 0 and below 2**32, not -1"),
        ("--warmup 100", "warmup 100 must be at least 0 and less than the 4 steps"),
        ("--accumulate 3", "a batch_size of 4 does not divide into 3 microbatches (accumulate)"),
        ("--length 100000", "Give more text, or a smaller batch size or length."),
        ("--train layers[7]/mlp", "selects nothing; did you mean 'decoder/layers/mlp/"),
        ("--train layers[7]/mlp", "layers are numbered 0 to 1"),
        ("--train ((", "path pattern '((' is not a regular expression"),
    ],
)
def test_options_that_cannot_be(words, wanted, refused):
    assert wanted in refused(*words.split())


def test_rows_longer_than_the_learned_positions_of_a_given_model(lmx, refused, text, tmp_path):
    model = library.init(library.preset("gpt2-tiny"), jax.random.key(0))
    library.save(model, tmp_path / "gpt2", tokenizer=byte_tokenizer())
    assert re.search("512.*256", refused("--init", tmp_path / "gpt2", "--length", "512", "--batch-size", "8"))
    done = lmx("eval", tmp_path / "gpt2", "--data", text, "--length", "512")
    assert done.code == 2 and re.search("512.*256", done.err)
    done = lmx("generate", tmp_path / "gpt2", "--max-new-tokens", "500")
    assert done.code == 2 and re.search("500.*256", done.err)


def test_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match="hidden_size 64 does not divide by num_heads 3; choose heads that divide"):
        library.preset("llama-tiny", num_heads=3)
    with pytest.raises(ConfigError, match="num_heads 4 does not divide by num_kv_heads 3"):
        library.preset("llama-tiny", num_kv_heads=3)


@pytest.mark.slow
def test_a_tokenizer_that_does_not_fit_the_model(lmx, model_copy, text):
    words = (text / "prose" / "0.txt").read_text()
    train_bpe([words], 300).save(model_copy)
    for command in (("eval", model_copy, "--data", text), ("generate", model_copy)):
        done = lmx(*command)
        assert done.code == 2
        assert "the tokenizer has 300 tokens, the model's embedding only 257 rows" in done.err


def test_a_model_folder_without_tokenizer(lmx, model_copy):
    (model_copy / "tokenizer.json").unlink()
    done = lmx("generate", model_copy)
    assert done.code == 2 and "has no tokenizer.json" in done.err


@pytest.mark.parametrize("file, field", [("config.json", "config_version"), ("structure.json", "version")])
def test_a_model_of_a_newer_version(file, field, lmx, model_copy):
    about = json.loads((model_copy / file).read_text())
    assert field in about
    (model_copy / file).write_text(json.dumps(about | {field: 99}))
    done = lmx("describe", model_copy)
    assert done.code == 2
    assert re.search(r"version 99.* reads up to 1.*install a newer", done.err)


def test_a_model_that_is_not_whole(lmx, model_copy):
    (model_copy / "model.safetensors").unlink()
    done = lmx("describe", model_copy)
    assert done.code == 2 and "model.safetensors" in done.err


def test_a_folder_that_is_no_model(lmx, run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    done = lmx("generate", "runn")
    assert done.code == 2 and done.err == "lmx: there is no folder 'runn'; did you mean 'run'?\n"
    done = lmx("eval", text)
    assert done.code == 2 and "is not a model folder of lmx: it has no structure.json; it has lists, prose" in done.err
    shutil.copy(run / "run.json", tmp_path)
    done = lmx("describe", tmp_path)
    assert done.code == 2 and "has not finished a model yet; go on with: lmx train --resume --output" in done.err
