"""`lmx generate` by beam search, with drafts, in a chat, and with encoder-decoders."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

import lmx as library
from lmx import data, decode

WORDS = ("--prompt", "ab ab ab", "--max-new-tokens", "12", "--json")


@pytest.fixture(scope="module")
def opened(run):
    return library.load(run / "model"), library.load_tokenizer(run / "model")


def test_beam_search_gives_the_best_of_all_hypotheses(run, lmx, opened):
    model, tokenizer = opened
    done = lmx("generate", run, *WORDS, "--num-beams", "3", "--length-penalty", "0.5")
    assert done.code == 0, done.err
    prompt = np.array([[tokenizer.eos_id, *tokenizer.encode("ab ab ab")]])
    options = dict(max_new_tokens=12, num_beams=3, length_penalty=0.5, eos_id=tokenizer.eos_id)
    best = decode.beam_search(model, prompt, **options).sequences[0, 0]
    assert done.result["texts"] == [tokenizer.decode(best.tolist())]
    shown = lmx("generate", run, *WORDS[:-1], "--num-beams", "3", "--length-penalty", "0.5")
    assert shown.out == f"ab ab ab{done.result['texts'][0]}\n"


@pytest.mark.slow
def test_drafts_change_nothing_but_the_time(run, lmx):
    words = ("generate", run, *WORDS, "--temperature", "0")
    wanted = lmx(*words).result["texts"]
    for ahead in (("--draft", run / "unigram"), ("--prompt-lookup", "4")):
        done = lmx(*words, *ahead)
        assert done.code == 0, done.err
        assert done.result["texts"] == wanted
    drawn = lmx("generate", run, *WORDS, "--draft", run / "unigram", "--samples", "2")
    assert drawn.code == 0 and len(set(drawn.result["texts"])) == 2


def test_a_chat_goes_through_the_models_own_template(model_copy, lmx, opened):
    pytest.importorskip("jinja2", reason="chat templates need jinja2; install the extra 'chat'")
    model, tokenizer = opened
    words = ("generate", model_copy, *WORDS, "--chat", "--temperature", "0")
    done = lmx(*words)
    assert done.code == 2 and "has no chat template" in done.err
    template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    template += "{% if add_generation_prompt %}A:{% endif %}"
    (model_copy / "chat_template.jinja").write_text(template)
    done = lmx(*words)
    assert done.code == 0, done.err
    ids = [*tokenizer.encode("ab ab ab"), tokenizer.eos_id, *tokenizer.encode("A:")]
    made = decode.generate(model, np.array([ids]), max_new_tokens=12, eos_id=tokenizer.eos_id)
    assert done.result["texts"] == [tokenizer.decode(made.tokens[0, : made.lengths[0]].tolist())]
    shown = lmx(*(word for word in words if word != "--json"))
    assert shown.out == f"{done.result['texts'][0]}\n"


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("--num-beams 0", "num_beams must be at least 1, not 0"),
        ("--num-beams 2 --temperature 0.7", "--num-beams finds the likeliest text; it cannot go with --temperature"),
        ("--num-beams 2 --samples 3 --prompt-lookup 4", "cannot go with --prompt-lookup, --samples"),
        ("--length-penalty 2", "--length-penalty belongs to the search: give --num-beams 4"),
        ("--prompt-lookup 0", "num_tokens is 0; it must be a whole number, 1 or above"),
        ("--prompt-lookup 2 --draft x", "both guess ahead: give one of them"),
        ("--draft no-such-folder", "there is no folder 'no-such-folder'"),
        ("--chat", "--chat needs a message to answer: give it with --prompt"),
    ],
)
def test_options_that_cannot_be(words, wanted, run, lmx):
    done = lmx("generate", run, *words.split())
    assert done.code == 2 and wanted in done.err


def test_a_draft_with_another_tokenizer(run, lmx, tmp_path):
    other = shutil.copytree(run / "unigram", tmp_path / "other")
    library.data.train_bpe(["ab cd ab cd " * 50], 257).save(other)
    done = lmx("generate", run, "--draft", other)
    assert done.code == 2 and "has another tokenizer than" in done.err


@pytest.mark.slow
def test_an_encoder_decoder_reads_the_prompt(lmx, tmp_path):
    """The decoder begins with the padding token, or with what Hugging Face's config.json says."""
    tokenizer = data.byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<s>"])
    shape = dict(vocab_size=258, num_layers=1, hidden_size=16, num_heads=2, intermediate_size=24, attention_scale=1.0)
    kind = dict(architecture="encoder_decoder", position="relative", activation="relu", initializer_range=0.5)
    model = library.init(library.Config(**shape, **kind), jax.random.key(0))
    library.save(model, tmp_path / "own", tokenizer=tokenizer)
    like = {"model_type": "t5", "decoder_start_token_id": 257}
    library.save(model, tmp_path / "theirs", tokenizer=tokenizer, format="hf", like=like)
    given = decode.request.given(model, np.array([[*tokenizer.encode("ab ab ab"), tokenizer.eos_id]]))
    for folder, start in (("own", "<|endoftext|>"), ("theirs", "<s>")):
        options = dict(max_new_tokens=12, special=True, **({"num_beams": 2} if folder == "theirs" else {}))
        wanted = decode.generate_text(given, tokenizer, start, **options)
        search = ("--temperature", "0") if folder == "own" else ("--num-beams", "2")
        done = lmx("generate", tmp_path / folder, *WORDS, *search)
        assert done.code == 0, done.err
        assert done.result["texts"] == wanted and wanted[0]
    assert lmx("generate", tmp_path / "theirs", *WORDS[:-1], *search).out == f"{wanted[0]}\n"
    done = lmx("generate", tmp_path / "own", "--json")
    assert done.code == 2 and "needs a text to read: give it with --prompt" in done.err
    done = lmx("generate", tmp_path / "own", *WORDS, "--chat")
    assert done.code == 2 and "has no chats: leave --chat out" in done.err
