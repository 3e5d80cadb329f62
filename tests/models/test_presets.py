"""Presets: the published sizes, and transformers' models of the same shape."""

from __future__ import annotations

import pytest

from lmx.core import specs
from lmx.core.errors import ConfigError
from lmx.models.presets import PRESETS, preset
from lmx.models.transformer import abstract

# Published, or counted by the models' own code.
SIZES = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-1b": 1_235_814_400,  # Llama 3.2 1B
    "llama-7b": 6_738_415_616,  # Llama 7B and Llama 2 7B
    "llama-8b": 8_030_261_248,  # Llama 3 8B
    "llama-70b": 70_553_706_496,  # Llama 3 70B
}


@pytest.mark.parametrize("name", SIZES)
def test_published_parameter_counts(name):
    assert specs.count(abstract(preset(name))) == SIZES[name]


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_transformers(name):
    torch = pytest.importorskip("torch", reason="torch counts the parameters of the same model; install 'oracle'")
    transformers = pytest.importorskip("transformers", reason="transformers counts the parameters of the same model")
    c = preset(name)
    if name.startswith("gpt2"):
        theirs = transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.max_length,
            n_embd=c.hidden_size,
            n_layer=c.num_layers,
            n_head=c.num_heads,
        )
        kind = transformers.GPT2LMHeadModel
    else:
        theirs = transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads, tie_word_embeddings=c.tie_embeddings,
        )  # fmt: skip
        kind = transformers.LlamaForCausalLM
    with torch.device("meta"):  # shapes alone
        model = kind(theirs)
        model.tie_weights()
    assert specs.count(abstract(c)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2-2m", 2), ("llama-2m", 2), ("llama-10m", 10), ("llama-17m", 17), ("llama-110m", 110)],
)
def test_small_presets_hold_what_their_names_say(name, millions):
    assert specs.count(abstract(preset(name))) / 1e6 == pytest.approx(millions, rel=0.06)


def test_changes_are_checked():
    assert preset("llama-tiny", num_layers=3).num_layers == 3
    with pytest.raises(ConfigError, match="no field 'layers'"):
        preset("llama-tiny", layers=3)


def test_an_unknown_preset():
    with pytest.raises(ConfigError, match="no preset 'lama-10m', there are gpt2-tiny, .*; did you mean 'llama-10m'"):
        preset("lama-10m")
