"""Rotary angles that depend on the longest row of the batch ("dynamic", "longrope"), forward and in a cache, against
transformers."""

from __future__ import annotations

import numpy as np
import pytest

from lmx import hf
from lmx.core.errors import ConfigError
from lmx.decode import PromptLookup, beam_search, generate, speculate

ORIGINAL, PAD = 12, 60  # transformers takes a pad of 0 for none
SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=PAD,
    bos_token_id=None, eos_token_id=None, initializer_range=0.3,
)  # fmt: skip
SCALINGS = {
    "dynamic": ("Llama", dict(
        max_position_embeddings=ORIGINAL, rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    )),
    "longrope": ("Phi3", dict(
        max_position_embeddings=48, original_max_position_embeddings=ORIGINAL, num_key_value_heads=4, rope_parameters={
            "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    )),
}  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, 60, (2, 30))


def forget(theirs) -> None:
    """"dynamic" goes on with the angles of the longest batch so far until it sees a short one."""
    import torch

    with torch.no_grad():
        theirs(torch.zeros((1, 2), dtype=torch.long))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(kind)` -> (a model of transformers, the same in lmx)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    made = {}

    def make(kind: str):
        if kind not in made:
            name, fields = SCALINGS[kind]
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**SIZES, **fields)
            theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            folder = tmp_path_factory.mktemp(kind)
            theirs.save_pretrained(folder)
            made[kind] = theirs, hf.load(folder)
        return made[kind]

    return make


@pytest.mark.parametrize("length", [10, 24], ids=["below", "beyond"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_the_forward_pass(pair, kind, length):
    import torch

    theirs, ours = pair(kind)
    forget(theirs)
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS[:, :length])).logits.numpy()
    got = np.asarray(ours.logits(TOKENS[:, :length]))
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    alike = np.abs(ours.logits(TOKENS)[:, :length] - got).max() < 1e-4  # as in a longer text?
    assert alike == (kind == "longrope" and length > ORIGINAL)


def of_transformers(theirs, lengths, new, **options) -> np.ndarray:
    """(b, n) new tokens after prompts of these lengths, padded on the left."""
    import torch

    width = max(lengths)
    tokens, mask = np.full((2, width), PAD), np.zeros((2, width), int)
    for row, n in enumerate(lengths):
        tokens[row, -n:], mask[row, -n:] = TOKENS[row, :n], 1
    forget(theirs)
    made = theirs.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=new, do_sample=False, **options
    )
    return made[:, width:].numpy()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lengths", "new"), [
    ("dynamic", (6, 4), 10), ("dynamic", (20, 9), 8), ("longrope", (6, 4), 7), ("longrope", (13, 5), 8),
])  # fmt: skip
def test_the_cache(pair, kind, lengths, new):
    """Prompts below and beyond the length, and with "dynamic" across it; columns of padding are no text."""
    theirs, ours = pair(kind)
    wanted = of_transformers(theirs, lengths, new)
    options = dict(lengths=np.array(lengths), max_new_tokens=new, pad_id=PAD)
    np.testing.assert_array_equal(generate(ours, TOKENS, **options).tokens, wanted)
    beams = of_transformers(theirs, lengths, new, num_beams=2)
    np.testing.assert_array_equal(beam_search(ours, TOKENS, num_beams=2, **options).sequences[:, 0], beams)
    if kind == "longrope" and max(lengths) > ORIGINAL:
        made = speculate(ours, TOKENS, draft=PromptLookup(3), **options)
        np.testing.assert_array_equal(made.tokens, wanted)


def test_what_a_cache_cannot_do_is_refused(pair):
    _, ours = pair("longrope")
    with pytest.raises(ConfigError, match="texts of more than 12 tokens .longrope.*Take max_new_tokens=3 at most"):
        generate(ours, TOKENS[:, :10], max_new_tokens=4)
    generate(ours, TOKENS[:, :10], max_new_tokens=3)
    with pytest.raises(ConfigError, match="Take max_new_tokens=1 at most"):
        speculate(ours, TOKENS[:, :10], max_new_tokens=3, draft=PromptLookup(2))
    _, ours = pair("dynamic")
    with pytest.raises(ConfigError, match="drafted tokens that are not kept would count: generate without"):
        speculate(ours, TOKENS[:, :10], max_new_tokens=3, draft=PromptLookup(1))
