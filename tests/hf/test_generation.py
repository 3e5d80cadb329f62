"""Encoder-decoders of transformers' decode here as they do there: greedy and by beams, token for token."""

from __future__ import annotations

import numpy as np
import pytest

import lmx
from lmx import hf
from lmx.core.errors import ConfigError

SOURCES = np.random.default_rng(1).integers(4, 60, (3, 7))
REAL = (np.arange(7) < np.array([[7], [2], [4]])).astype(np.int32)
NEW, PAD, EOS, BEGIN = 8, 1, [10, 22, 41, 44], 2  # several ends, so that hypotheses of every length finish
T5 = {
    "vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": PAD,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
}  # fmt: skip
BART = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 20,
    "forced_eos_token_id": None, "pad_token_id": PAD, "scale_embedding": True,
}  # fmt: skip
FAMILIES = {"T5ForConditionalGeneration": T5, "BartForConditionalGeneration": BART}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, torch_model, tmp_path_factory):
    theirs, folder = torch_model(request.param, FAMILIES[request.param]), tmp_path_factory.mktemp("generation")
    return theirs.model, hf.load(theirs.save(folder))


def of_transformers(theirs, eos, **options):
    """(new tokens (b, r, n), scores (b, r) or None), the decoder's first token left out."""
    import torch

    neutral = dict(min_length=0, no_repeat_ngram_size=0, forced_bos_token_id=None, forced_eos_token_id=None)
    made = theirs.generate(
        torch.tensor(SOURCES), attention_mask=torch.tensor(REAL), max_new_tokens=NEW, do_sample=False,
        decoder_start_token_id=BEGIN, eos_token_id=eos, pad_token_id=PAD, return_dict_in_generate=True,
        output_scores=True, **neutral, **options,
    )  # fmt: skip
    new = made.sequences[:, 1:].numpy().reshape(3, options.get("num_return_sequences", 1), -1)
    full = np.full((*new.shape[:2], NEW), PAD)
    full[..., : new.shape[-1]] = new
    scores = getattr(made, "sequences_scores", None)
    return full, None if scores is None else scores.numpy().reshape(full.shape[:2])


def prompts():
    return np.full((3, 1), BEGIN)


def test_greedy(both):
    theirs, ours = both
    wanted = of_transformers(theirs, 10)[0][:, 0]
    source = dict(encoder_tokens=SOURCES, encoder_segment_ids=REAL)
    options = dict(max_new_tokens=NEW, eos_id=10, pad_id=PAD)
    np.testing.assert_array_equal(lmx.generate(ours, prompts(), **source, **options).tokens, wanted)
    whole = lmx.generate(ours, prompts(), encoder_tokens=SOURCES, **options).tokens
    assert (np.asarray(whole[1:]) != wanted[1:]).any() and (np.asarray(whole[0]) == wanted[0]).all()


@pytest.mark.slow
def test_beam_search(both):
    theirs, ours = both
    options = dict(num_beams=4, num_return_sequences=3, length_penalty=0.6)
    wanted, scores = of_transformers(theirs, EOS, **options)
    got = lmx.beam_search(
        ours.given(SOURCES, REAL), prompts(), max_new_tokens=NEW, eos_id=EOS, pad_id=PAD, **options
    )
    np.testing.assert_array_equal(got.sequences, wanted)
    np.testing.assert_allclose(got.scores, scores, atol=2e-5)
    assert (np.asarray(got.lengths) < NEW).any()


def test_a_body_has_no_next_token(torch_model, tmp_path):
    body = hf.load(torch_model("BartModel", BART).save(tmp_path))
    with pytest.raises(ConfigError, match="head of kind 'none', which gives no next token"):
        lmx.generate(body, prompts(), max_new_tokens=2, encoder_tokens=SOURCES)
