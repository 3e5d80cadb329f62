"""OLMo 2, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "num_key_value_heads": st.sampled_from([1, 4, None]),
    "num_attention_heads": st.sampled_from([4, 8]),
    "head_dim": st.sampled_from([4, 6]),
    "tie_word_embeddings": st.booleans(),
    "attention_bias": st.booleans(),
    "rms_norm_eps": st.sampled_from([1e-5, 1e-3]),
})  # fmt: skip
WRONG = {
    "vocab_size": 38, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "hidden_act": "gelu", "rms_norm_eps": 0.1, "tie_word_embeddings": True,
    "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}  # fmt: skip


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("Olmo2ForCausalLM", BASE | fields)


def test_heads(parity):
    parity("Olmo2ForSequenceClassification", BASE | {"num_labels": 3})


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("Olmo2ForCausalLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("olmo2", WRONG)
    defaults("olmo2")
