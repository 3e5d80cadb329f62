"""GPT-NeoX, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf
from lmx.core.arrays import open_arrays

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "num_attention_heads": st.sampled_from([2, 4]),
    "hidden_act": st.sampled_from(["gelu", "gelu_new", "relu"]),
    "use_parallel_residual": st.booleans(),
    "attention_bias": st.booleans(),
    "tie_word_embeddings": st.booleans(),
    "layer_norm_eps": st.sampled_from([1e-5, 1e-3]),
    "rope_parameters": st.sampled_from([
        None, {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0, "partial_rotary_factor": 1.0},
    ]),
})  # fmt: skip
WRONG = {
    "vocab_size": 38, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "hidden_act": "relu", "layer_norm_eps": 0.1, "tie_word_embeddings": True, "use_parallel_residual": False,
    "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
# Fields of version 4, which only count where those of version 5 are missing: see test_fields_of_version_4.
OLDER = {"rotary_emb_base", "rotary_pct"}


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("GPTNeoXForCausalLM", BASE | fields)


def test_heads(parity):
    parity("GPTNeoXForTokenClassification", BASE | {"num_labels": 3})


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("GPTNeoXForCausalLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("gpt_neox", WRONG, OLDER)
    defaults("gpt_neox")


def test_fields_of_version_4():
    transformers = pytest.importorskip("transformers")
    older = {"hidden_size": 32, "num_attention_heads": 4, "rotary_pct": 0.5, "rotary_emb_base": 77.0}
    family = hf.FAMILIES["gpt_neox"]
    config = family.config(older, "GPTNeoXForCausalLM")
    assert (config.rotary_dim, config.rope_theta) == (4, 77.0)
    assert config == family.config(transformers.GPTNeoXConfig(**older).to_dict(), "GPTNeoXForCausalLM")


def test_the_head_has_the_name_that_all_versions_read(made, tmp_path):
    config = hf.FAMILIES["gpt_neox"].config(BASE, "GPTNeoXForCausalLM")
    hf.save(made(config), tmp_path / "model", format="hf", like="gpt_neox")
    assert "embed_out.weight" in open_arrays(tmp_path / "model/model.safetensors")
