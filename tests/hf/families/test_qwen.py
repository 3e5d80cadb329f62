"""Qwen2 and Qwen3, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FULL, SLIDING = "full_attention", "sliding_attention"
BASE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
}  # fmt: skip
WINDOWS = [  # what transformers makes of them: layer_types are always written
    {"use_sliding_window": False},
    {"max_window_layers": 2},
    {"max_window_layers": 0},
    {"layer_types": [SLIDING, FULL, SLIDING]},
]
FIELDS = {
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "tie_word_embeddings": st.booleans(),
}
WRONG = {
    "vocab_size": 38, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "hidden_act": "gelu", "rms_norm_eps": 0.1, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "use_sliding_window": False, "sliding_window": 6,
    "layer_types": [FULL, FULL, SLIDING],
}  # fmt: skip
WRONG_3 = WRONG | {"head_dim": 4, "attention_bias": True}


@FEW
@given(fields=st.fixed_dictionaries(FIELDS), windows=st.sampled_from(WINDOWS))
def test_parity_of_qwen2(parity, fields, windows):
    parity("Qwen2ForCausalLM", BASE | fields | windows)


@FEW
@given(fields=st.fixed_dictionaries(FIELDS | {"head_dim": st.sampled_from([4, 6]), "attention_bias": st.booleans()}))
def test_parity_of_qwen3(parity, fields):
    parity("Qwen3ForCausalLM", BASE | {**fields, "max_window_layers": 2})


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_of_qwen2_is_noticed(wrong, field):
    wrong("Qwen2ForCausalLM", BASE, field, WRONG[field])


@pytest.mark.parametrize("field", WRONG_3)
def test_a_wrong_field_of_qwen3_is_noticed(wrong, field):
    wrong("Qwen3ForCausalLM", BASE | {"head_dim": 8}, field, WRONG_3[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    # max_window_layers says what layer_types, which transformers always writes, already says
    complete("qwen2", WRONG, {"max_window_layers", "head_dim", "attention_bias", "mlp_bias"})
    complete("qwen3", WRONG_3, {"max_window_layers", "mlp_bias"})
    defaults("qwen2")
    defaults("qwen3")
