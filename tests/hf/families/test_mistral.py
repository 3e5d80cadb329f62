"""Mistral, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "vocab_size": st.sampled_from([37, 64]),
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([6, None]),
    "tie_word_embeddings": st.booleans(),
    "sliding_window": st.sampled_from([None, 1, 4, 30]),
})  # fmt: skip
WRONG = {
    "vocab_size": 38, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 4, "hidden_act": "gelu", "rms_norm_eps": 0.1, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "sliding_window": 6,
}  # fmt: skip


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("MistralForCausalLM", BASE | fields)


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("MistralForCausalLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("mistral", WRONG, {"attention_bias", "mlp_bias"})
    defaults("mistral")
