"""BART and Marian's models, against transformers."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf
from lmx.core.errors import ConfigError

FEW = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SIDES = ("encoder", "decoder")


def both(**sizes: int) -> dict[str, int]:
    return {f"{side}_{name}": size for side in SIDES for name, size in sizes.items()}


BASE = {
    "vocab_size": 37, "d_model": 16, "max_position_embeddings": 20, "encoder_layers": 2, "decoder_layers": 1,
    "decoder_start_token_id": 2, "pad_token_id": 1, "forced_eos_token_id": None, **both(ffn_dim=24, attention_heads=4),
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "vocab_size": st.sampled_from([37, 64]),
    "max_position_embeddings": st.sampled_from([12, 20]),
    "encoder_layers": st.integers(1, 2),
    "decoder_layers": st.integers(1, 2),
    "activation_function": st.sampled_from(["gelu", "relu", "swish", "gelu_new"]),
    "scale_embedding": st.booleans(),
})  # fmt: skip
HEADS = {"Model": {}, "ForQuestionAnswering": {}, "ForSequenceClassification": {"eos_token_id": 2}}
WRONG = {
    "vocab_size": 38, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "activation_function": "relu",
    "scale_embedding": True, "tie_word_embeddings": False, "max_position_embeddings": 21,
}  # fmt: skip
UNLIKE = {"encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 40}  # than the decoder's
MARIAN = {"activation_function": "swish", "scale_embedding": True}


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("BartForConditionalGeneration", BASE | fields)


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    parity(f"Bart{head}", BASE | HEADS[head])  # 3 labels where none are named


@pytest.mark.parametrize("class_name", ["MarianMTModel", "MarianModel"])
def test_marian(parity, class_name):
    parity(class_name, BASE | MARIAN)


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("BartForConditionalGeneration", BASE, field, WRONG[field])


@pytest.mark.parametrize("field", ["scale_embedding", "share_encoder_decoder_embeddings"])
def test_a_wrong_field_of_marian_is_noticed(wrong, field):
    wrong("MarianMTModel", BASE | MARIAN, field, False)


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("bart", WRONG, {"init_std", "num_labels"})
    complete("marian", WRONG, {"init_std"})
    defaults("bart")
    defaults("marian")


@pytest.mark.parametrize("class_name", ["BartForConditionalGeneration", "MarianModel"])
def test_towers_of_different_sizes(parity, class_name):
    model = parity(class_name, BASE | UNLIKE)
    c = model.config
    assert (c.num_layers, c.num_encoder_layers, c.num_heads, c.num_encoder_heads) == (1, 3, 4, 2)
    assert (c.intermediate_size, c.encoder_intermediate_size) == (24, 40)
    assert jax.tree.map(lambda spec: spec.shape, model.specs()) == jax.tree.map(lambda x: x.shape, model)


def test_an_encoder_whose_heads_do_not_divide_its_width(torch_model, tmp_path):
    config = torch_model("BartForConditionalGeneration", BASE).save(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"encoder_attention_heads": 3}))
    with pytest.raises(ConfigError, match="hidden_size 16 does not divide by num_heads 3"):
        hf.load(tmp_path)


def test_the_sinusoids_of_old_files_are_left_alone(torch_model, tmp_path):
    """transformers before 5 stored them; they follow from the positions."""
    from safetensors.numpy import load_file, save_file

    torch_model("MarianMTModel", BASE).save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, old = load_file(file), {f"model.{side}.embed_positions.weight": np.zeros((20, 16), "f") for side in SIDES}
    save_file(tensors | old, file, {"format": "pt"})
    assert hf.load(tmp_path).params.embed.positions is None
