"""Greedy and beam search against transformers' `generate` on the same weights: token for token, score for score."""

from __future__ import annotations

import numpy as np
import pytest

from lmx import hf
from lmx.data import byte_tokenizer, load_tokenizer
from lmx.decode import PromptLookup, generate, speculate, stream
from lmx.decode.beam import beam_search
from lmx.recipes import convert

PROMPTS = np.random.default_rng(1).integers(0, 60, (3, 6))
LENGTHS = np.array([6, 2, 4])
NEW, PAD = 8, 60  # transformers takes a pad of 0 for none
EOS = [10, 22, 41, 44]  # several, so that hypotheses of every length finish
BEAMS = dict(num_beams=4, num_return_sequences=3, eos_id=EOS)  # one set: one compilation an early_stopping
LLAMA = [
    dict(num_beams=1, eos_id=33),
    dict(num_beams=3, num_return_sequences=2),
    dict(BEAMS),
    dict(BEAMS, length_penalty=-0.5),
    dict(BEAMS, length_penalty=2.0),
    dict(BEAMS, early_stopping=True),
    dict(BEAMS, early_stopping=True, length_penalty=0.0),
    dict(BEAMS, early_stopping="never", length_penalty=1.5),
    dict(BEAMS, early_stopping="never", length_penalty=-1.0),
]


def converted(hugging_face, name):
    theirs, convert = hugging_face(name)
    return theirs, convert({name: value.numpy() for name, value in theirs.state_dict().items()})


def of_transformers(theirs, lengths, *, eos_id=None, **options) -> tuple[np.ndarray, np.ndarray | None]:
    """(new tokens (b, r, n), scores (b, r)): their prompts are padded on the left."""
    import torch

    tokens, mask = np.full(PROMPTS.shape, PAD), np.zeros(PROMPTS.shape, int)
    for row, n in enumerate(lengths):
        tokens[row, -n:], mask[row, -n:] = PROMPTS[row, :n], 1
    made = theirs.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=NEW, do_sample=False,
        eos_token_id=eos_id, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    r = options.get("num_return_sequences", 1)
    new = made.sequences[:, PROMPTS.shape[1] :].numpy().reshape(3, r, -1)
    full = np.full((3, r, NEW), PAD)
    full[..., : new.shape[-1]] = new
    scores = getattr(made, "sequences_scores", None)
    return full, None if scores is None else scores.numpy().reshape(3, r)


@pytest.mark.parametrize("name, options", [*[("llama", o) for o in LLAMA], *[("gpt2", o) for o in LLAMA[2:5:2]]])
def test_beam_search(hugging_face, name, options):
    theirs, ours = converted(hugging_face, name)
    wanted, scores = of_transformers(theirs, LENGTHS, **options)
    got = beam_search(ours, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, pad_id=PAD, **options)
    np.testing.assert_array_equal(got.sequences, wanted)
    if scores is not None:  # with one beam transformers searches greedily, and scores nothing
        np.testing.assert_allclose(got.scores, scores, atol=2e-5)
    if options.get("eos_id") == EOS and options.get("length_penalty", 1) <= 1:  # else long ones win
        assert (np.asarray(got.lengths) < NEW).any()


@pytest.mark.slow
@pytest.mark.parametrize("name, eos_id", [("gpt2", 33), ("gpt2", [7, 33]), ("llama tied", 33)])
def test_greedy(hugging_face, name, eos_id):
    theirs, ours = converted(hugging_face, name)
    wanted, _ = of_transformers(theirs, LENGTHS, eos_id=eos_id)
    options = dict(lengths=LENGTHS, max_new_tokens=NEW, eos_id=eos_id, pad_id=PAD)
    np.testing.assert_array_equal(generate(ours, PROMPTS, **options).tokens, wanted[:, 0])
    if name == "gpt2":
        made = speculate(ours, PROMPTS, draft=PromptLookup(3), **options)
        np.testing.assert_array_equal(made.tokens, wanted[:, 0])
        streamed = np.stack(list(stream(ours, PROMPTS, **options)), axis=1)
        np.testing.assert_array_equal(streamed, wanted[:, 0, : streamed.shape[1]])


def test_the_folder_says_at_which_tokens_to_stop(torch_llama, tmp_path):
    """transformers' `generate` without a word about it, and lmx's with what the tokenizer of the folder says."""
    import torch

    free = torch_llama.generate(torch.tensor(PROMPTS), max_new_tokens=12, do_sample=False, pad_token_id=PAD).numpy()
    ends = [int(free[0, 8]), int(free[2, 9])]  # the third new token of one row, the fourth of another
    torch_llama.generation_config.eos_token_id = ends
    torch_llama.save_pretrained(tmp_path / "m")
    byte_tokenizer().save(tmp_path / "m")
    theirs = type(torch_llama).from_pretrained(tmp_path / "m")
    wanted = theirs.generate(torch.tensor(PROMPTS), max_new_tokens=12, do_sample=False, pad_token_id=PAD).numpy()[:, 6:]
    convert.run(convert.ConvertOptions(str(tmp_path / "m"), str(tmp_path / "ours")))
    for folder in (tmp_path / "m", tmp_path / "ours"):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.eos_ids == tuple(ends) and tokenizer.eos_id == 256
        made = generate(hf.load(folder), PROMPTS, max_new_tokens=12, eos_id=tokenizer.eos_ids, pad_id=PAD)
        got = np.asarray(made.tokens)
        np.testing.assert_array_equal(got[:, : wanted.shape[1]], wanted)
    assert (wanted[0, 3:] == PAD).all() and (wanted[2, 4:] == PAD).all() and not np.array_equal(wanted, free[:, 6:])


@pytest.fixture
def torch_llama():
    """A tiny random Llama of transformers, of 257 tokens."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )).eval()  # fmt: skip
