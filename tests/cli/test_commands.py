"""The command line itself (help, names, exit codes), and `lmx eval`, `lmx generate`, `lmx describe` on a run."""

from __future__ import annotations

import dataclasses
import math
import re
import typing

import numpy as np
import pytest

import lmx as library
from lmx.cli.main import COMMANDS
from lmx.recipes.options import PRESETS


def plain(text: str) -> str:
    """A help text without its boxes and line breaks."""
    return " ".join(re.sub(r"[│╭╰─╮╯]", " ", text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name, lmx):
    done = lmx(*name.split(), "--help")
    assert done.code == 0
    said = plain(done.out)
    kind = COMMANDS[name][0]
    for field in dataclasses.fields(kind):
        positional = field.name in ("source", "target") or field.name == "model" and name not in ("train", "compare")
        option = field.name.upper() if positional else f"--{field.name.replace('_', '-')}"
        after = said.partition("arguments" if positional else "options")[2].partition(f" {option} ")[2]
        assert len(after.split()) > 3, option
        first = re.sub(r"^(STR|INT|FLOAT|\[STR \[STR \.\.\.\]\]) ", "", after)
        assert first[0].isupper() or first.startswith(("adamw", "bpe")), (option, first[:60])
    assert "None" not in said
    assert typing.cast(str, kind.__doc__).split(".")[0].split("\n")[0] in said


def test_overview_and_version(lmx):
    done = lmx("--help")
    assert done.code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]", done.out, re.M)
    assert lmx().out == done.out
    assert lmx("--version").out == f"lmx {library.__version__}\n"


@pytest.mark.parametrize("words", [("lora",), ("lora", "--help")])
def test_the_overview_of_several_commands(words, lmx):
    done = lmx(*words)
    assert done.code == 0 and done.out.startswith("usage: lmx lora COMMAND [OPTIONS]\n")
    wanted = [name for name in COMMANDS if name.startswith("lora ")]
    assert re.findall(r"^  (lora \w+) +[A-Z]", done.out, re.M) == wanted


def test_the_help_shows_what_the_preset_fills_in(lmx):
    for name, words in {"quick": (), "small": ("--preset", "small")}.items():
        said = plain(lmx("train", *words, "--help").out).partition(" --model ")[2].partition(" --init ")[0]
        assert f"(default: {PRESETS[name]['model']})" in said


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("trian", f"no command 'trian', there are {', '.join(COMMANDS)}; did you mean"),
        ("lora atach", "no command 'lora atach', there are lora attach, lora merge, lora extract, lora rerank; did"),
        ("train --stepz 3", "--steps INT"),
        ("eval run --dta text", "--data STR"),
        ("generate", "MODEL"),
        ("train --steps many", "invalid literal for int"),
    ],
)
def test_wrong_words_are_told_with_the_right_ones(words, wanted, lmx):
    done = lmx(*words.split())
    assert done.code == 2 and wanted in done.err and done.out == ""


def test_eval_measures_what_training_measured(trained, lmx, text):
    folder, done = trained
    stated = done.result["bits_per_byte"]
    measured = lmx("eval", folder, "--data", text, "--json")
    assert measured.code == 0, measured.err
    result = measured.result
    assert result["bits_per_byte"] == pytest.approx(stated, rel=1e-4)
    assert result["references"]["lzma"] == pytest.approx(done.result["references"]["lzma"])
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))
    assert result["length"] == 32
    assert "this model" in measured.err


def test_eval_takes_the_unigram_model_too(trained, lmx, text):
    folder, done = trained
    measured = lmx("eval", folder / "unigram", "--data", text, "--json")
    assert measured.code == 0, measured.err
    assert measured.result["bits_per_byte"] == pytest.approx(done.result["references"]["unigram"], rel=1e-4)


def test_eval_of_a_split_that_is_not(run, lmx):
    done = lmx("eval", run, "--split", "tset")
    assert done.code == 2 and "no split 'tset', there are train, valid, test, all; did you mean 'test'?" in done.err
    done = lmx("eval", run, "--length", "0")
    assert done.code == 2 and "length must be at least 1, not 0" in done.err


def test_generate_prints_the_text_and_gives_it_again(run, lmx):
    words = ("generate", run, "--prompt", "ab", "--max-new-tokens", "12", "--seed", "3")
    shown, again = lmx(*words), lmx(*words, "--json")
    assert shown.code == 0 and shown.err == ""
    assert again.out.count("\n") == 1
    (text,) = again.result["texts"]
    assert shown.out == f"ab{text}\n"
    assert lmx(*words[:-1], "4", "--json").result["texts"] != [text]


@pytest.mark.slow
def test_generate_without_chance_is_the_likeliest_continuation(run, lmx):
    model, tokenizer = library.load(run / "model"), library.load_tokenizer(run / "model")
    done = lmx("generate", run, "--prompt", "ab", "--max-new-tokens", "6", "--temperature", "0", "--json")
    ids = [tokenizer.eos_id, *tokenizer.encode("ab")]
    for _ in range(6):
        ids.append(int(library.logits(model, np.array([ids]))[0, -1].argmax()))
    assert done.result["texts"] == [tokenizer.decode(ids[3:])]


def test_generate_stops_at_a_text_and_gives_several(run, lmx):
    words = ("generate", run, "--max-new-tokens", "30", "--samples", "3", "--json")
    whole = lmx(*words).result["texts"]
    assert len(whole) == 3 and len(set(whole)) == 3
    stop = whole[0][3:5]
    cut = lmx(*words, "--stop", stop, "never").result["texts"]
    assert cut == [text.partition(stop)[0] for text in whole]
    assert lmx(*words[:-1]).out.count("---") == 6


def test_generate_works_on_the_unigram_model(run, lmx):
    done = lmx("generate", run / "unigram", "--max-new-tokens", "5", "--json")
    assert done.code == 0 and len(done.result["texts"]) == 1


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("--samples 0", "samples must be at least 1, not 0"),
        ("--top-p 7", "top_p is 7.0; it must be above 0 and at most 1"),
        ("--temperature -1", "temperature is -1.0; it must be 0 (greedy: the most probable token) or above"),
        ("--max-new-tokens 0", "max_new_tokens is 0; it must be a whole number, 1 or above"),
    ],
)
def test_generate_with_numbers_out_of_range(words, wanted, run, lmx):
    done = lmx("generate", run, *words.split())
    assert done.code == 2 and wanted in done.err


def test_describe_a_run(trained, lmx):
    folder, done = trained
    described = lmx("describe", folder, "--json")
    assert described.code == 0, described.err
    result = described.result
    assert result["parameters"] == done.result["parameters"] == sum(part["parameters"] for part in result["parts"])
    assert {part["kind"] for part in result["parts"]} == {"dense"}
    assert result["bytes"] == 4 * result["parameters"]
    assert result["config"]["vocab_size"] == 257 and result["train_flops"] == 3 * result["forward_flops"]
    assert all(f"\n{part['path']} " in described.err for part in result["parts"])


def test_describe_a_preset_that_would_not_fit_into_memory(lmx):
    result = lmx("describe", "llama-70b", "--json").result
    assert 70e9 < result["parameters"] < 71e9
    done = lmx("describe", "llama-70")
    assert done.code == 2 and "did you mean 'llama-70b'" in done.err
